"""What a prefix must know of an attention module."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..attention import (
    QueryRotation,
)
from ..encoders import KVShape


@dataclass(frozen=True)
class AttentionGeometry:
    """
    What a prefix must know of an attention module.

    Attributes:
        kind (`str`): `"self"`, or in an encoder-decoder model `"encoder"` (its self-attention) or `"cross"`.
        shape (`KVShape`): Heads and dims of its keys and values.
        num_query_heads (`int`): Heads of its queries.
        scale (`float`): s, the factor on the products of queries and keys.
        query (`torch.Tensor`): The queries of some tokens of the vocabulary, (query_heads, tokens, key_dim).
        key (`torch.Tensor`): The keys of some tokens of the vocabulary, (kv_heads, tokens, key_dim).
        value (`torch.Tensor`): Their values, (kv_heads, tokens, value_dim).
        rotation (`QueryRotation`, *optional*): How it rotates its queries by their positions (RoPE), if it does.
        obstacle (`str`, *optional*): Why the rotation of its queries cannot be undone, if it cannot.
        unrotated_query (`torch.Tensor`): `query` before its rotation.
        unrotated_key (`torch.Tensor`): `key` before its rotation, if keys and queries are of the same tokens.
    """

    kind: str
    shape: KVShape
    num_query_heads: int
    scale: float
    query: torch.Tensor = field(repr=False, compare=False)
    key: torch.Tensor = field(repr=False, compare=False)
    value: torch.Tensor = field(repr=False, compare=False)
    rotation: QueryRotation | None
    obstacle: str | None
    unrotated_query: torch.Tensor = field(repr=False, compare=False)
    unrotated_key: torch.Tensor = field(repr=False, compare=False)


def spread(states: torch.Tensor) -> float:
    """
    The standard deviation of a token's numbers: the median over the tokens.

    Not over all numbers at once, because in many language models the keys and values of a text's first tokens have a
    different magnitude.

    Args:
        states (`torch.Tensor`): Keys or values, (kv_heads, tokens, dim).

    Returns:
        `float`: The spread; 1 for tensors on the meta device, and where there is none.
    """
    if states.is_meta:
        return 1.0
    std = states.transpose(0, 1).flatten(1).float().std(dim=-1).median().item()
    return std if 0.0 < std < float("inf") else 1.0
