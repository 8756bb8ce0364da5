"""The encoder parts that the layers of a model share."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..registration import METHOD_NAME


SHARED_NAME = METHOD_NAME
"""
What the model calls its child that holds the parts which layers share. An attention module has a child of the same name, its
[`PrefixPlusLayer`]; both are in the keys of checkpoints.
"""


class PrefixPlusModule(BaseTunerLayer):
    """
    A module that holds parameters of adapters: an attention module's [`PrefixPlusLayer`], or the model's
    [`SharedParts`].
    """

    cast_input_dtype_enabled = (
        True  # PEFT's `disable_input_dtype_casting` reads and sets it; a prefix has no input to cast
    )


class SharedParts(nn.Module, PrefixPlusModule):
    """
    The encoder parts that several layers use, by adapter; a child of the model itself.

    They belong to the model and not to the first layer, because models are sharded by layers: FSDP gathers a layer's
    parameters only for that layer's forward and backward, and the model's own parameters for all layers.
    """

    adapter_layer_names: tuple[str, ...] = ("prefix_plus_shared",)

    def __init__(self) -> None:
        super().__init__()
        self.prefix_plus_shared = nn.ModuleDict({})
        self._active_adapter: list[str] = []

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        pass  # the layer that made a part moves it

    def __repr__(self) -> str:
        return f"{METHOD_NAME}.{super().__repr__()}"


def shared_parts(model: nn.Module, adapter_name: str) -> nn.ModuleDict:
    """
    Return the parts that the layers of an adapter share, by name; empty for a new adapter.

    Args:
        model (`nn.Module`): The base model, which gets [`SharedParts`] if it has none.
        adapter_name (`str`): The adapter.
    """
    shared: Any = getattr(model, SHARED_NAME, None)
    if shared is None:
        shared = SharedParts()
        model.add_module(SHARED_NAME, shared)
    if adapter_name not in shared.prefix_plus_shared:
        shared.prefix_plus_shared[adapter_name] = nn.ModuleDict({})
    return shared.prefix_plus_shared[adapter_name]


def remove_shared_parts(model: nn.Module, adapter_name: str | None = None) -> None:
    """Remove the shared parts of one adapter, or of all, from a model, and [`SharedParts`] if it is then empty."""
    for parent in list(model.modules()):
        shared: Any = getattr(parent, SHARED_NAME, None)
        if not isinstance(shared, SharedParts) or SHARED_NAME not in parent._modules:
            continue
        for name in [adapter_name] if adapter_name is not None else list(shared.prefix_plus_shared):
            if name in shared.prefix_plus_shared:
                del shared.prefix_plus_shared[name]
        if not shared.prefix_plus_shared:
            delattr(parent, SHARED_NAME)
