"""Rows of a batch with adapters of their own, in the modules that PEFT saves copies of."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from .running import RUNNING


_PASSING_ROWS = threading.Lock()


def pass_rows(module: nn.Module) -> None:
    """Tell a module that PEFT saves a copy of per adapter which row of a batch uses which adapter."""
    with _PASSING_ROWS:
        if _name_rows not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_name_rows, with_kwargs=True)


def _name_rows(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the forward of a module that PEFT saves a copy of per adapter: pass which row uses which adapter."""
    adapter_names = (RUNNING.rows or {}).get(module)
    if adapter_names is None or kwargs is None:  # other threads may find the hook before it is known to take kwargs
        return None
    repeats = len(args[0]) // len(adapter_names) if args else 1
    return args, {**kwargs, "adapter_names": [name for name in adapter_names for _ in range(repeats)]}


def stop_passing_rows(model: nn.Module) -> None:
    """Undo [`pass_rows`] in all modules of a model."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _name_rows:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
