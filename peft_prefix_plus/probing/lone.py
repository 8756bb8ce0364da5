"""Inputs for an attention module alone, if no forward of its model reaches it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .tensors import noise


def lone_inputs(
    module: nn.Module, num_tokens: int, dtype: torch.dtype, device: torch.device | None
) -> Iterator[dict[str, Any]]:
    """
    Yield candidate inputs for an attention module alone: noise as wide as the inputs of its projections.

    Args:
        module (`nn.Module`): The module.
        num_tokens (`int`): How many tokens.
        dtype (`torch.dtype`): The dtype of its hidden states.
        device (`torch.device`, *optional*): Where to put them.

    Raises:
        ValueError: If it has no linear projections, or needs an argument that is unknown here.
    """
    widths = {name: _width_read(child) for name, child in module.named_children()}
    known = {name: width for name, width in widths.items() if width is not None}
    if not known:
        raise ValueError("it has no linear projections")
    width_of_keys = next((width for name, width in known.items() if name.startswith(("k", "kv"))), None)
    width = next(iter(known.values()))
    inputs: dict[str, Any] = {}
    further: dict[str, Any] = {}  # what cross-attention needs, and self-attention does not take
    parameters = inspect.signature(module.forward).parameters
    for index, (name, parameter) in enumerate(parameters.items()):
        is_required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if index == 0:
            inputs[name] = noise((1, num_tokens, width), dtype, device)
        elif name in OTHER_STATES:
            states = noise((1, num_tokens + 1, width_of_keys or width), dtype, device)
            (inputs if is_required else further)[name] = states
        elif name == "position_ids":
            inputs[name] = torch.arange(num_tokens, device=device)[None]
        elif is_required:
            if not re.search("mask|bias|position_embeddings", name):
                raise ValueError(f"its argument {name!r} is not known")
            inputs[name] = None
    for position in _positions(module, num_tokens, width, dtype, device):
        yield {**inputs, **position}
        if further:
            yield {**inputs, **position, **further}
    if "key" in inputs:  # SAM's have a dim for prompts beside that for images
        yield {name: each[:, None] if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}


def _positions(
    module: nn.Module, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device | None
) -> Iterator[dict[str, Any]]:
    """Yield the position embeddings that a module may take: rotations by no angle, states to be added, none."""
    parameter = inspect.signature(module.forward).parameters.get("position_embeddings")
    if parameter is not None:
        dim = getattr(module, "head_dim", None) or width // _num_heads(module)
        rotated = getattr(module, "qk_rope_head_dim", None) or dim
        for size in (rotated, rotated // 2):  # some get a number per plane of two dims
            ones = torch.ones(1, num_tokens, size, dtype=dtype, device=device)
            yield {"position_embeddings": (ones, torch.zeros_like(ones))}
        yield {"position_embeddings": torch.zeros(1, num_tokens, width, dtype=dtype, device=device)}
    if parameter is None or parameter.default is not parameter.empty:
        yield {}


OTHER_STATES = ("key_value_states", "encoder_hidden_states", "context", "key_states", "latents", "key", "value")
"""Arguments of attention modules that are further states, of what keys and values are made of for instance."""


def _width_read(child: nn.Module) -> int | None:
    """The input width of a linear projection, or `None` for other modules."""
    for name in ("in_features", "nx", "in_channels"):
        width = getattr(child, name, None)
        if isinstance(width, int):
            return width
    return None


def _num_heads(module: nn.Module) -> int:
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "num_key_value_heads")
    return next((count for name in names if isinstance(count := getattr(module, name, None), int)), 1)
