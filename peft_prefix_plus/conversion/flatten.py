"""Reading an adapter's prefix, and dropping its reparameterization."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..adapters.lookup import layers_with_adapter
from ..adapters.shared import remove_shared_parts
from ..adapters.snapshot import all_or_nothing
from ..encoders import DirectEncoder


@torch.no_grad()
def prefix_key_values(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Return an adapter's prefix as it enters attention.

    Args:
        model (`nn.Module`): A model with the adapter.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: By the attention module's name in the base model, the keys
        (kv_heads, num_virtual_tokens, key_dim) and values (kv_heads, num_virtual_tokens, value_dim), without gradient.

    Raises:
        ValueError: If the model has no such adapter.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, prefix_key_values

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig(num_virtual_tokens=10))
    >>> {name: tuple(key.shape) for name, (key, value) in prefix_key_values(model).items()}
    {'model.layers.0.self_attn': (4, 10, 16), 'model.layers.1.self_attn': (4, 10, 16)}

    ```
    """
    return {
        name: tuple(tensor.clone() for tensor in layer.prefix_key_value(adapter_name))  # type: ignore[misc]
        for name, layer in layers_with_adapter(model, adapter_name)
    }


def flatten(model: nn.Module, adapter_name: str = "default") -> None:
    """
    Convert an adapter, in place, to `reparameterization="none"` with the same output. Only training needs the
    projection; inference needs only the prefix that it produces.

    Args:
        model (`nn.Module`): A model with the adapter.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Raises:
        ValueError: If the model has no such adapter.
    """
    prefixes = prefix_key_values(model, adapter_name)
    with all_or_nothing(model, adapter_name=adapter_name):
        for name, layer in layers_with_adapter(model, adapter_name):
            key, value = prefixes[name]
            requires_grad = any(parameter.requires_grad for parameter in layer.adapter_parameters(adapter_name))
            layer.replace_encoder(adapter_name, DirectEncoder.holding(key, value).requires_grad_(requires_grad))
        remove_shared_parts(model, adapter_name)
        configs: Any = model.peft_config
        configs[adapter_name] = replace(
            configs[adapter_name], reparameterization="none", encoder_hidden_size=None, prefix_scaling=1.0
        )
