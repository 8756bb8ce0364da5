"""Padding token ids to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase


IGNORED_LABEL = -100
"""The label of a token without a loss, in transformers and torch."""


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token to pad with. Its value does not matter, because it is masked and has no loss."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    """Return rows of numbers as a tensor, (rows, longest row), filled on the right."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows], dtype=torch.long)
