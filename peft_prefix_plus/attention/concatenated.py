"""Attention with a prefix, by concatenation: exact, and possible wherever the base implementation works."""

from __future__ import annotations

import torch
from torch import nn

from .call import AttentionCall, AttentionFunction, AttentionOutput
from .masks import finite_additive
from .prefix import Prefix


def concatenated_attention(attend: AttentionFunction, call: AttentionCall) -> AttentionOutput:
    """
    softmax(s · Q [P_K ; K]ᵀ + mask) [P_V ; V], through the base model's own attention function.

    Every query sees every prefix position, whatever the mask hides of the real tokens.

    Args:
        attend: The base model's attention function. With the implementation sdpa it takes a missing mask to mean causal
            attention, where the module is causal.
        call: The call. Its mask is (1 or batch, 1 or query_heads, tokens, kv_tokens), bool or additive, or `None`; a
            `position_bias` is zero for the prefix.

    Returns:
        What `attend` returns: the output, (batch, tokens, query_heads, value_dim), and the attention weights, (batch,
        query_heads, tokens, prefix_tokens + kv_tokens), or `None`.
    """
    _, _, module, query, key, value, mask, prefix, prefix_query, kwargs = call
    kwargs = dict(kwargs)
    none_is_causal = call.implementation == "sdpa"
    length = prefix.length
    if none_is_causal and call.is_causal:
        # what sdpa's `is_causal` stands for: its diagonal starts at the top left
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if prefix.mask is not None and mask is None:
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
    if mask is not None:
        mask = _widen(mask, length, prefix.mask)
        if not none_is_causal and mask.dtype == torch.bool and prefix.mask is not None:
            mask = finite_additive(mask, query.dtype)
    if kwargs.get("position_bias") is not None:
        bias = kwargs["position_bias"]
        kwargs["position_bias"] = torch.cat([bias.new_zeros(*bias.shape[:-1], length), bias], dim=-1)
    if prefix.reads != "rotated":
        # one product for both: each key is zero where the other queries stand
        kwargs["scaling"] = call.scale
        query = prefix_query if prefix.reads == "both" else torch.cat([query, prefix_query], dim=-1)
        key, prefix = nn.functional.pad(key, (0, key.shape[-1])), prefix.for_both_queries()
    key, value = _with_prefix(prefix, key, value)
    return attend(module, query, key, value, mask, **kwargs)


def concatenated_flash_attention(attend: AttentionFunction, call: AttentionCall) -> AttentionOutput:
    """
    Like [`concatenated_attention`], for a prefix that reads rotated queries and an `attend` that takes a 2-D padding
    mask, (batch, kv_tokens). Flash attention aligns the queries with the last keys, so every query sees additional
    keys at the front.
    """
    _, _, module, query, key, value, padding, prefix, _, kwargs = call
    batch, length = key.shape[0], prefix.length
    if prefix.mask is not None and padding is None:
        padding = torch.ones(batch, key.shape[2], dtype=torch.bool, device=key.device)
    if padding is not None:
        columns = padding.new_ones(batch, length) if prefix.mask is None else prefix.mask.to(padding.dtype)
        padding = torch.cat([columns, padding], dim=-1)
    key, value = _with_prefix(prefix, key, value)
    return attend(module, query=query, key=key, value=value, attention_mask=padding, **kwargs)


def _with_prefix(prefix: Prefix, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a prefix before keys and values (batch, kv_heads, kv_tokens, dim)."""
    batch = key.shape[0]
    return (
        torch.cat([prefix.key.expand(batch, -1, -1, -1), key], dim=2),
        torch.cat([prefix.value.expand(batch, -1, -1, -1), value], dim=2),
    )


def _widen(mask: torch.Tensor, length: int, prefix_mask: torch.Tensor | None) -> torch.Tensor:
    """Put `length` visible columns before those of a mask (batch, heads, tokens, kv_tokens)."""
    is_bool = mask.dtype == torch.bool
    if prefix_mask is None:
        shape = (*mask.shape[:-1], length)
        columns = mask.new_ones(shape) if is_bool else mask.new_zeros(shape)
    else:
        columns = prefix_mask[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
        columns = columns if is_bool else finite_additive(columns, mask.dtype)
        mask = mask.expand(columns.shape[0], -1, -1, -1)
    return torch.cat([columns, mask], dim=-1)
