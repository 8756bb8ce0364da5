"""Keeping values computed from parameters until one of the parameters changes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch

from ..attention import TurnedPrefixes


Source = tuple[Mapping[str, Any], str]
"""A parameter, or the module that has it, as the dictionary that holds it and its name there."""


def _may_be_sharded() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Memo:
    """
    The last value that each of several producers computed from its parameters, for one call of `generate`. A
    parameter's version counter, storage and identity show whether it has changed. A write through `parameter.data`
    changes none of them. Callers therefore drop the memo when `generate` returns, because such writes happen between
    calls, not during one.

    Nothing is kept in a process of `torch.distributed`, because FSDP and the like put other values into the same
    tensor and hide that from the counter.

    Attributes:
        turned (`dict`): The [`TurnedPrefixes`] of the kept prefixes, by kind.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Any, list[tuple[Mapping[str, Any], str, Any, int | None, int]], Any]] = {}
        self.turned: dict[Hashable, TurnedPrefixes] = {}

    def recall(self, producer: Hashable, context: Any) -> Any:
        """
        Return the kept value of a producer if the context and the parameters have not changed since, else `None`.

        Args:
            producer (`Hashable`): Who produced it.
            context: What else the value depends on; compared by `==`.
        """
        # this runs for every token and layer, hence plain comparisons in one loop
        kept = self._kept.get(producer)
        if kept is None or kept[0] != context:
            return None
        for holder, name, source, version, address in kept[1]:
            if version is not None and (source._version != version or source.data_ptr() != address):
                return None
            if holder.get(name) is not source:
                return None
        return kept[2]

    def keep(self, producer: Hashable, context: Any, sources: Iterable[Source], value: Any) -> bool:
        """
        Keep a value for [`Memo.recall`], if changes of its parameters can be seen.

        Args:
            producer (`Hashable`): Who produced it.
            context: As for [`Memo.recall`].
            sources: The parameters that the value depends on, and the modules that have them.
            value: The value, not `None`.

        Returns:
            `bool`: Whether it is kept.
        """
        seen: list[tuple[Mapping[str, Any], str, Any, int | None, int]] = []
        for holder, name in sources:
            source = holder[name]
            if not isinstance(source, torch.Tensor):
                seen.append((holder, name, source, None, 0))
            elif source.is_inference():
                return False  # made in inference mode, it has no version
            else:
                seen.append((holder, name, source, source._version, source.data_ptr()))
        if _may_be_sharded():
            return False
        self._kept[producer] = context, seen, value
        return True
