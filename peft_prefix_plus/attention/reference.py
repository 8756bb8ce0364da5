"""Attention with a prefix, by concatenation: the exact way that serves wherever the base implementation does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from .prefix import Prefix


DECOUPLED_CAP = 6.0
"""What the scores of a decoupled prefix approach and never exceed. Measured: docs/quality.md."""

AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]


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


def is_causal_call(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether sdpa takes a missing mask to mean causal attention: by the call's argument, else by the module."""
    return bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))


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


def finite_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a mask, bool or additive, into an additive one whose masked positions have the lowest finite number."""
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask.to(dtype).clamp(min=lowest)


def added_attention(query: torch.Tensor, prefix: Prefix, scaling: float | None) -> torch.Tensor:
    """
    What a prefix that does not share a softmax with the real tokens adds to the base model's attention.

        with a gate:  tanh(gate) · softmax(s · Q P_Kᵀ) P_V          decoupled:  silu(cap(s · Q P_Kᵀ)) P_V

    See LLaMA-Adapter (arXiv 2303.16199), section 3.2, and Prefix-Tuning+ (arXiv 2506.13674), which takes the prefix out of
    the softmax as well. Without a softmax a score has no bound: cap(x) = c · tanh(x / c), with c = [`DECOUPLED_CAP`], keeps the
    queries of a sink, or of one outlying dim, from growing what is added without end.

    Args:
        query: The queries that the prefix reads, (batch, query_heads, tokens, key_dim).
        prefix: A prefix that is not joint.
        scaling: s; `None` means key_dim ** -0.5.

    Returns:
        Shape (batch, tokens, query_heads, value_dim).
    """
    grouped = query.unflatten(1, (prefix.key.shape[0], -1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = grouped @ prefix.key.unsqueeze(1).transpose(-1, -2) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if prefix.gate is None:
        weights = silu((scores / DECOUPLED_CAP).tanh() * DECOUPLED_CAP)
    else:
        weights = scores.softmax(dim=-1)
    attended = (weights.to(query.dtype) @ prefix.value.unsqueeze(1)).flatten(1, 2)
    if prefix.gate is not None:
        attended = attended * prefix.gate.tanh()[None, :, None, None]
    if prefix.mask is not None:
        # such an adapter is the whole of a row's prefix or no part of it
        attended = attended * prefix.mask.any(dim=-1)[:, None, None, None]
    return attended.transpose(1, 2)
