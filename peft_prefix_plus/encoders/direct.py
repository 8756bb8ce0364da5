"""The reparameterizations with a parameter for each number of the keys and values: "none" and "asinh"."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from .base import KVShape, NotTrained, PrefixEncoder, per_head


if TYPE_CHECKING:
    from ..config import PrefixPlusConfig


GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


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

    Args:
        shape (`KVShape`): The shape of the attention module's keys and values.
    """

    def __init__(self, shape: KVShape) -> None:
        super().__init__()
        self.amplitude = nn.Parameter(torch.empty(shape.num_heads, shape.key_dim))
        self.offset = nn.Parameter(torch.empty(shape.num_heads, shape.key_dim))
        self._waves: torch.Tensor | None = None

    def forward(self, tokens: int) -> torch.Tensor:
        """Return the keys of a prefix, (heads, tokens, key_dim)."""
        amplitude, offset = self.fixed(self.amplitude)[:, None], self.fixed(self.offset)[:, None]
        return torch.addcmul(offset, amplitude, self._known_waves(tokens))

    def _known_waves(self, tokens: int) -> torch.Tensor:
        """The waves, which are computed once for each device and dtype."""
        like = self.amplitude.detach()
        if torch.compiler.is_compiling() or type(like) is not torch.Tensor:
            return waves(tokens, like)
        known = self._waves
        if known is None or (known.shape[1], known.device, known.dtype) != (tokens, like.device, like.dtype):
            with torch.inference_mode(False):  # what is computed in inference could not take part in training later
                known = waves(tokens, like)
            if type(known) is torch.Tensor:
                self._waves = known
        return known


def waves(tokens: int, like: torch.Tensor) -> torch.Tensor:
    """
    Return waves of variance 1, (heads, tokens, dim) for (heads, dim). Their frequencies repeat no pattern, so tokens are as far
    apart as at random.
    """
    # float64: however long the prefix is, they are the same on every device
    numbers = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    frequencies = math.pi * (numbers**3 * GOLDEN_RATIO).frac().view(like.shape)[:, None]
    times = torch.arange(1, tokens + 1, dtype=torch.float64, device=like.device)[:, None]
    return (math.sqrt(2) * (times * frequencies).sin()).to(like.dtype)


class AsinhEncoder(TokenEncoder, reparameterization="asinh"):
    """
    `reparameterization="asinh"`: keys and values that a step moves the less, the further they have come from their start.

        E_K = start + bend(X)          E_V = bend(Y)          bend(x) = KNEE · asinh(x / KNEE)

    Adam moves X and Y by about the learning rate per step, whatever their gradient. Near its start that moves the prefix as
    far as that of `"none"`, further out by a share of the distance. So a rate that is several times too high ends near where the
    right one does. X and Y start at zero, and the keys at a [`KeyStart`].
    """

    KNEE = 0.02
    """The distance from the start at which steps begin to shrink. Measured: docs/quality.md."""

    def __init__(self, num_virtual_tokens: int, shape: KVShape) -> None:
        super().__init__(num_virtual_tokens, shape)
        self.key_start = KeyStart(shape)

    def parts(self) -> list[nn.Module]:
        return [self, self.key_start]

    @torch.no_grad()
    def initialize_parameters(self, key_std: float | torch.Tensor, value_std: float) -> None:
        if value_std:
            raise ValueError("The values of an encoder of this form start at zero.")
        self.key_start.amplitude.bernoulli_().mul_(2).sub_(1).mul_(per_head(key_std, self.key_start.amplitude))
        for parameter in (self.key_start.offset, self.key, self.value):
            parameter.zero_()

    @torch.no_grad()
    def spread_keys(self, factors: torch.Tensor) -> None:
        amplitude = self.key_start.amplitude
        amplitude.mul_(factors.to(amplitude)[:, None])

    @torch.no_grad()
    def shift_keys(self, offset: torch.Tensor) -> None:
        self.key_start.offset.add_(offset.to(self.key_start.offset))

    def produce(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key_start(self.key.shape[1]) + self._bend(self.key), self._bend(self.value)

    def _bend(self, parameter: torch.Tensor) -> torch.Tensor:
        """What the prefix has moved: as far as the parameter up to the knee, its logarithm beyond."""
        return torch.asinh(parameter / self.KNEE) * self.KNEE
