"""Tensors that a model is run on: noise, and tensors brought to where the model computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


LACK_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""What a forward raises that says nothing about the model or its inputs."""


def moved(inputs: Mapping[str, Any], dtype: torch.dtype, device: torch.device | None) -> dict[str, Any]:
    """Bring tensors to a device, and those of numbers with a point to a dtype."""
    return {
        name: each.to(device, dtype if each.is_floating_point() else each.dtype)
        if isinstance(each, torch.Tensor)
        else each
        for name, each in inputs.items()
    }


def noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    if device is not None and device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
