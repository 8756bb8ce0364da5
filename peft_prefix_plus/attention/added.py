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
    scale = dim**-0.5 if scaling is None else scaling
    # all rows of a group of heads have to do with the same keys: (kv_heads, groups · batch · tokens, key_dim)
    kv_heads, _, value_dim = prefix.value.shape
    rows = query.view(batch, kv_heads, heads // kv_heads, tokens, dim).permute(1, 2, 0, 3, 4).flatten(1, 3)
    scores = torch.bmm(rows, prefix.key.transpose(1, 2))
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    weights = _capped_silu(scores, scale) if prefix.gate is None else (scores * scale).softmax(dim=-1)
    if weights.dtype != prefix.value.dtype:
        weights = weights.to(prefix.value.dtype)
    attended = torch.bmm(weights, prefix.value).view(heads, batch, tokens, value_dim).permute(1, 2, 0, 3)
    if prefix.gate is not None:
        attended = attended * prefix.gate.tanh()[:, None]
    if prefix.mask is not None:
        # such an adapter is the whole of a row's prefix or no part of it
        attended = attended * prefix.mask.any(dim=-1)[:, None, None, None]
    return attended


def _capped_silu(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """silu(cap(s · x)): decoding notices each operation."""
    return silu((scores * (scale / DECOUPLED_CAP)).tanh() * DECOUPLED_CAP)
