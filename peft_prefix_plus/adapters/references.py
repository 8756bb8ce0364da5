"""Referring to a model from one of its own attributes, without keeping it alive."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class ModelReference:
    """
    A weak reference to a model, for attributes of that model or of its modules.

    With a strong one the memory of a deleted model would be free only when cycles are collected. Copied or pickled with the
    model, it refers to the copy.

    Args:
        model (`nn.Module`, *optional*): The model.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._reference = None if model is None else weakref.ref(model)

    def __call__(self) -> Any:
        """Return the model, or `None` if it is gone."""
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelReference:
        model = self()
        return ModelReference(memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelReference, (self(),)
