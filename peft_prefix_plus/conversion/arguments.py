"""Checking what a conversion is given."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn


def check_base_model(model: Any, adapter: str) -> None:
    """
    Raise unless a model is one without adapters.

    Args:
        model: The model.
        adapter (`str`): The adapter that is to be put on it, for the error.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(model, PeftModel) or not isinstance(model, nn.Module) or "peft_config" in vars(model):
        raise TypeError(
            f"`model` must be the base model, without adapters, that the adapter {adapter!r} was trained on; "
            f"got {type(model).__name__}" + (" with adapters." if isinstance(model, nn.Module) else ".")
        )
