"""What a prefix that has a softmax of its own, or none, adds to the base model's attention."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from .prefix import Prefix


DECOUPLED_CAP = 6.0
"""What the scores of a decoupled prefix approach and never exceed. Measured: docs/quality.md."""


def added_attention(query: torch.Tensor, prefix: Prefix, scaling: float | None) -> torch.Tensor:
    """
    What a prefix that does not share a softmax with the real tokens adds to the base model's attention.

        with a gate:  tanh(gate) · softmax(s · Q P_Kᵀ) P_V          decoupled:  silu(cap(s · Q P_Kᵀ)) P_V

    See LLaMA-Adapter (arXiv 2303.16199), section 3.2, and PrefixMemory-Tuning (arXiv 2506.13674), which takes the prefix out of
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
    weights = _capped_silu(scores) if prefix.gate is None else scores.softmax(dim=-1)
    attended = (weights.to(query.dtype) @ prefix.value.unsqueeze(1)).flatten(1, 2)
    if prefix.gate is not None:
        attended = attended * prefix.gate.tanh()[None, :, None, None]
    if prefix.mask is not None:
        # such an adapter is the whole of a row's prefix or no part of it
        attended = attended * prefix.mask.any(dim=-1)[:, None, None, None]
    return attended.transpose(1, 2)


def _capped_silu(scores: torch.Tensor) -> torch.Tensor:
    return silu((scores / DECOUPLED_CAP).tanh() * DECOUPLED_CAP)
