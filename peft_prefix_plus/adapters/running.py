"""
The state of a running call of a model that the model's layers need.

It belongs to the call and not to the modules, which other threads run at the same time. Each thread has its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from .memo import Memo


RowsByModule = Mapping[nn.Module, list[str]]
"""For each module that has parameters of adapters: the name of an adapter for each row of the model's input."""


class Running(threading.local):
    """
    The calls that run in a thread.

    Attributes:
        rows (`RowsByModule`, *optional*): Set while the rows of a batch have adapters of their own.
        memo (`Memo`, *optional*): Set while `generate` runs: the prefixes that it has produced.
    """

    def __init__(self) -> None:
        # set here, and not in the class: torch.compile watches the attributes of an object
        self.rows: RowsByModule | None = None
        self.memo: Memo | None = None


RUNNING = Running()


@contextmanager
def naming_rows(rows: RowsByModule) -> Iterator[None]:
    """Let each row of a batch use its own adapter in these modules, in this thread."""
    outer = RUNNING.rows
    RUNNING.rows = {**(outer or {}), **rows}
    try:
        yield
    finally:
        RUNNING.rows = outer


@contextmanager
def keeping_prefixes() -> Iterator[None]:
    """Produce each layer's prefix once in this thread, and again where a parameter changes."""
    outer = RUNNING.memo
    RUNNING.memo = Memo()
    try:
        yield
    finally:
        RUNNING.memo = outer
