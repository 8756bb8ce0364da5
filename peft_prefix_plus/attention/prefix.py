"""The prefix as it enters attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


PrefixOfRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys, values and mask as an attention kernel takes them: repeated for every row of a batch, without a copy."""


@dataclass(frozen=True)
class Prefix:
    """
    Keys and values that stand before the real ones in one attention module.

    Attributes:
        key (`torch.Tensor`): Shape (kv_heads, prefix_tokens, key_dim).
        value (`torch.Tensor`): Shape (kv_heads, prefix_tokens, value_dim).
        mask (`torch.Tensor`, *optional*): Shape (batch, prefix_tokens), True where a row sees the position; `None`
            when every row sees every position.
        gate (`torch.Tensor`, *optional*): Shape (query_heads,). With a gate the prefix has a softmax of its own, and
            tanh(gate) times its attention is added to that of the base model.
        is_decoupled (`bool`): Whether the prefix is added to the base model's attention without a softmax.
    """

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    is_decoupled: bool = False
    _rows: list[tuple[int, PrefixOfRows]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def is_joint(self) -> bool:
        """Whether the prefix shares a softmax with the real tokens."""
        return self.gate is None and not self.is_decoupled

    def for_rows(self, batch: int) -> PrefixOfRows:
        """
        Return keys (batch, kv_heads, prefix_tokens, key_dim), values (batch, kv_heads, prefix_tokens, value_dim) and mask
        (batch, 1, 1, prefix_tokens), or `None`. Those of the last batch size are kept: decoding asks for them at every token.
        """
        if not self._rows or self._rows[0][0] != batch:
            sizes = (batch, -1, -1, -1)
            mask = None if self.mask is None else self.mask[:, None, None, :]
            self._rows[:] = [(batch, (self.key.expand(sizes), self.value.expand(sizes), mask))]
        return self._rows[0][1]

    def to(self, key: torch.Tensor, value: torch.Tensor) -> Prefix:
        """Bring the prefix to the dtype and device of the real keys and values."""
        return Prefix(
            key=self.key.to(key.device, key.dtype),
            value=self.value.to(value.device, value.dtype),
            mask=None if self.mask is None else self.mask.to(key.device),
            gate=None if self.gate is None else self.gate.to(value.device, value.dtype),
            is_decoupled=self.is_decoupled,
        )


def concatenated(prefixes: Sequence[Prefix]) -> Prefix:
    """
    Put prefixes one after the other.

    Where they belong to different rows of a batch, each row sees its own and the masks hide the others.

    Args:
        prefixes (`Sequence[Prefix]`): At least one; either all have a mask or none has.
    """
    if len(prefixes) == 1:
        return prefixes[0]
    masks = [prefix.mask for prefix in prefixes if prefix.mask is not None]
    return Prefix(
        torch.cat([prefix.key for prefix in prefixes], dim=1),
        torch.cat([prefix.value for prefix in prefixes], dim=1),
        torch.cat(masks, dim=1) if masks else None,
    )
