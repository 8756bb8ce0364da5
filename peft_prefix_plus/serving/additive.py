"""
Prefixes that are added to the output of vLLM's attention: the decoupled and the gated form.

The added term needs only the queries and their positions, so nothing of it is cached and no token precedes the prompt. The first cache
block of a row identifies its prefix: the hash of a block contains a salt of the prefix, so only requests of one prefix can share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..attention import Prefix, QueryRotation
from ..attention.added import added_attention
from .store import Turning


@dataclass(frozen=True)
class AddedPrefix:
    """
    An additive prefix on one worker.

    Attributes:
        layers (`Mapping[int, Prefix]`): The heads of this worker, by layer. Layers without a prefix are left out.
        turning (`Turning`, *optional*): The rotation to undo in the queries.
    """

    layers: Mapping[int, Prefix]
    turning: Turning | None


@dataclass(frozen=True)
class Share:
    """
    The tokens of a batch that share a prefix.

    Attributes:
        prefix (`AddedPrefix`): The prefix.
        tokens (`torch.Tensor`): The indices of these tokens in the batch.
        embeddings (`tuple`, *optional*): Cosines and sines of their positions, (1, tokens, planes) each, if there is a rotation to
            undo.
    """

    prefix: AddedPrefix
    tokens: torch.Tensor
    embeddings: tuple[torch.Tensor, torch.Tensor] | None


class AddedPrefixes:
    """
    The additive prefixes of the requests on one worker.

    Args:
        load (`Callable[[str], AddedPrefix]`): Returns the prefix of a digest.
    """

    def __init__(self, load: Callable[[str], AddedPrefix]) -> None:
        self._load = load
        self._by_first_block: dict[int, str] = {}
        self._shares: tuple[Any, list[Share]] = (None, [])

    def admit(self, first_blocks: Mapping[int, str | None]) -> None:
        """
        Record the prefixes of the requests that a step adds to the batch.

        Args:
            first_blocks (`Mapping[int, str | None]`): The digest of each request's prefix, or `None`, by the request's first block.
        """
        self._shares = (None, [])
        for block, digest in first_blocks.items():
            if digest is None:
                self._by_first_block.pop(block, None)
            else:
                self._by_first_block[block] = digest

    def follow(self, layers: Mapping[int, Any]) -> None:
        """Make vLLM's attention layers add the prefixes of a batch's rows."""
        for index, layer in layers.items():
            layer.impl.forward = self._followed(index, layer.impl)

    def _followed(self, index: int, implementation: Any) -> Callable[..., Any]:
        attend = implementation.forward

        def forward(
            layer: Any, query: torch.Tensor, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, **kwargs: Any
        ) -> Any:
            result = attend(layer, query, key, value, kv_cache, attn_metadata, **kwargs)
            if attn_metadata is not None and self._by_first_block:
                for share in self._shares_of(attn_metadata, query):
                    _add(share, index, implementation.scale, query, kwargs["output"])
            return result

        return forward

    def _shares_of(self, attn_metadata: Any, query: torch.Tensor) -> list[Share]:
        """Return the tokens of each prefix in a batch, computed once for all layers."""
        if self._shares[0] is not attn_metadata:
            self._shares = (attn_metadata, list(self._find_shares(attn_metadata, query)))
        return self._shares[1]

    def _find_shares(self, attn_metadata: Any, query: torch.Tensor) -> list[Share]:
        starts = attn_metadata.query_start_loc.tolist()
        first_blocks = attn_metadata.block_table[: len(starts) - 1, 0].tolist()
        lengths = attn_metadata.seq_lens.tolist()
        rows: dict[str, list[int]] = {}
        for row, block in enumerate(first_blocks):
            if block in self._by_first_block and starts[row + 1] > starts[row]:
                rows.setdefault(self._by_first_block[block], []).append(row)
        shares = []
        for digest, own in rows.items():
            prefix = self._load(digest)
            tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in own])
            # a row's last query is at the end of its sequence
            offsets = [torch.full((starts[row + 1] - starts[row],), lengths[row] - starts[row + 1]) for row in own]
            positions = tokens + torch.cat(offsets)
            embeddings = None if prefix.turning is None else _embeddings(prefix.turning, positions, query.device)
            shares.append(Share(prefix, tokens.to(query.device), embeddings))
        return shares


def _embeddings(turning: Turning, positions: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions.double()[:, None] * torch.tensor(turning.frequencies, dtype=torch.float64)
    cos, sin = angles.cos() * turning.factor, angles.sin() * turning.factor
    return cos[None].float().to(device), sin[None].float().to(device)


def _add(share: Share, index: int, scale: float, query: torch.Tensor, output: torch.Tensor) -> None:
    """
    Add a prefix to the output of one layer's attention, in place.

    Args:
        share (`Share`): The prefix and its tokens.
        index (`int`): The layer.
        scale (`float`): s, the factor on the products of queries and keys.
        query (`torch.Tensor`): The batch's queries as they enter attention, (tokens, query_heads, key_dim).
        output (`torch.Tensor`): The output of attention, (tokens, query_heads, value_dim).
    """
    prefix = share.prefix.layers.get(index)
    if prefix is None:
        return
    read = query.view(-1, *query.shape[-2:])[share.tokens].transpose(0, 1)[None]  # (1, heads, tokens, dim)
    turning = share.prefix.turning
    if turning is not None and index in turning.layers:
        assert share.embeddings is not None
        rotation = QueryRotation(turning.is_interleaved, "once", turning.is_clockwise, turning.is_last)
        read = rotation.undo(read, share.embeddings)
    added = added_attention(read, prefix, scale)[0]  # (tokens, heads, dim)
    output.index_add_(0, share.tokens, added.to(output.dtype))
