"""The protocol between attention and the module that holds the prefixes."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .config_view import registered_name
from .prefix import ActivePrefixes
from .rotary import PositionEmbeddings


class PrefixHolder(Protocol):
    """
    Holds the prefixes of one attention module.

    It is a child of the module. The child's name is the name of the attention function that reads the prefix: the one
    given to the module's view of its config or, if a module computes attention itself, to [`follow`].

    Attributes:
        eager_attention (`AttentionFunction`): The eager attention function of the file of a module that calls the attention
            interface; `None` for others.
    """

    eager_attention: Any

    def has_prefix(self) -> bool:
        """Whether a prefix takes part in the next forward. Asked only where a module computes attention itself."""
        ...

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> ActivePrefixes:
        """
        Return the prefixes of a forward: the joint one, or `None`, and those that are added to attention.

        Args:
            key (`torch.Tensor`): The real keys, (batch, kv_heads, kv_tokens, key_dim): their dtype and device count.
            value (`torch.Tensor`): The real values, (batch, kv_heads, kv_tokens, value_dim).
        """
        ...

    def queries(self, query: torch.Tensor, reads: str, positions: PositionEmbeddings | None) -> torch.Tensor:
        """
        Return the queries that a prefix reads, shaped as `query`, or twice as wide for `"both"`.

        Args:
            query (`torch.Tensor`): The queries as they enter attention, (batch, query_heads, tokens, key_dim).
            reads (`str`): See [`Prefix`].
            positions (`PositionEmbeddings`, *optional*): What they were rotated by.
        """
        ...


def holder_of(module: Any) -> PrefixHolder:
    """Return the [`PrefixHolder`] of a module that calls the attention interface."""
    # `module.name` would be a search in Python that ends in `_modules`: this runs for every token and layer
    return module._modules[registered_name(module)]
