"""The masks of the attention implementations as dense masks, with a value for every query and key."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class FlashMask:
    """
    What flash attention lets each query see.

    Its 2-D mask says which tokens are padding. It derives the rest from lengths: queries align with the last keys, a
    window counts back from each query, and packed sequences do not see each other. A prefix concatenated before the
    keys would fall out of the window, or belong only to the first of the packed sequences. These cases need a dense
    mask.

    Args:
        query (`torch.Tensor`): Shape (batch, query_heads, tokens, key_dim).
        key (`torch.Tensor`): Shape (batch, kv_heads, kv_tokens, key_dim).
        is_causal (`bool`): Whether a query sees only keys up to its own position.
        padding (`torch.Tensor`, *optional*): The 2-D mask, (batch, kv_tokens), 0 for padding.
        kwargs (`dict`): The call's further arguments; read are `sliding_window`, `position_ids`, `cu_seq_lens_q` and
            `cu_seq_lens_k`.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        is_causal: bool,
        padding: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        self.batch, self.tokens, self.kv_tokens = query.shape[0], query.shape[2], key.shape[2]
        self.device = query.device
        self.is_causal, self.padding = is_causal, padding
        self.sliding_window: int | None = kwargs.get("sliding_window")
        self.query_starts: torch.Tensor | None = kwargs.get("cu_seq_lens_q")
        self.key_starts: torch.Tensor | None = kwargs.get("cu_seq_lens_k")
        if self.query_starts is None and padding is None:
            self.query_starts = self.key_starts = self._starts_from_positions(kwargs.get("position_ids"))

    def _starts_from_positions(self, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Where packed sequences start and end, (sequences + 1,), if positions start again within the only row."""
        if position_ids is None or self.batch != 1 or self.tokens == 1 or position_ids.shape[-1] != self.kv_tokens:
            return None
        positions = position_ids.reshape(-1, self.kv_tokens)[0]
        starts = torch.cat([positions.new_ones(1), positions.diff() != 1]).nonzero().flatten()
        return torch.cat([starts, starts.new_tensor([self.kv_tokens])]) if len(starts) > 1 else None

    def allows_concatenation(self, prefix_tokens: int) -> bool:
        """Whether every query would see a prefix concatenated before the keys."""
        is_packed = self.query_starts is not None
        is_within_window = self.sliding_window is None or self.kv_tokens + prefix_tokens <= self.sliding_window
        return is_within_window and not is_packed

    def is_implied(self) -> bool:
        """Whether sdpa without a mask lets the queries see the same keys."""
        is_aligned = not self.is_causal or self.tokens in (1, self.kv_tokens)
        return is_aligned and self.padding is None and self.allows_concatenation(0)

    def dense(self) -> torch.Tensor:
        """
        Return what is visible, (batch, 1, tokens, kv_tokens), bool.

        Raises:
            ValueError: If packed sequences come in more than one row.
        """
        query_position = torch.arange(self.tokens, device=self.device)
        key_position = torch.arange(self.kv_tokens, device=self.device)
        visible = torch.ones(self.batch, 1, self.tokens, self.kv_tokens, dtype=torch.bool, device=self.device)
        if self.query_starts is None or self.key_starts is None:
            query_position = query_position + self.kv_tokens - self.tokens
        else:
            if self.batch != 1:
                raise ValueError(f"Packed sequences must come in a batch of one row, got {self.batch} rows.")
            query_sequence = torch.searchsorted(self.query_starts[1:].contiguous(), query_position, right=True)
            key_sequence = torch.searchsorted(self.key_starts[1:].contiguous(), key_position, right=True)
            visible &= query_sequence[:, None] == key_sequence[None, :]
            ends = self.key_starts.diff() - self.query_starts.diff()  # a sequence's queries are the last of its keys
            query_position = query_position - self.query_starts[query_sequence] + ends[query_sequence]
            key_position = key_position - self.key_starts[key_sequence]
        distance = query_position[:, None] - key_position[None, :]
        if self.is_causal:
            visible &= distance >= 0
        if self.sliding_window is not None:
            visible &= distance.abs() < self.sliding_window
        if self.padding is not None:
            visible &= self.padding[:, None, None, :].bool()
        return visible


def dense_flex_mask(mask: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """
    Make a dense mask from the mask of flex attention.

    Args:
        mask (`BlockMask` or `torch.Tensor`, *optional*): A block mask, or an additive mask.
        query (`torch.Tensor`): Shape (batch, query_heads, tokens, key_dim).
        key (`torch.Tensor`): Shape (batch, kv_heads, kv_tokens, key_dim).

    Returns:
        `torch.Tensor`: Shape (batch, 1, tokens, kv_tokens), bool; an additive mask is returned as it is.
    """
    if mask is None or isinstance(mask, torch.Tensor):
        return mask
    batch, _, tokens, _ = query.shape
    # one index per dimension, in shapes that broadcast against each other: mask functions work element by element
    shapes = [(batch, 1, 1, 1), (1, 1, 1, 1), (1, 1, tokens, 1), (1, 1, 1, key.shape[2])]
    indices = [torch.arange(max(shape), device=query.device).view(shape) for shape in shapes]
    return mask.mask_mod(*indices).expand(batch, 1, tokens, key.shape[2])


def is_causal_call(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether sdpa takes a missing mask to mean causal attention: by the call's argument, else by the module."""
    return bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))


def finite_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a mask, bool or additive, into an additive one whose masked positions have the lowest finite number."""
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask.to(dtype).clamp(min=lowest)
