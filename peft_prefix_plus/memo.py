"""Keeping what was produced from parameters until one of them changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch


T = TypeVar("T")

Source = tuple[Mapping[str, Any], str]
"""A parameter, as the dictionary that holds it and its name there."""


def _may_be_sharded() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Memo(Generic[T]):
    """
    The last value produced from some parameters, for inference.

    A change of a parameter is seen by its version counter, its storage and its identity. The counter does not see a write
    through `parameter.data` or `parameter.detach()`; a forward in training clears the memo, so only such a write between two
    inferences needs a call of [`Memo.clear`].

    A copy of a memo, by `copy` or `pickle`, is empty. Nothing is kept in a process of `torch.distributed`: what shards a
    model puts other numbers into the same tensor, and hides that from the counter.
    """

    def __init__(self) -> None:
        self._context: Any = None
        self._seen: list[tuple[Mapping[str, Any], str, torch.Tensor, int, int]] = []
        self._value: T | None = None

    def clear(self) -> None:
        """Forget the value."""
        self._context = self._value = None
        self._seen = []

    def recall(self, context: Any) -> T | None:
        """
        Return the kept value if the context and the parameters are as they were then, and else `None`.

        Args:
            context: What else the value depends on, the list of its parameters included; compared by `==`.
        """
        # this runs for every token and layer, hence plain comparisons in one loop
        if self._value is None or context != self._context:
            return None
        for holder, name, tensor, version, address in self._seen:
            if holder.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return None
        return self._value

    def keep(self, context: Any, sources: Iterable[Source], value: T) -> T:
        """
        Keep a value for [`Memo.recall`], and return it.

        Args:
            context: As for [`Memo.recall`].
            sources: The parameters that the value depends on, as the dictionaries that hold them and their names there.
            value: The value.
        """
        tensors = [(holder, name, holder[name]) for holder, name in sources]
        if _may_be_sharded() or any(tensor.is_inference() for _, _, tensor in tensors):
            self.clear()  # tensors made in inference mode have no version
        else:
            self._seen = [(*source, source[2]._version, source[2].data_ptr()) for source in tensors]
            self._context, self._value = context, value
        return value

    def __reduce__(self) -> tuple[type[Memo[T]], tuple[()]]:
        return type(self), ()
