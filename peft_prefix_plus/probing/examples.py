"""A user's own inputs for the model run that adding an adapter needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from .tensors import moved


_given: ContextVar[Mapping[str, Any] | None] = ContextVar("example_inputs", default=None)


@contextmanager
def example_inputs(**inputs: Any) -> Iterator[None]:
    """
    Use these inputs whenever an adapter is added or loaded, instead of inputs made from the model's config. Adding an
    adapter runs the model once, to find the shapes of its keys and values. Most models need no help with that; a model
    whose `forward` takes unusual arguments does. Without `target_modules`, the attention modules that these inputs
    reach get a prefix.

    Args:
        inputs: The arguments of the model's `forward`, for a batch of one. If an encoder and a decoder both have
            inputs, give them different lengths, to distinguish cross-attention from self-attention.

    Example:

    ```py
    >>> import torch
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> from peft_prefix_plus import PrefixPlusConfig, example_inputs

    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
    >>> model = ViTForImageClassification(ViTConfig(**sizes))
    >>> with example_inputs(pixel_values=torch.rand(1, 3, 16, 16)):
    ...     model = get_peft_model(model, PrefixPlusConfig(num_virtual_tokens=10))

    ```
    """
    token = _given.set(inputs)
    try:
        yield
    finally:
        _given.reset(token)


def given_inputs(model: nn.Module, device: torch.device | None) -> dict[str, Any] | None:
    """
    Return the inputs given with [`example_inputs`], on a device and in a model's dtype, or `None`.

    Args:
        model (`nn.Module`): The model.
        device (`torch.device`, *optional*): The device.
    """
    inputs = _given.get()
    if inputs is None:
        return None
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return moved(inputs, next(dtypes, torch.float32), device)
