"""The arguments and results of an attention function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .masks import is_causal_call
from .prefix import Prefix


AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]


class AttentionCall(NamedTuple):
    """
    A call of an attention function by a module with a joint prefix.

    Attributes:
        implementation (`str`): The name of the implementation that computes attention over the real tokens.
        eager (`AttentionFunction`): The eager one of the module's own file.
        module (`nn.Module`): The attention module.
        query (`torch.Tensor`): Shape (batch, query_heads, tokens, key_dim).
        key (`torch.Tensor`): Shape (batch, kv_heads, kv_tokens, key_dim).
        value (`torch.Tensor`): Shape (batch, kv_heads, kv_tokens, value_dim).
        mask: As the implementation expects it.
        prefix (`Prefix`): The prefix.
        prefix_query (`torch.Tensor`): The queries that the prefix reads: the same tensor as `query`, the same queries
            without rotation, or both, (batch, query_heads, tokens, key_dim or 2 · key_dim).
        kwargs (`dict`): The further arguments, as the implementation expects them.
    """

    implementation: str
    eager: AttentionFunction
    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    prefix: Prefix
    prefix_query: torch.Tensor
    kwargs: dict[str, Any]

    @property
    def scale(self) -> float:
        """s, the factor on the scores."""
        scaling = self.kwargs.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    @property
    def is_causal(self) -> bool:
        """Whether sdpa lets a query see the key of its own index and those before it: only without a mask."""
        is_single = self.query.shape[2] == 1
        return self.mask is None and not is_single and is_causal_call(self.module, self.kwargs.get("is_causal"))
