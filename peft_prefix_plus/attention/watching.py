"""
Who watches the attention modules: a probe, or a measure of what prefixes give.

Watchers see only the forwards of their own thread. The modules do not know about them, so other threads run them as
usual.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


Watchers = Mapping[nn.Module, Callable[..., Any]]


class _Thread(threading.local):
    """
    The watchers in a thread.

    Attributes:
        interface (`Watchers`, *optional*): By module, the attention function to call in place of the usual one.
        inline (`Watchers`, *optional*): By module that computes attention itself, a function that takes its forward and the
            forward's arguments, and returns its output.
    """

    def __init__(self) -> None:
        # set here, and not in the class: torch.compile watches the attributes of an object
        self.interface: Watchers | None = None
        self.inline: Watchers | None = None


THREAD = _Thread()


@contextmanager
def watching(interface: Watchers, inline: Watchers) -> Iterator[None]:
    """Let these functions run in place of the modules' usual ones, in this thread."""
    outer = THREAD.interface, THREAD.inline
    THREAD.interface = {**(outer[0] or {}), **interface}
    THREAD.inline = {**(outer[1] or {}), **inline}
    try:
        yield
    finally:
        THREAD.interface, THREAD.inline = outer


@contextmanager
def unwatched() -> Iterator[None]:
    """Let modules run as usual in this thread, for a watcher that calls them."""
    outer = THREAD.interface, THREAD.inline
    THREAD.interface = THREAD.inline = None
    try:
        yield
    finally:
        THREAD.interface, THREAD.inline = outer
