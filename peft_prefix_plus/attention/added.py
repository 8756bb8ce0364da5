"""The term that a gated or decoupled prefix adds to the base model's attention."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from .prefix import Prefix


DECOUPLED_CAP = 6.0
"""What the scores of a decoupled prefix approach and never exceed. Measured: docs/quality.md."""


def added_attention(query: torch.Tensor, prefix: Prefix, scaling: float | None) -> torch.Tensor:
    """
    The term that a prefix outside the real tokens' softmax adds to the base model's attention.

        with a gate:  tanh(gate) · softmax(s · Q P_Kᵀ) P_V          decoupled:  silu(cap(s · Q P_Kᵀ)) P_V

    See LLaMA-Adapter (arXiv 2303.16199), section 3.2, and PrefixMemory-Tuning (arXiv 2506.13674), which takes the
    prefix out of the softmax as well. Without a softmax only the cap bounds a score: cap(x) = c · tanh(x / c), with c
    = [`DECOUPLED_CAP`], keeps a sink's queries, or a single outlier dim, from making the added term arbitrarily large.

    Args:
        query: The queries that the prefix reads, (batch, query_heads, tokens, key_dim).
        prefix: A prefix that is not joint.
        scaling: s; `None` means key_dim ** -0.5.

    Returns:
        Shape (batch, tokens, query_heads, value_dim).
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, _, value_dim = prefix.value.shape[-3:]
    key, value = prefix.key, prefix.value
    if prefix.is_of_rows:
        # (batch · kv_heads, groups · tokens, key_dim)
        rows = query.reshape(batch * kv_heads, heads // kv_heads * tokens, dim)
        key, value = key.flatten(0, 1), value.flatten(0, 1)
    else:
        # (products, heads of a product · batch · tokens, key_dim): one product for each query head reads the queries of
        # a text as they lie in memory, one for a group of heads needs no copies of the keys, which count for one token
        together = heads // kv_heads if tokens == 1 else 1
        rows = query.view(batch, heads // together, together, tokens, dim).permute(1, 2, 0, 3, 4).flatten(1, 3)
        if rows.shape[0] > kv_heads:
            key, value = (each.repeat_interleave(heads // kv_heads, dim=0) for each in (key, value))
    attended = torch.bmm(_weights(rows, key, prefix, scaling), value)
    if prefix.is_of_rows:
        attended = attended.view(batch, heads, tokens, value_dim).transpose(1, 2)
    else:
        attended = attended.view(heads, batch, tokens, value_dim).permute(1, 2, 0, 3)
    if prefix.gate is not None:
        gate = prefix.gate.tanh()[..., None]
        attended = attended * (gate[:, None] if prefix.is_of_rows else gate)
    return attended


def add_attention(output: torch.Tensor, query: torch.Tensor, prefix: Prefix, scaling: float | None) -> torch.Tensor:
    """
    Return the output of the base model's attention, (batch, tokens, query_heads, value_dim), plus [`added_attention`], which
    is added in place where nothing has to remember the output without it.
    """
    if not _may_be_overwritten(output, query, prefix):
        return output + added_attention(query, prefix, scaling).reshape(output.shape)
    batch, _, tokens, dim = query.shape
    if batch == tokens == 1 and prefix.is_decoupled and not prefix.is_of_rows:
        # decoding notices each operation: the product of weights and values is added without another
        kv_heads, _, value_dim = prefix.value.shape
        weights = _weights(query.reshape(kv_heads, -1, dim), prefix.key, prefix, scaling)
        output.view(kv_heads, -1, value_dim).baddbmm_(weights, prefix.value)
    else:
        attended = added_attention(query, prefix, scaling)
        output.view(attended.shape).add_(attended)
    return output


def _may_be_overwritten(output: torch.Tensor, query: torch.Tensor, prefix: Prefix) -> bool:
    """Whether nothing differentiates, traces or transforms the output, and it can be written to as it lies in memory."""
    return (
        not torch.is_grad_enabled()
        and isinstance(query.shape[0], int)  # torch.jit traces a tensor
        and output.dtype == prefix.value.dtype
        and output.is_contiguous()
        and not torch._C._are_functorch_transforms_active()
    )


def _weights(rows: torch.Tensor, key: torch.Tensor, prefix: Prefix, scaling: float | None) -> torch.Tensor:
    """What queries (products, queries, key_dim) give to each value, in the values' dtype, (products, queries, prefix_tokens)."""
    scale = rows.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.bmm(rows, key.transpose(1, 2))
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    weights = _capped_silu(scores, scale) if prefix.gate is None else _softmax(scores * scale, prefix.mask)
    return weights if weights.dtype == prefix.value.dtype else weights.to(prefix.value.dtype)


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax over the positions that a row sees; with a mask, scores are (batch · kv_heads, queries, prefix_tokens)."""
    if mask is not None:
        hidden = ~mask[:, None, None, :]
        scores = scores.view(mask.shape[0], -1, *scores.shape[1:]).masked_fill(hidden, -torch.inf).flatten(0, 1)
    return scores.softmax(dim=-1)


def _capped_silu(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """silu(cap(s · x)); without gradients it overwrites x, because decoding notices each operation."""
    if not torch.is_grad_enabled():
        return silu(scores.mul_(scale / DECOUPLED_CAP).tanh_().mul_(DECOUPLED_CAP), inplace=True)
    return silu((scores * (scale / DECOUPLED_CAP)).tanh() * DECOUPLED_CAP)
