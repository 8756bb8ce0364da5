"""What prefixes give to each query's attention: what is looked at, never what the model computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .added import added_attention
from .base import attention_family
from .call import AttentionOutput
from .config_view import model_config
from .dispatch import prefix_attention
from .holder import holder_of
from .masks import FlashMask, dense_flex_mask, is_causal_call
from .prefix import Prefix
from .rotary import POSITIONS
from .watching import unwatched


class Observation(NamedTuple):
    """
    What a module with prefixes computed in a call of attention:

        output = probabilities · P_V + (what the real tokens give) + Σ added

    Attributes:
        output (`torch.Tensor`): Shape (batch, query_heads, tokens, value_dim).
        prefix (`Prefix`, *optional*): The prefix that shares a softmax with the real tokens.
        probabilities (`torch.Tensor`, *optional*): Those of its positions in that softmax, (batch, query_heads, tokens,
            prefix_tokens).
        added (`tuple`): Every other prefix, with what it adds, (batch, query_heads, tokens, value_dim).
    """

    output: torch.Tensor
    prefix: Prefix | None
    probabilities: torch.Tensor | None
    added: tuple[tuple[Prefix, torch.Tensor], ...]


Observer = Callable[[Observation], None]
"""Called whenever a module with an active prefix computes attention."""

MAX_SCORES = 2**24
"""The most scores of real tokens that are held at a time: queries are taken in chunks."""


def observed_attention(
    observe: Observer,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> AttentionOutput:
    """[`prefix_attention`], telling an observer what the prefixes give."""
    with unwatched():
        output, weights = prefix_attention(module, query, key, value, attention_mask, **kwargs)
    positions = kwargs.pop(POSITIONS, None)
    holder = holder_of(module)
    prefix, added_prefixes = holder.forward(key, value)
    probabilities = None
    if prefix is not None:
        prefix_query = holder.queries(query, prefix.reads, positions)
        probabilities = probabilities_of_call(
            module, query, key, attention_mask, prefix, prefix_query, weights, kwargs
        )
    added = []
    for each in added_prefixes:
        attended = added_attention(holder.queries(query, each.reads, positions), each, kwargs.get("scaling"))
        added.append((each, attended.transpose(1, 2)))
    if prefix is not None or added:
        by_heads = output.reshape(output.shape[0], query.shape[2], query.shape[1], -1).transpose(1, 2)
        observe(Observation(by_heads, prefix, probabilities, tuple(added)))
    return output, weights


def probabilities_of_call(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    prefix: Prefix,
    prefix_query: torch.Tensor,
    weights: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """The prefix's probabilities in one call of the attention interface: from its weights, or by log-sum-exps."""
    name, length = type(module).__name__, prefix.key.shape[1]
    if weights is not None:
        if weights.shape[-1] != length + key.shape[2]:
            raise ValueError(
                f"The attention weights of {name} have {weights.shape[-1]} columns, expected {length} of the prefix and "
                f"{key.shape[2]} of the real tokens: the attention that falls on the prefix cannot be read from them. Try "
                "model.set_attn_implementation('sdpa')."
            )
        return weights[..., :length]
    family = attention_family(model_config(module)._attn_implementation)
    if family == "eager" or kwargs.get("cache") is not None:
        found = "returns no weights" if family == "eager" else "uses the paged cache of continuous batching"
        raise ValueError(
            f"The attention of {name} {found}, so what falls on the prefix cannot be told. Use another attention "
            "implementation or cache, for instance model.set_attn_implementation('sdpa')."
        )
    special: dict[str, Any] = {}
    if family == "flash":
        if mask is not None and mask.shape[-1] < key.shape[2]:
            key = key[:, :, : mask.shape[-1]]  # the unused rest of a static cache
        mask = FlashMask(query, key, is_causal_call(module, kwargs.get("is_causal")), mask, kwargs).dense()
        special = {"softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    elif family == "flex":
        mask = dense_flex_mask(mask, query, key)
    is_causal = mask is None and query.shape[2] > 1 and is_causal_call(module, kwargs.get("is_causal"))
    bias = kwargs.get("position_bias")
    return prefix_probabilities(
        query, key, prefix, prefix_query, mask, is_causal, kwargs.get("scaling"), bias, **special
    )


def prefix_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    prefix: Prefix,
    prefix_query: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float | None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    exp(s · Q P_Kᵀ - lse), with lse the log-sum-exp of a query's scores over [P ; X].

    Computed in float32 at least. Scores over the real tokens exist for a chunk of the queries at a time.

    Args:
        query: Shape (batch, query_heads, tokens, key_dim).
        key: Shape (batch, kv_heads, kv_tokens, key_dim).
        prefix: A joint prefix without a mask.
        prefix_query: The queries that it reads, (batch, query_heads, tokens, key_dim or 2 · key_dim).
        mask: Shape (1 or batch, 1 or query_heads, 1 or tokens, kv_tokens), bool or additive, or `None`; leading
            dimensions may be left out.
        is_causal: Whether a query sees the key of its own index and those before it.
        scaling: s; `None` means key_dim ** -0.5.
        position_bias: Shape (1 or batch, 1 or query_heads, 1 or tokens, kv_tokens); zero for the prefix.
        softcap: c, where a score x counts as c · tanh(x / c).
        sinks: Shape (query_heads,), a score that takes part in the softmax and has no value.

    Returns:
        Shape (batch, query_heads, tokens, prefix_tokens).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch, heads, tokens, _ = query.shape
    rows_at_a_time = max(1, MAX_SCORES // (max(batch, key.shape[0]) * heads * key.shape[2]))
    positions = torch.arange(key.shape[2], device=query.device)

    def scores_of(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        grouped = rows.unflatten(1, (keys.shape[1], -1)) @ keys.to(dtype).unsqueeze(2).transpose(-1, -2)
        scores = grouped.flatten(1, 2) * scale
        return scores if softcap is None else softcap * (scores / softcap).tanh()

    chunks = []
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, tokens, rows_at_a_time):
            chunk = slice(start, start + rows_at_a_time)
            rows = query[:, :, chunk].to(dtype)
            real_scores = scores_of(rows, key)
            if position_bias is not None:
                real_scores = real_scores + _of_rows(position_bias, tokens, chunk)[..., : key.shape[2]]
            if is_causal:
                is_later = positions[None, :] > torch.arange(tokens, device=query.device)[chunk, None]
                real_scores = real_scores.masked_fill(is_later, -torch.inf)
            if mask is not None:
                visible = _of_rows(mask, tokens, chunk)
                is_bool = visible.dtype == torch.bool
                real_scores = real_scores.masked_fill(~visible, -torch.inf) if is_bool else real_scores + visible
            lse = real_scores.logsumexp(dim=-1, keepdim=True)
            if sinks is not None:
                lse = torch.logaddexp(lse, sinks.to(lse).view(1, -1, 1, 1))
            prefix_scores = scores_of(prefix_query[:, :, chunk].to(dtype), prefix.key[None])
            lse = torch.logaddexp(lse, prefix_scores.logsumexp(dim=-1, keepdim=True))
            chunks.append((prefix_scores - lse).exp())
    return torch.cat(chunks, dim=2)


def _of_rows(mask: torch.Tensor, tokens: int, chunk: slice) -> torch.Tensor:
    """The rows of a mask or bias, (…, 1 or tokens, kv_tokens), that belong to a chunk of the queries, in four dimensions."""
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.expand(-1, -1, tokens, -1)[:, :, chunk]
