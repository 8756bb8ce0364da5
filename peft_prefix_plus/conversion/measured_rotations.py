"""Rotary position embeddings, as rotations of keys that can be undone and identified."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attention.planes import factors_of_dims, turn_back


ORIGINAL_BASE = 10000.0
"""The base of the frequencies in RoFormer (arXiv 2104.09864), which GPT-J and others have fixed in their code."""


@dataclass(frozen=True)
class Rotation:
    """
    A rotation of the planes of a vector, each by its own angle per position.

    Attributes:
        frequencies (`tuple[float, ...]`): The angle per position of each plane, in radians; none is no rotation at all.
        offset (`int`): The first of the rotated dims; all others stay.
        is_interleaved (`bool`): Whether a plane's two dims are neighbours (GPT-J), or half the rotated dims apart (GPT-NeoX).
    """

    frequencies: tuple[float, ...] = ()
    offset: int = 0
    is_interleaved: bool = False

    def rotate(self, vectors: torch.Tensor, positions: int) -> torch.Tensor:
        """
        Rotate vectors (..., dim) by a number of positions, which may be negative. Computed in float64, on the CPU: not every
        device has float64.

        Returns:
            `torch.Tensor`: As `vectors`, in their dtype and on their device.
        """
        size = 2 * len(self.frequencies)
        before, rotated, after = (
            vectors.cpu().double().split([self.offset, size, vectors.shape[-1] - self.offset - size], dim=-1)
        )
        angles = positions * torch.tensor(self.frequencies, dtype=torch.float64)
        # back by the opposite angles
        cos, sin = factors_of_dims(angles.cos(), -angles.sin(), self.is_interleaved)
        turned = turn_back(rotated, cos, sin, self.is_interleaved)
        return torch.cat([before, turned, after], dim=-1).to(vectors)


def candidate_rotations(model: nn.Module, key_dim: int) -> list[Rotation]:
    """
    Return the rotations that a model's attention modules may apply; [`closest_rotation`] finds the actual one.

    Args:
        model (`nn.Module`): The model, whose rotary embeddings hold their frequencies in buffers.
        key_dim (`int`): The width of the keys.
    """
    frequencies = {tuple(buffer.tolist()) for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    config: Any = model.config
    for dim in (key_dim, getattr(config.get_text_config(), "rotary_dim", None)):
        if dim is not None and dim % 2 == 0:
            frequencies.add(tuple(ORIGINAL_BASE ** -(plane / dim) for plane in range(0, dim, 2)))
    return [
        Rotation(),
        *(
            Rotation(each, offset, is_interleaved)
            for forward in sorted(frequencies)
            for each in (forward, tuple(-frequency for frequency in forward))  # NanoChat turns the other way
            if 2 * len(each) <= key_dim
            for offset in dict.fromkeys((0, key_dim - 2 * len(each)))
            for is_interleaved in (False, True)
        ),
    ]


def closest_rotation(
    candidates: Iterable[Rotation], here: torch.Tensor, moved: torch.Tensor, positions: int
) -> tuple[Rotation, float]:
    """
    Find the rotation by which keys have followed their positions.

    Args:
        candidates (`Iterable[Rotation]`): The rotations to choose from.
        here (`torch.Tensor`): Keys of a text, (kv_heads, tokens, key_dim).
        moved (`torch.Tensor`): The keys of the same text at later positions, of the same shape.
        positions (`int`): By how many positions they are later.

    Returns:
        `tuple[Rotation, float]`: The best candidate, and the norm of its residual, relative to the keys' norm.
    """
    here, moved = here.cpu().double(), moved.cpu().double()
    errors = {rotation: (rotation.rotate(moved, -positions) - here).norm().item() for rotation in candidates}
    best = min(errors, key=errors.__getitem__)
    return best, errors[best] / max(here.norm().item(), torch.finfo(torch.float64).tiny)
