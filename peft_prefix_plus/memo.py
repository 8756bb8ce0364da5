"""Keeping what was produced from parameters until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
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
        self._context: Hashable = None
        self._seen: list[tuple[Source, torch.Tensor, int, int]] | None = None
        self._value: T | None = None

    def clear(self) -> None:
        """Forget the value."""
        self._context = self._seen = self._value = None

    def get(self, context: Hashable, sources: Callable[[], Iterable[Source]], produce: Callable[[], T]) -> T:
        """
        Return what `produce` returned when the context and the sources were last as they are now.

        Args:
            context: What else the value depends on, the list of its sources included.
            sources: Lists the parameters that the value depends on, as the dictionaries that hold them and their names there.
            produce: Makes the value.
        """
        if self._seen is not None and context == self._context:
            for (holder, name), tensor, version, address in self._seen:
                # this runs for every token and layer, hence plain comparisons and no hash
                if holder.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                    break
            else:
                return self._value  # type: ignore[return-value]
        value = produce()
        tensors = [((holder, name), holder[name]) for holder, name in sources()]
        if _may_be_sharded() or any(tensor.is_inference() for _, tensor in tensors):
            self.clear()  # tensors made in inference mode have no version
        else:
            self._seen = [(source, tensor, tensor._version, tensor.data_ptr()) for source, tensor in tensors]
            self._context, self._value = context, value
        return value

    def __reduce__(self) -> tuple[type[Memo[T]], tuple[()]]:
        return type(self), ()
