"""
Modules that compute attention themselves, without transformers' attention interface: how their forward is followed.

inline_mode.py says how the prefix gets in.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from torch.overrides import (  # type: ignore[attr-defined]
    _get_current_function_mode,
    _len_torch_function_stack,
    _pop_mode,
    _push_mode,
)

from .holder import PrefixHolder
from .inline_mode import InlineAttention
from .observed import Observer
from .watching import THREAD


def follow(module: nn.Module, child: str) -> None:
    """
    Let a module's prefixes take part in its forward, until [`unfollow`].

    The module gets another class, of the same name, whose forward runs the one of its own class under an
    [`InlineAttention`]. Hooks would not do: those after a forward do not run where Ctrl-C ends it, and would leave the mode in
    place for all that the thread computes from then on.

    Args:
        module (`nn.Module`): The module.
        child (`str`): The name of its child that is the [`PrefixHolder`]; without one, only watchers take part.
    """
    followed: type = type(module)
    if any("_followed" in vars(each) for each in followed.__mro__):
        return  # another tool (FSDP) has put a class of its own on top, and kept ours
    own = _followed_class(followed, child)
    module.__class__ = own
    _rebind(module, followed, own)


def unfollow(module: nn.Module) -> None:
    """Give a module the class back that it had before [`follow`]."""
    own = type(module)
    followed = vars(own).get("_followed")
    if followed is not None:  # as it is under another tool's class, where forward passes through
        module.__class__ = followed
        _rebind(module, own, followed)


def _rebind(module: nn.Module, old: Any, new: Any) -> None:
    """Turn what holds the forward of a module's old class (accelerate's hooks do) to that of its new class."""
    for name, value in list(vars(module).items()):
        if isinstance(value, types.MethodType) and value.__func__ is old.forward and value.__self__ is module:
            vars(module)[name] = types.MethodType(new.forward, module)


@cache
def _followed_class(module_class: Any, child: str) -> Any:
    """The class whose modules are those of another class, with prefixes."""

    @wraps(module_class.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watchers = THREAD.inline
        watcher = None if watchers is None else watchers.get(self)
        if watcher is not None:
            return watcher(self, module_class.forward, args, kwargs)
        return attend_inline(self, module_class.forward, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        _, _, *state = module_class.__reduce_ex__(self, protocol)
        return _new_followed, (module_class, child), *state

    names = {name: getattr(module_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    attributes = {
        **names,
        "_followed": module_class,
        "prefix_child": child,
        "forward": forward,
        "__reduce_ex__": reduce,
    }
    return type(module_class.__name__, (module_class,), attributes)


def _new_followed(module_class: Any, child: str) -> Any:
    """Where a copy or an unpickled module starts from."""
    followed_class = _followed_class(module_class, child)
    return followed_class.__new__(followed_class)


def attend_inline(
    module: Any, forward: Callable[..., Any], args: Any, kwargs: Any, observe: Observer | None = None
) -> Any:
    """
    Run a module's forward with the prefixes of its active adapters.

    Args:
        module: An attention module under [`follow`].
        forward: The forward of its class.
        args: The forward's arguments.
        kwargs: Those by keyword.
        observe: Told of the attention that falls on the prefix.

    Raises:
        RuntimeError: If the module computes attention in another way than when the adapter was added.
    """
    holder: PrefixHolder | None = module._modules.get(type(module).prefix_child)
    if holder is None or not holder.has_prefix():
        return forward(module, *args, **kwargs)
    mode = InlineAttention(module, holder.forward, observe)
    output = run_under(mode, forward, args, kwargs)
    require_complete(mode)
    return output


def run_under(mode: InlineAttention, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run the forward of a mode's module under it, and leave it however the forward ends."""
    if torch.compiler.is_compiling():
        with mode:
            return forward(mode.module, *args, **kwargs)
    _drop_modes_that_are_over()
    depth = _len_torch_function_stack()
    try:
        _push_mode(mode)
        return forward(mode.module, *args, **kwargs)
    finally:
        # First, and without a call, at which an interrupt could come. Where one has cut a context of torch's own off, which
        # takes a mode from the stack for a while, that context puts it back when its memory is freed.
        mode.is_over = True
        while _len_torch_function_stack() > depth:
            _pop_mode()


def _drop_modes_that_are_over() -> None:
    """Take from this thread's stack what interrupts have left there."""
    while isinstance(mode := _get_current_function_mode(), InlineAttention) and mode.is_over:
        _pop_mode()


def require_complete(mode: InlineAttention) -> None:
    """Raise if a forward did not compute attention in the way that the probe found: its prefix would be missing."""
    if not mode.is_complete():
        raise RuntimeError(
            f"{type(mode.module).__name__} computed attention in another way than when the adapter was added, and its "
            f"prefix did not get in: {mode.obstacle()}. Call it with the arguments and in the mode that it had then."
        )
