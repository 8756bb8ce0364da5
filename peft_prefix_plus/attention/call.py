"""What a call of an attention function takes and returns."""

from __future__ import annotations

from collections.abc import Callable

import torch


AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]
