"""Prompts as one batch for `generate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def left_padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pad rows of token ids on the left, so that all of them end where `generate` continues.

    Args:
        rows (`Sequence[Sequence[int]]`): The rows.
        filler (`int`): The token to pad with.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The token ids and the attention mask, (rows, longest row) each.
    """
    length = max(map(len, rows))
    token_ids = torch.tensor([[*[filler] * (length - len(row)), *row] for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return token_ids, mask
