"""
Prefixes of all layers turned to the position of a query at once, which is cheaper than undoing the rotation in every
layer.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from .prefix import Prefix
from .rotary import PositionEmbeddings, QueryRotation


MAX_POSITIONS = 4
"""For how many position embeddings prefixes are kept: models have as many as kinds of layers, for instance with another base."""


class _Turned(NamedTuple):
    """What was turned to one position."""

    carrier: torch.Tensor  # which keeps its id from being given to another
    version: int
    batch: int
    prefixes: dict[Hashable, Prefix]


class TurnedPrefixes:
    """
    The prefixes of layers that read unrotated queries and have one shape, each turned to the position of a single query.

    A prefix p scores an unrotated query as the prefix R p scores the query rotated by R. Decoding has one position for
    all layers, so three operations on small tensors turn the keys of all layers. Undoing the rotation of the queries
    would take as many in every layer.

    Args:
        rotation (`QueryRotation`): How the layers rotate their queries.
    """

    def __init__(self, rotation: QueryRotation) -> None:
        self._rotation = rotation
        self._prefixes: dict[Hashable, Prefix] = {}
        self._stacked: torch.Tensor | None = None
        self._turned: list[_Turned] = []
        self._num_asked = self._num_turned = 0
        self._has_given_up = False

    def add(self, owner: Hashable, prefix: Prefix) -> Prefix:
        """Add a prefix to the turned ones, in place of the owner's last one, and return it with `turned` set."""
        prefix = self._prefixes[owner] = replace(prefix, turned=partial(self.at, owner))
        self._stacked = None
        self._turned.clear()
        return prefix

    def at(self, owner: Hashable, positions: PositionEmbeddings, batch: int) -> Prefix | None:
        """
        Return the prefix of a layer for queries (batch, query_heads, 1, key_dim) as they enter attention.

        `None` if this would cost more than undoing the queries' rotation, because the rows are at different positions,
        or the layers get different position embeddings.
        """
        self._num_asked += 1
        carrier = positions if isinstance(positions, torch.Tensor) else positions[0]
        version = 0 if carrier.is_inference() else carrier._version
        for turned in self._turned:
            if turned.carrier is carrier and turned.version == version and turned.batch == batch:
                return turned.prefixes[owner]
        self._has_given_up = self._has_given_up or 2 * self._num_turned > self._num_asked + MAX_POSITIONS
        if carrier.shape[0] != 1 or self._has_given_up:
            return None
        self._num_turned += 1
        turned = _Turned(carrier, version, batch, self._turn(positions, batch))
        self._turned = [turned, *self._turned[: MAX_POSITIONS - 1]]
        return turned.prefixes[owner]

    def _turn(self, positions: PositionEmbeddings, batch: int) -> dict[Hashable, Prefix]:
        if self._stacked is None:
            self._stacked = torch.stack([prefix.key for prefix in self._prefixes.values()])
        keys = self._rotation.follow(self._stacked, positions)
        rows: Any = keys.unsqueeze(1).expand(-1, batch, -1, -1, -1).unbind()
        pairs = zip(self._prefixes.items(), keys.unbind(), rows, strict=True)
        return {owner: prefix.turned_to(key, of_rows) for (owner, prefix), key, of_rows in pairs}
