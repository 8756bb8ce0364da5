"""The reparameterizations with a parameter for each number of the keys and values: "none" and "log"."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from .base import KVShape, NotTrained, PrefixEncoder, per_head


if TYPE_CHECKING:
    from ..config import PrefixPlusConfig


class TokenEncoder(PrefixEncoder):
    """
    A reparameterization with a parameter for each number of the keys and values: `key` (heads, tokens, key_dim) and `value` (heads,
    tokens, value_dim).

    Args:
        num_virtual_tokens (`int`): The length of the prefix.
        shape (`KVShape`): The shape of the attention module's keys and values.
    """

    def __init__(self, num_virtual_tokens: int, shape: KVShape) -> None:
        super().__init__(shape)
        self.key = nn.Parameter(torch.empty(shape.num_heads, num_virtual_tokens, shape.key_dim))
        self.value = nn.Parameter(torch.empty(shape.num_heads, num_virtual_tokens, shape.value_dim))

    @classmethod
    def from_config(cls, config: PrefixPlusConfig, shape: KVShape, shared_parts: nn.ModuleDict) -> PrefixEncoder:
        return cls(config.num_virtual_tokens, shape)

    def parts(self) -> list[nn.Module]:
        return [self]

    def parameters_by_kind(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "keys", self.key
        yield "values", self.value

    def key_source(self) -> nn.Module:
        return self


class DirectEncoder(TokenEncoder, reparameterization="none"):
    """`reparameterization="none"`: E_K and E_V are the parameters."""

    @classmethod
    def holding(cls, key: torch.Tensor, value: torch.Tensor) -> DirectEncoder:
        """Return the encoder of given keys (heads, tokens, key_dim) and values (heads, tokens, value_dim), unscaled."""
        encoder = cls(key.shape[1], KVShape(key.shape[0], key.shape[2], value.shape[2])).to(key.device, key.dtype)
        encoder.key, encoder.value = nn.Parameter(key), nn.Parameter(value)
        return encoder

    @torch.no_grad()
    def initialize_parameters(self, key_std: float | torch.Tensor, value_std: float) -> None:
        self.key.normal_().mul_(per_head(key_std, self.key))
        self.value.normal_(std=value_std)

    @torch.no_grad()
    def spread_keys(self, factors: torch.Tensor) -> None:
        self.key.mul_(factors.to(self.key)[:, None, None])

    @torch.no_grad()
    def shift_keys(self, offset: torch.Tensor) -> None:
        self.key.add_(offset.to(self.key)[:, None])

    def produce(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key, self.value


class KeyStart(NotTrained):
    """
    Where keys start that are learned as a distance from it: waves over the places of the prefix, of another frequency in each head
    and dim, and an offset of all tokens. However long the prefix is, it has two numbers for each head and dim.

    Weight decay shrinks every parameter, so both are ratios to a third, which shrinks alike.

    Args:
        shape (`KVShape`): The shape of the attention module's keys and values.
    """

    def __init__(self, shape: KVShape) -> None:
        super().__init__()
        self.unit = nn.Parameter(torch.ones(1))
        self.amplitude = nn.Parameter(torch.empty(shape.num_heads, shape.key_dim))
        self.offset = nn.Parameter(torch.empty(shape.num_heads, shape.key_dim))

    @torch.no_grad()
    def initialize(self, key_std: float | torch.Tensor) -> None:
        """Give the keys these standard deviations, with random signs, and no offset."""
        self.unit.fill_(1.0)
        self.amplitude.bernoulli_().mul_(2).sub_(1).mul_(per_head(key_std, self.amplitude))
        self.offset.zero_()

    def forward(self, tokens: int) -> torch.Tensor:
        """Return the keys of a prefix, (heads, tokens, key_dim)."""
        amplitude, offset = self.fixed(self.amplitude)[:, None], self.fixed(self.offset)[:, None]
        return (offset + amplitude * waves(tokens, self.amplitude)) / self.fixed(self.unit)


TURN = 2**24
"""The parts of a turn that the phases of [`waves`] are counted in: float32 holds each exactly."""


def waves(tokens: int, like: torch.Tensor) -> torch.Tensor:
    """
    Return waves of variance 1, (heads, tokens, dim) for (heads, dim). Their frequencies have no pattern, so tokens are as far
    apart as at random.
    """
    # Counted in integers: an adapter's start has to be the same on every device and in compiled code.
    frequencies = torch.arange(1, like.numel() + 1, device=like.device) * 0x9E3779 & (TURN - 1)
    frequencies = (frequencies ^ (frequencies >> 12)) * 0x85EBCB & (TURN - 1)
    frequencies = (frequencies ^ (frequencies >> 11) | 1).view(like.shape)[:, None]
    times = torch.arange(1, tokens + 1, device=like.device)[:, None]
    phases = (times * frequencies & (TURN - 1)).to(torch.float32) * (2 * math.pi / TURN)  # & takes the remainder
    return (math.sqrt(2) * phases.sin()).to(like.dtype)


class LogEncoder(TokenEncoder, reparameterization="log"):
    """
    `reparameterization="log"`: keys and values whose distance from their start is a logarithm of the distance that the parameters have
    come.

        E_K = start + damp(X)          E_V = damp(Y)          damp(x) = REACH · log(1 + |x| / KNEE) · x / |x|

    |x| is the root mean square over the layer's keys, or values. Adam moves X and Y by about the learning rate per step, whatever their
    gradient, so a rate that is too high ends about as near to the start as the right one. Only the distance is damped: the numbers of a layer
    keep their proportions. X and Y start at zero, and the keys at a [`KeyStart`].
    """

    KNEE = 0.002
    """The distance of the parameters from zero at which steps begin to shrink. Measured, like `REACH`: docs/quality.md."""

    REACH = 0.004
    """How far each further e-fold of that distance moves the prefix."""

    def __init__(self, num_virtual_tokens: int, shape: KVShape) -> None:
        super().__init__(num_virtual_tokens, shape)
        self.key_start = KeyStart(shape)

    def parts(self) -> list[nn.Module]:
        return [self, self.key_start]

    @torch.no_grad()
    def initialize_parameters(self, key_std: float | torch.Tensor, value_std: float) -> None:
        if value_std:
            raise ValueError("The values of an encoder of this form start at zero.")
        self.key_start.initialize(key_std)
        self.key.zero_()
        self.value.zero_()

    @torch.no_grad()
    def spread_keys(self, factors: torch.Tensor) -> None:
        amplitude = self.key_start.amplitude
        amplitude.mul_(factors.to(amplitude)[:, None])

    @torch.no_grad()
    def shift_keys(self, offset: torch.Tensor) -> None:
        self.key_start.offset.add_(offset.to(self.key_start.offset))

    def produce(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key_start(self.key.shape[1]) + self._damp(self.key), self._damp(self.value)

    def _damp(self, parameter: torch.Tensor) -> torch.Tensor:
        """What the prefix has moved."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        distance = torch.linalg.vector_norm(parameter, dtype=dtype) / math.sqrt(parameter.numel())
        ratio = (distance / self.KNEE).clamp(min=1e-6)  # zero has no direction, but the slope has a limit there
        return parameter * (self.REACH / self.KNEE * ratio.log1p() / ratio).to(parameter.dtype)
