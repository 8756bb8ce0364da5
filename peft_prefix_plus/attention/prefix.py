"""The prefix as it enters attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.functional import pad


PrefixOfRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys, values and mask as an attention kernel takes them: repeated for every row of a batch, without a copy."""


@dataclass(frozen=True)
class Prefix:
    """
    The keys and values of a prefix in one attention module.

    Attributes:
        key (`torch.Tensor`): Shape (kv_heads, prefix_tokens, key_dim) or, where each row of a batch has its own, (batch,
            kv_heads, prefix_tokens, key_dim).
        value (`torch.Tensor`): Shape (kv_heads, prefix_tokens, value_dim) or (batch, kv_heads, prefix_tokens, value_dim).
        mask (`torch.Tensor`, *optional*): Shape (batch, prefix_tokens), True where a row sees the position; `None`
            when every row sees every position.
        gate (`torch.Tensor`, *optional*): Shape (query_heads,) or (batch, query_heads). With a gate the prefix has a
            softmax of its own, and tanh(gate) times its attention is added to that of the base model.
        is_decoupled (`bool`): Whether the prefix is added to the base model's attention without a softmax.
        reads (`str`): Which queries the keys meet: `"rotated"`, as the module gives them; `"unrotated"`, with RoPE
            undone; or `"both"`, concatenated, (…, 2 · key_dim), with keys of the same width.
        turned (`Callable`, *optional*): Called with the position embeddings of a single query in every row and the
            number of rows, it returns a prefix that scores the rotated query as this prefix scores it unrotated: see
            [`TurnedPrefixes`].
    """

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    is_decoupled: bool = False
    reads: str = "rotated"
    turned: Callable[[Any, int], Prefix | None] | None = field(default=None, repr=False, compare=False)
    _rows: list[tuple[int, PrefixOfRows]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def length(self) -> int:
        """The number of prefix_tokens."""
        return self.key.shape[-2]

    @property
    def is_of_rows(self) -> bool:
        """Whether each row of a batch has its own prefix."""
        return self.key.dim() == 4

    @property
    def is_joint(self) -> bool:
        """Whether the prefix shares a softmax with the real tokens."""
        return self.gate is None and not self.is_decoupled

    def for_rows(self, batch: int) -> PrefixOfRows:
        """
        Return keys (batch, kv_heads, prefix_tokens, key_dim), values (batch, kv_heads, prefix_tokens, value_dim) and
        mask (batch, 1, 1, prefix_tokens), or `None`. The result for the last batch size is kept, because decoding asks
        for it at every token.
        """
        if not self._rows or self._rows[0][0] != batch:
            sizes = (batch, -1, -1, -1)
            mask = None if self.mask is None else self.mask[:, None, None, :]
            self._rows[:] = [(batch, (self.key.expand(sizes), self.value.expand(sizes), mask))]
        return self._rows[0][1]

    def turned_to(self, key: torch.Tensor, key_of_rows: torch.Tensor) -> Prefix:
        """
        Return the same prefix with keys, (kv_heads, prefix_tokens, key_dim), that meet rotated queries. The result of
        [`Prefix.for_rows`] for them, (batch, kv_heads, prefix_tokens, key_dim), is given too.
        """
        turned = Prefix(key, self.value, self.mask, self.gate, self.is_decoupled)
        _, value, mask = self.for_rows(key_of_rows.shape[0])
        turned._rows.append((key_of_rows.shape[0], (key_of_rows, value, mask)))
        return turned

    def to(self, key: torch.Tensor, value: torch.Tensor) -> Prefix:
        """Bring the prefix to the dtype and device of the real keys and values."""
        return Prefix(
            key=self.key.to(key.device, key.dtype),
            value=self.value.to(value.device, value.dtype),
            mask=None if self.mask is None else self.mask.to(key.device),
            gate=None if self.gate is None else self.gate.to(value.device, value.dtype),
            is_decoupled=self.is_decoupled,
            reads=self.reads,
        )

    def for_both_queries(self) -> Prefix:
        """Return the same prefix with keys that meet rotated and unrotated queries, one after the other."""
        if self.reads == "both":
            return self
        width = self.key.shape[-1]
        return replace(self, key=pad(self.key, (0, width) if self.reads == "rotated" else (width, 0)), reads="both")


ActivePrefixes = tuple[Prefix | None, tuple[Prefix, ...]]
"""The prefix that shares a softmax with the real tokens, or `None`, and the prefixes that are added to its attention."""


def concatenated(prefixes: Sequence[Prefix]) -> Prefix:
    """
    Concatenate prefixes that all rows of a batch read.

    Args:
        prefixes (`Sequence[Prefix]`): At least one, without masks.
    """
    if len(prefixes) == 1:
        return prefixes[0]
    prefixes = _reading_alike(prefixes)
    return Prefix(
        torch.cat([prefix.key for prefix in prefixes], dim=1),
        torch.cat([prefix.value for prefix in prefixes], dim=1),
        reads=prefixes[0].reads,
    )


def gathered(prefixes: Sequence[Prefix], rows: Sequence[int | None]) -> Prefix:
    """
    Give each row of a batch its own prefix, and only that. A prefix that all rows share stays a single one.

    Shorter prefixes are padded with zeros. Where a softmax would notice, a mask hides them; a decoupled prefix of zeros
    adds nothing, and neither does a gate of zero.

    Args:
        prefixes (`Sequence[Prefix]`): At least one, all joint, all gated, or all decoupled, without masks.
        rows (`Sequence[int | None]`): For each row of the batch, the index of its prefix, or `None` for none.
    """
    has_base_rows = None in rows
    if len(prefixes) == 1 and not has_base_rows:
        return prefixes[0]
    prefixes = _reading_alike(prefixes)
    first = prefixes[0]
    lengths = [prefix.length for prefix in prefixes]
    longest, count = max(lengths), len(prefixes)
    device = first.key.device
    index = torch.tensor([count if row is None else row for row in rows], device=device)

    def stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
        padded = [pad(tensor, (0, 0, 0, longest - tensor.shape[-2])) for tensor in tensors]
        if has_base_rows:
            padded.append(torch.zeros_like(padded[0]))
        return torch.stack(padded).index_select(0, index)

    gate = mask = None
    if first.gate is not None:
        gates = [prefix.gate for prefix in prefixes if prefix.gate is not None]
        gate = torch.stack([*gates, torch.zeros_like(gates[0])]).index_select(0, index)
    is_short = min(lengths) < longest
    if not first.is_decoupled and (is_short or (has_base_rows and first.is_joint)):
        seen = torch.tensor([0 if row is None else lengths[row] for row in rows], device=device)
        if gate is not None:
            seen.masked_fill_(seen == 0, longest)  # a softmax over nothing would be no number, even times zero
        mask = torch.arange(longest, device=device) < seen[:, None]
    return Prefix(
        stacked([prefix.key for prefix in prefixes]),
        stacked([prefix.value for prefix in prefixes]),
        mask,
        gate,
        first.is_decoupled,
        first.reads,
    )


def _reading_alike(prefixes: Sequence[Prefix]) -> Sequence[Prefix]:
    """Bring prefixes to keys that meet the same queries."""
    if len({prefix.reads for prefix in prefixes}) > 1:
        return [prefix.for_both_queries() for prefix in prefixes]
    return prefixes
