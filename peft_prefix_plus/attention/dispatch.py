"""The attention function that a module with a prefix calls: which way of computing it is taken, and why."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .config_view import model_config
from .reference import AttentionFunction, AttentionOutput, concatenated_attention, gated_attention


class MaskConvention(NamedTuple):
    """How an attention implementation reads its mask."""

    none_is_causal: bool
    """A missing mask means causal attention where the module is causal; otherwise it means that all is seen."""


MASK_CONVENTIONS = {
    "eager": MaskConvention(none_is_causal=False),
    "sdpa": MaskConvention(none_is_causal=True),
}
"""The implementations to whose keys and mask a prefix can be added."""


def check_implementation(name: str | None) -> None:
    """
    Raise unless a prefix can be added to this attention implementation.

    Raises:
        ValueError: If the implementation is not one of `MASK_CONVENTIONS`.
    """
    if name not in MASK_CONVENTIONS:
        raise ValueError(
            f"PREFIX_PLUS cannot add a prefix to the attention implementation {name!r}: how it reads its mask is not "
            f"known. Use one of {', '.join(map(repr, MASK_CONVENTIONS))}, for instance "
            "model.set_attn_implementation('sdpa')."
        )


def base_attention_function(module: nn.Module, eager: AttentionFunction) -> AttentionFunction:
    """Return the attention function that the module would call without a prefix; `eager` is its own file's."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(model_config(module)._attn_implementation, eager)


def eager_attention_function(module_class: type[nn.Module]) -> AttentionFunction:
    """Return the eager attention function that a class of attention modules falls back on: one of its own file."""
    forward = inspect.unwrap(module_class.forward)
    for name in forward.__code__.co_names:
        if name.endswith("eager_attention_forward"):
            return forward.__globals__[name]
    raise ValueError(f"{module_class.__name__}.forward names no eager attention function of its own module.")


def prefix_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """
    The attention function registered with transformers: attention with the prefixes of the module's active adapters.

    It hands on to the implementation that the model's own config names. Without an active prefix that is all it does.

    Args:
        module: An attention module that carries a [`PrefixPlusLayer`].
        query: Shape (batch, query_heads, tokens, key_dim).
        key: Shape (batch, kv_heads, kv_tokens, key_dim).
        value: Shape (batch, kv_heads, kv_tokens, value_dim).
        attention_mask: As the implementation expects it.
        kwargs: As the implementation expects them.
    """
    attend = base_attention_function(module, module.prefix_plus.eager_attention)
    prefix, gated_prefixes = module.prefix_plus(key, value)
    if prefix is None:
        output, weights = attend(module, query, key, value, attention_mask, **kwargs)
    else:
        implementation = model_config(module)._attn_implementation
        check_implementation(implementation)
        none_is_causal = MASK_CONVENTIONS[implementation].none_is_causal
        output, weights = concatenated_attention(
            attend, none_is_causal, module, query, key, value, attention_mask, prefix, **kwargs
        )
    for gated in gated_prefixes:
        output = output + gated_attention(query, gated, kwargs.get("scaling")).reshape(output.shape)
    return output, weights
