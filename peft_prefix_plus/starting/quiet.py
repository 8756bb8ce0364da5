"""
The quiet start of a joint prefix: it takes part in the softmax, but changes almost nothing yet.

A pretrained model's scores are far from standard normal. A few dims carry most of a query's norm, and random keys of
the module's own size draw up to 0.99 of the attention, so training would first have to repair the model. So keys start
where the module's queries pay them little attention:

    p_i = o + n_i        share of the attention = Σ_i exp(s q·p_i) / (Σ_i exp(s q·p_i) + Σ_j exp(s q·k_j))

The noise n_i spreads the scores of each key by about one nat, with equal contributions of all dims, because keys that
lie close together learn slowly. The offset o, one vector per key/value head, makes the share the same in every query
head, because a head that scores the prefix far below the others would learn to use it late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional as F

from ..encoders import PrefixEncoder
from ..probing.geometry import AttentionGeometry


QUIET_SHARE = math.exp(-8.0)
"""The share of the attention that the mean query of each head gives the prefix at its start."""

LOUD = 10.0
"""How many times that share may fall on it on average before the queries count as having no direction in common."""

RIDGE = 0.01
"""How far mean queries of one group that are nearly alike may miss their shares, relative to their squared norm."""

SPREAD = 1.0
"""The standard deviation of a key's scores over those queries, in nats."""

LEAST_ENERGY = 0.1
"""The least that a dim of the queries counts, relative to their root mean square."""


def key_units(geometry: AttentionGeometry, is_position_free: bool) -> torch.Tensor:
    """
    The standard deviation in each dim that gives random keys scores of standard deviation 1 without one dim
    dominating.

    Args:
        geometry (`AttentionGeometry`): The attention module's geometry.
        is_position_free (`bool`): Whether the keys meet unrotated queries.

    Returns:
        `torch.Tensor`: Shape (kv_heads, key_dim), float64, on the CPU; ones for a model on the meta device.
    """
    if geometry.query.is_meta:
        return torch.ones(geometry.shape.num_heads, geometry.shape.key_dim, dtype=torch.float64)
    energy = _scaled_queries(geometry, is_position_free).square().mean(dim=(1, 2))
    least = energy.mean(dim=-1, keepdim=True) * LEAST_ENERGY**2
    units = (energy.maximum(least) * energy.shape[-1]).rsqrt()
    return units.nan_to_num(nan=1.0, posinf=1.0)


@torch.no_grad()
def start_quietly(
    encoders: Mapping[str, PrefixEncoder], geometries: Mapping[str, AttentionGeometry], is_position_free: bool
) -> None:
    """
    Move the random keys of an adapter to where the queries of each attention module pay them little attention.

    Args:
        encoders (`Mapping[str, PrefixEncoder]`): All encoders of the adapter, by module name.
        geometries (`Mapping[str, AttentionGeometry]`): The modules' geometries.
        is_position_free (`bool`): Whether the keys meet unrotated queries.
    """
    queries = {name: _scaled_queries(geometries[name], is_position_free) for name in encoders}
    sources: dict[torch.nn.Module, list[str]] = {}
    for name, encoder in encoders.items():
        sources.setdefault(encoder.key_source(), []).append(name)
    for names in sources.values():
        # where layers share what makes their keys, the one whose queries score them the most says how far they spread
        # about zero, which is the mean that the noise is drawn with: few keys do not show it
        scores = [_scores(queries[name], _keys(encoders[name])) for name in names]
        spreads = torch.stack([each.square().mean(dim=(1, 2, 3)).sqrt() for each in scores])
        factors = (SPREAD / spreads.amax(dim=0)).nan_to_num(nan=1.0, posinf=1.0)
        encoders[names[0]].spread_keys(factors)
    for name, encoder in encoders.items():
        offset = quiet_offset(queries[name], _attention_sums(geometries[name]), _keys(encoder))
        encoder.shift_keys(offset / encoder.scaling.values[0].item())


def quiet_offset(queries: torch.Tensor, lse: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """
    Find what to add to keys so that every query head gives them the same small share of its attention.

    It is the shortest vector that the mean query of each head of the group scores as far below the head's real keys as
    [`QUIET_SHARE`] says. If the queries of a head share no direction, this vector would be long, and some queries
    would score it high. Then its length minimizes the mean of -log(1 - λ) over the queries, where λ is the share.
    Minimizing the mean of λ itself would leave some queries entirely to the prefix, for the sake of the others.

    Args:
        queries (`torch.Tensor`): s · Q, (kv_heads, query heads of a group, tokens, key_dim), float64.
        lse (`torch.Tensor`): The log-sum-exp of each query's scores over the real keys, (kv_heads, heads, tokens).
        keys (`torch.Tensor`): The keys, (kv_heads, prefix_tokens, key_dim), float64.

    Returns:
        `torch.Tensor`: Shape (kv_heads, key_dim); zero where the numbers are not finite.
    """
    means = queries.mean(dim=2)
    wanted = lse.mean(dim=2) + math.log(QUIET_SHARE / keys.shape[1])
    if not bool(means.isfinite().all() and wanted.isfinite().all()):
        return torch.zeros_like(keys[:, 0])
    products = means @ means.transpose(1, 2)
    ridge = RIDGE * products.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=torch.finfo(products.dtype).tiny ** 0.5)
    products = products + ridge[:, None, None] * torch.eye(products.shape[1], dtype=products.dtype)
    offset = (torch.linalg.solve(products, wanted)[:, None] @ means)[:, 0]
    drawn = _scores(queries, keys).logsumexp(dim=-1) - lse
    along = (queries @ offset[:, None, :, None])[..., 0]
    lengths = torch.linspace(0.0, 1.0, 21, dtype=offset.dtype)
    log_odds = drawn[..., None] + along[..., None] * lengths  # of the share, (kv_heads, heads, tokens, lengths)
    is_loud = log_odds[..., -1].sigmoid().mean(dim=(1, 2)) > LOUD * QUIET_SHARE
    least = F.softplus(log_odds).mean(dim=(1, 2)).argmin(dim=-1)
    return offset * torch.where(is_loud, lengths[least], 1.0)[:, None]


def _scaled_queries(geometry: AttentionGeometry, is_position_free: bool) -> torch.Tensor:
    """
    s · Q as the prefix meets it, (kv_heads, query heads of a group, tokens, key_dim), in float64 on the CPU, of all
    tokens except the first, which in many language models is a sink with queries of a different magnitude.
    """
    query = geometry.unrotated_query if is_position_free else geometry.query
    query = query[:, 1:] if query.shape[1] > 1 else query
    return query.unflatten(0, (geometry.shape.num_heads, -1)).cpu().double() * geometry.scale


def _attention_sums(geometry: AttentionGeometry) -> torch.Tensor:
    """The log-sum-exp of each query's scores over the real keys, (kv_heads, query heads of a group, tokens)."""
    return _scores(_scaled_queries(geometry, False), geometry.key.cpu().double()).logsumexp(dim=-1)


def _keys(encoder: PrefixEncoder) -> torch.Tensor:
    """The keys that an encoder produces, (kv_heads, prefix_tokens, key_dim), in float64 on the CPU."""
    return encoder()[0].cpu().double()


def _scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The scores of keys (kv_heads, tokens, key_dim) by the queries of each group, (kv_heads, heads, queries, tokens)."""
    return queries @ keys.transpose(1, 2).unsqueeze(1)
