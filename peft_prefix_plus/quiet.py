"""
The quiet start of a prefix that shares a softmax with the real tokens: it takes part, and changes nothing yet.

A pretrained model's scores are far from standard normal. A few dims carry most of a query's norm, and keys of the module's
own size at random places draw up to 0.99 of the attention: training would first have to repair the model. So keys start
where the module's queries pass over them:

    p_i = o + n_i        share of the attention = Σ_i exp(s q·p_i) / (Σ_i exp(s q·p_i) + Σ_j exp(s q·k_j))

The noise n_i spreads the scores of each key by about one nat, the same in all dims: keys that lie close together learn
slowly. The offset o, one vector for each key/value head, lies against the mean queries of its query heads, just as far out as
the share wants.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from .encoders import PrefixEncoder
from .geometry import AttentionGeometry


QUIET_SHARE = 5e-4
"""The share λ of the attention that falls on a prefix at its start: the mean of -log(1 - λ) over the queries of the probe."""

SPREAD = 1.0
"""The standard deviation of a key's scores over those queries, in nats."""

HULL_STEPS = 100
"""How many steps are taken to the point of a convex hull that is nearest to zero."""

LEAST_ENERGY = 0.1
"""The least that a dim of the queries counts, relative to their root mean square."""


def key_units(geometry: AttentionGeometry, is_position_free: bool) -> torch.Tensor:
    """
    The standard deviation in each dim with which random keys have scores of standard deviation 1 and no dim outweighs another.

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
    Move the keys of an adapter, which are random, to where the queries of each attention module pass over them.

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
        spreads = torch.stack([_scores(queries[name], _keys(encoders[name])).std(dim=(1, 2, 3)) for name in names])
        factors = (SPREAD / spreads.amax(dim=0)).nan_to_num(nan=1.0, posinf=1.0)
        encoders[names[0]].spread_keys(factors)
    for name, encoder in encoders.items():
        offset = quiet_offset(queries[name], _attention_sums(geometries[name]), _keys(encoder))
        encoder.shift_keys(offset / encoder.scaling.values[0].item())


def quiet_offset(queries: torch.Tensor, lse: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """
    Find what to add to keys so that little attention falls on them.

    The direction is that in which the scores fall for all query heads of a group: against the point of their mean queries'
    convex hull that is nearest to zero. Along it the first place is taken where -log(1 - λ) is [`QUIET_SHARE`] on average, λ
    being the share of the attention; or, where the queries have no direction in common, the one where it is least. That is
    λ itself where it is small, and keeps a few queries from giving themselves up to the prefix for the others' sake.

    Args:
        queries (`torch.Tensor`): s · Q of the query heads of each group, (kv_heads, group, tokens, key_dim), float64.
        lse (`torch.Tensor`): The log-sum-exp of each query's scores over the real keys, (kv_heads, group, tokens).
        keys (`torch.Tensor`): The keys, (kv_heads, tokens, key_dim), float64.

    Returns:
        `torch.Tensor`: Shape (kv_heads, key_dim); zero where the numbers are not finite.
    """
    mean = nearest_to_zero(queries.mean(dim=2))
    direction = -mean / mean.square().sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    if not bool(direction.isfinite().all() and lse.isfinite().all()):
        return torch.zeros_like(direction)
    along = (queries @ direction[:, None, :, None])[..., 0]
    drawn = _scores(queries, keys).logsumexp(dim=-1) - lse
    distances = torch.cat([torch.zeros(1), torch.logspace(-1, 2, 121)]).to(queries.dtype)
    losses = F.softplus(drawn[..., None] + along[..., None] * distances).mean(dim=(1, 2))  # (kv_heads, distances)
    is_quiet = losses <= QUIET_SHARE
    first = is_quiet.int().argmax(dim=-1)
    chosen = torch.where(is_quiet.any(dim=-1), first, losses.argmin(dim=-1))
    return direction * distances[chosen][:, None]


def nearest_to_zero(points: torch.Tensor) -> torch.Tensor:
    """
    Find the point of each convex hull that is nearest to zero, by the method of Frank and Wolfe.

    Args:
        points (`torch.Tensor`): The points that span the hulls, (hulls, points, dim).

    Returns:
        `torch.Tensor`: Shape (hulls, dim).
    """
    nearest = points.mean(dim=1)
    for _ in range(HULL_STEPS):
        products = (points @ nearest[..., None])[..., 0]
        corner = points[torch.arange(len(points)), products.argmin(dim=1)]
        to_corner = corner - nearest
        length = to_corner.square().sum(dim=-1).clamp(min=torch.finfo(points.dtype).tiny)
        step = (-(nearest * to_corner).sum(dim=-1) / length).clamp(0.0, 1.0)
        nearest = nearest + step[:, None] * to_corner
    return nearest


def _scaled_queries(geometry: AttentionGeometry, is_position_free: bool) -> torch.Tensor:
    """s · Q as the prefix meets it, (kv_heads, query heads of a group, tokens, key_dim), in float64 on the CPU."""
    query = geometry.unrotated_query if is_position_free else geometry.query
    return query.unflatten(0, (geometry.shape.num_heads, -1)).cpu().double() * geometry.scale


def _attention_sums(geometry: AttentionGeometry) -> torch.Tensor:
    """The log-sum-exp of each query's scores over the real keys, (kv_heads, query heads of a group, tokens)."""
    return _scores(_scaled_queries(geometry, False), geometry.key.cpu().double()).logsumexp(dim=-1)


def _keys(encoder: PrefixEncoder) -> torch.Tensor:
    return encoder()[0].cpu().double()


def _scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores (kv_heads, group, tokens, keys) of scaled queries for keys (kv_heads, keys, key_dim)."""
    return queries @ keys.transpose(1, 2)[:, None]
