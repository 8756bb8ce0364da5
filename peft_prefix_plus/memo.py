"""Keeping what was produced from parameters until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch


T = TypeVar("T")


class Memo(Generic[T]):
    """
    The last value produced from some parameters, for inference.

    A change of a parameter is seen by its version counter, its storage and its identity. The counter does not see a write
    through `parameter.data` or `parameter.detach()`; a forward in training clears the memo, so only such a write between two
    inferences needs a call of [`Memo.clear`].

    A copy of a memo, by `copy` or `pickle`, is empty.
    """

    def __init__(self) -> None:
        self._fingerprint: Hashable = None
        self._sources: Sequence[torch.Tensor] = ()
        self._value: T | None = None

    def clear(self) -> None:
        """Forget the value."""
        self.__init__()  # type: ignore[misc]

    def get(self, sources: Sequence[torch.Tensor], context: Hashable, produce: Callable[[], T]) -> T:
        """
        Return what `produce` returned when the sources and the context were last as they are now.

        Args:
            sources: The parameters that the value depends on.
            context: Whatever else it depends on.
            produce: Makes the value.
        """
        if any(source.is_inference() for source in sources):
            return produce()  # tensors made in inference mode have no version
        fingerprint = (context, *((id(source), source._version, source.data_ptr()) for source in sources))
        if self._value is None or fingerprint != self._fingerprint:
            self._value = produce()
            self._fingerprint = fingerprint
            self._sources = sources  # kept alive, so that no other tensor can get the same id
        return self._value

    def __reduce__(self) -> tuple[type[Memo[T]], tuple[()]]:
        return type(self), ()
