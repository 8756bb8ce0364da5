"""Which of the queries that a measure takes the mean over are not padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class RealQueries:
    """
    Which queries of each attention module are not padding.

    Args:
        base (`nn.Module`): The base model.
        inputs (`dict`): Its inputs; read are `attention_mask` and `decoder_attention_mask`.

    Raises:
        ValueError: If a mask is not of two dimensions, or marks everything as padding.
    """

    def __init__(self, base: nn.Module, inputs: dict[str, Any]) -> None:
        self._base = base
        self._masks: dict[str, torch.Tensor] = {}
        for name in ("attention_mask", "decoder_attention_mask"):
            mask = inputs.get(name)
            if mask is None:
                continue
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
                raise ValueError(
                    f"`{name}` must be of shape (batch, tokens), 1 for real tokens and 0 for padding, got {shape}: no other "
                    "form tells which queries are real."
                )
            if not mask.any():
                raise ValueError(f"`{name}`, of shape {shape}, marks every token as padding.")
            self._masks[name] = mask.bool()
        config: Any = getattr(base, "config", None)
        self._has_past = inputs.get("past_key_values") is not None
        self._encoder: set[nn.Module] | None = None
        if getattr(config, "is_encoder_decoder", False):
            self._encoder = set(base.get_encoder().modules())  # type: ignore[operator]

    def of_module(self, name: str, batch: int, tokens: int) -> torch.Tensor:
        """
        Return which queries of a module are real, (batch, tokens), bool. After a cache they are the last of the mask's
        positions.

        Raises:
            ValueError: If the mask does not fit them.
        """
        is_in_encoder = self._encoder is None or self._base.get_submodule(name) in self._encoder
        mask_name = "attention_mask" if is_in_encoder else "decoder_attention_mask"
        mask = self._masks.get(mask_name)
        if mask is None or mask.all() or not self._reads_text(name):
            return torch.ones(batch, tokens, dtype=torch.bool)
        is_longer = mask.shape[1] > tokens and self._has_past and (self._encoder is None or not is_in_encoder)
        if mask.shape[0] != batch or not (mask.shape[1] == tokens or is_longer):
            raise ValueError(
                f"`{mask_name}` has shape {tuple(mask.shape)}, but {name} has {batch} rows of {tokens} queries, so which of "
                "them are padding cannot be told. Measure on rows without padding."
            )
        is_real = mask[:, mask.shape[1] - tokens :]
        if not is_real.any():
            raise ValueError(f"`{mask_name}` marks all {tokens} queries of {name} as padding.")
        return is_real

    def _reads_text(self, name: str) -> bool:
        """Whether the innermost transformers model around a module takes tokens."""
        parents = [".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 1)]
        models = [module for module in map(self._base.get_submodule, parents) if isinstance(module, PreTrainedModel)]
        return not models or models[-1].main_input_name == "input_ids"
