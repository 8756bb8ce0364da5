"""Watching attention modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..attention import (
    POSITIONS,
    THREAD,
    AttentionOutput,
    ConfigView,
    InlineAttention,
    attend_as_base,
    eager_attention_function,
    follow,
    model_config,
    reads_implementation,
    run_under,
    set_config,
    unfollow,
    watching,
)
from ..registration import METHOD_NAME
from .modules import calls_attention_interface


PROBE_NAME = "prefix_plus_probe"
"""The name under which [`probe_attention`] is registered with transformers."""


def probe_attention(module: Any, *args: Any, **kwargs: Any) -> AttentionOutput:
    """The attention function that is registered for modules without a prefix that a thread watches."""
    attend: Callable[..., AttentionOutput] = (THREAD.interface or {}).get(
        module, _attend_as_ever
    )  # other threads run the module as ever meanwhile
    return attend(module, *args, **kwargs)


def _attend_as_ever(module: Any, *args: Any, **kwargs: Any) -> AttentionOutput:
    implementation = model_config(module)._attn_implementation
    eager = eager_attention_function(type(module))
    kwargs.pop(POSITIONS, None)
    return attend_as_base(module, *args, implementation=implementation, eager=eager, **kwargs)


@contextmanager
def recording(
    modules: dict[str, nn.Module], record: Callable[..., None], reject: Callable[[str, str], None] = lambda *_: None
) -> Iterator[None]:
    """
    Call `record(name, query, key, value, scale)` whenever one of the modules computes attention in this thread, and
    `reject(name, reason)` when a module that does not call the attention interface has computed something else.
    Meanwhile the modules' prefixes have no effect. Afterwards everything is as before.
    """
    interface: dict[nn.Module, Callable[..., Any]] = {}
    inline: dict[nn.Module, Callable[..., Any]] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            if calls_attention_interface(module):
                interface[module] = partial(_record_interface, partial(record, name))
            else:
                inline[module] = partial(_record_inline, partial(record, name), partial(reject, name))
            if METHOD_NAME not in module._modules:
                stack.enter_context(_reaching(module))
        stack.enter_context(watching(interface, inline))
        yield


@contextmanager
def _reaching(module: Any) -> Iterator[None]:
    """Let a module without a prefix call its watchers, and restore it afterwards."""
    is_interface = calls_attention_interface(module)
    config = module.config if is_interface else None
    try:
        if is_interface:
            set_config(module, ConfigView(config, PROBE_NAME, reads_implementation(type(module))))
        else:
            follow(module, METHOD_NAME)
        yield
    finally:
        if is_interface:
            set_config(module, config)
        else:
            unfollow(module)


def _record_interface(
    record: Callable[..., None],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> AttentionOutput:
    scaling = kwargs.get("scaling")
    record(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    # what a record has autograd follow ends here: not every kernel has a backward
    return _attend_as_ever(module, query.detach(), key.detach(), value.detach(), *args, **kwargs)


def _record_inline(
    record: Callable[..., None],
    reject: Callable[..., None],
    module: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    mode = InlineAttention(module)
    output = run_under(mode, forward, args, kwargs)
    if mode.is_complete():
        record(*mode.attended[0])
    else:
        reject(mode.obstacle())
    return output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients and dropout, and leave every module's training flag as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """
    Gather a module's own parameters around its forward if DeepSpeed's ZeRO-3 partitioned them when the model was
    loaded. In training DeepSpeed's engine does that, but the engine is made from the model only later.
    """
    contexts: dict[nn.Module, list[Any]] = {}

    def gather(module: nn.Module, args: Any) -> None:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))
        context.__enter__()
        contexts.setdefault(module, []).append(context)

    def release(module: nn.Module, args: Any, output: Any) -> None:
        contexts[module].pop().__exit__(None, None, None)

    def release_all() -> None:
        for module, unreleased in contexts.items():
            while unreleased:
                release(module, None, None)

    with ExitStack() as stack:
        stack.callback(release_all)  # an interrupted forward has called no hook
        for module in model.modules():
            if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(gather).remove)
                stack.callback(module.register_forward_hook(release, always_call=True).remove)
        yield
