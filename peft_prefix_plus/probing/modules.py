"""Finding a model's attention modules."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention import (
    may_compute_attention,
)


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether a module computes its attention through transformers' attention interface."""
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", _no_code).co_names and hasattr(module, "config")


_no_code = (lambda: None).__code__


def is_attention_module(module: nn.Module) -> bool:
    """
    Whether a module may be one of attention: through the interface, or by itself.

    A module that computes a softmax itself may also be something else (the router of a mixture of experts); [`probe`]
    finds out.
    """
    if isinstance(module, PreTrainedModel):
        return False
    module_class: type = type(module)
    return calls_attention_interface(module) or may_compute_attention(module_class)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that may be attention, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_attention_module(module)}


def outermost_models(model: nn.Module, prefix: str | None = None) -> list[tuple[str, PreTrainedModel]]:
    """
    The transformers models in a model that are in no other, each with the prefix that its modules' names have.

    Args:
        model (`nn.Module`): The model.
        prefix (`str`, *optional*): The prefix of its own modules' names. It then does not count itself.
    """
    found: list[tuple[str, PreTrainedModel]] = []
    for inner_prefix, inner in models_in(model):
        is_itself = prefix is not None and inner is model
        if not is_itself and not any(inner_prefix.startswith(outer) for outer, _ in found):
            found.append((inner_prefix, inner))
    return [(f"{prefix or ''}{inner_prefix}", inner) for inner_prefix, inner in found]


def models_in(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The transformers models in a model, itself first, each with the prefix that its modules' names have."""
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    ]


def execution_device(module: nn.Module) -> torch.device | None:
    """
    Return the device that a module computes on: if it is offloaded, the one that accelerate moves it to, else that of
    its weights.
    """
    for submodule in module.modules():
        hook = getattr(submodule, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None and getattr(each, "offload", False):
                return torch.device(device)
    return next((parameter.device for parameter in module.parameters()), None)
