"""Attention with a prefix, by concatenation: the exact way that serves wherever the base implementation does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .call import AttentionFunction, AttentionOutput
from .masks import finite_additive, is_causal_call
from .prefix import Prefix


def concatenated_attention(
    attend: AttentionFunction,
    none_is_causal: bool,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prefix: Prefix,
    prefix_query: torch.Tensor,
    **kwargs: Any,
) -> AttentionOutput:
    """
    softmax(s · Q [P_K ; K]ᵀ + mask) [P_V ; V], through the base model's own attention function.

    Every query sees every prefix position, whatever the mask says of the real tokens.

    Args:
        attend: The base model's attention function.
        none_is_causal: Whether `attend` takes a missing mask to mean causal attention, where the module is causal.
        module: The attention module.
        query: Shape (batch, query_heads, tokens, key_dim).
        key: Shape (batch, kv_heads, kv_tokens, key_dim).
        value: Shape (batch, kv_heads, kv_tokens, value_dim).
        attention_mask: Shape (1 or batch, 1 or query_heads, tokens, kv_tokens), bool or additive, or `None`.
        prefix: The prefix, a joint one.
        prefix_query: The queries that it reads, (batch, query_heads, tokens, key_dim or 2 · key_dim).
        kwargs: Passed on. A `position_bias` is zero for the prefix.

    Returns:
        What `attend` returns: the output, (batch, tokens, query_heads, value_dim), and the attention weights, (batch,
        query_heads, tokens, prefix_tokens + kv_tokens), or `None`.
    """
    batch, length = key.shape[0], prefix.key.shape[1]
    if attention_mask is None and none_is_causal:
        attention_mask = _implied_causal_mask(module, query, key, kwargs.get("is_causal"))
    if prefix.mask is not None and attention_mask is None:
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
    if attention_mask is not None:
        attention_mask = _widen(attention_mask, length, prefix.mask)
        if not none_is_causal and attention_mask.dtype == torch.bool and prefix.mask is not None:
            attention_mask = finite_additive(attention_mask, query.dtype)
    if kwargs.get("position_bias") is not None:
        bias = kwargs["position_bias"]
        kwargs["position_bias"] = torch.cat([bias.new_zeros(*bias.shape[:-1], length), bias], dim=-1)
    if prefix.reads != "rotated":
        # one product for both: each key is zero where the other queries stand
        if kwargs.get("scaling") is None:
            kwargs["scaling"] = query.shape[-1] ** -0.5
        query = prefix_query if prefix.reads == "both" else torch.cat([query, prefix_query], dim=-1)
        key, prefix = nn.functional.pad(key, (0, key.shape[-1])), prefix.for_both_queries()
    key = torch.cat([prefix.key.expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([prefix.value.expand(batch, -1, -1, -1), value], dim=2)
    return attend(module, query, key, value, attention_mask, **kwargs)


def concatenated_flash_attention(
    attend: AttentionFunction,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    prefix: Prefix,
    **kwargs: Any,
) -> AttentionOutput:
    """
    As [`concatenated_attention`], for a prefix that reads rotated queries and an `attend` that takes a 2-D mask of padding,
    (batch, kv_tokens).

    Its queries are the last of the keys, so that more keys before them are seen by all.
    """
    batch, length = key.shape[0], prefix.key.shape[1]
    if prefix.mask is not None and padding is None:
        padding = torch.ones(batch, key.shape[2], dtype=torch.bool, device=key.device)
    if padding is not None:
        columns = padding.new_ones(batch, length) if prefix.mask is None else prefix.mask.to(padding.dtype)
        padding = torch.cat([columns, padding], dim=-1)
    key = torch.cat([prefix.key.expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([prefix.value.expand(batch, -1, -1, -1), value], dim=2)
    return attend(module, query=query, key=key, value=value, attention_mask=padding, **kwargs)


def _implied_causal_mask(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, is_causal: bool | None
) -> torch.Tensor | None:
    """
    The mask (1, 1, tokens, kv_tokens) that sdpa's `is_causal` stands for (its diagonal starts at the top left), or
    `None` where all is seen.
    """
    tokens, kv_tokens = query.shape[2], key.shape[2]
    if tokens == 1 or not is_causal_call(module, is_causal):
        return None
    return torch.ones(1, 1, tokens, kv_tokens, dtype=torch.bool, device=query.device).tril()


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
