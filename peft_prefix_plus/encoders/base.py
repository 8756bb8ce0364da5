"""What all reparameterizations have in common: shapes, what is saved but not trained, and the class that each derives from."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn


if TYPE_CHECKING:
    from ..config import PrefixPlusConfig


class KVShape(NamedTuple):
    """The shape that an attention module's keys and values have per token."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def size(self) -> int:
        """Numbers per token: `num_heads * (key_dim + value_dim)`."""
        return self.num_heads * (self.key_dim + self.value_dim)

    def split(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Split rows of keys and values, (tokens, size), into keys (heads, tokens, key_dim) and values (heads, tokens,
        value_dim).
        """
        keys, values = self.split_columns(flat)
        return (
            keys.view(-1, self.num_heads, self.key_dim).transpose(0, 1),
            values.view(-1, self.num_heads, self.value_dim).transpose(0, 1),
        )

    def join(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Undo [`KVShape.split`]."""
        return torch.cat([key.transpose(0, 1).flatten(1), value.transpose(0, 1).flatten(1)], dim=-1)

    def split_columns(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split the columns of (rows, size) into those of the keys and those of the values, as views."""
        return flat.split([self.num_heads * self.key_dim, self.num_heads * self.value_dim], dim=-1)


class NotTrained(nn.Module):
    """
    What an adapter is saved with and does not train: parameters that require a gradient, which is always zero, because many tools
    save only what is trainable.
    """

    @staticmethod
    def fixed(parameter: torch.Tensor) -> torch.Tensor:
        """A parameter of this module, as it enters the prefix."""
        detached = parameter.detach()
        return detached + (parameter - detached) * 0.0 if torch.is_grad_enabled() else detached


def untrained_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a model's [`NotTrained`] modules."""
    return {
        parameter for module in model.modules() if isinstance(module, NotTrained) for parameter in module.parameters()
    }


class Scaling(NotTrained):
    """
    The factors on the keys and on the values of one attention module's prefix.

    Weight decay shrinks every parameter, so the factors are ratios of three numbers, which shrink alike. Ratios that are
    powers of two stay exact.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(3))

    @property
    def values(self) -> torch.Tensor:
        """The factors on keys and on values, (2,), without gradient."""
        numbers = self.factors.detach()
        return numbers[1:] / numbers[0]

    @torch.no_grad()
    def set(self, key_factor: float, value_factor: float) -> None:
        """Set the factors on keys and on values."""
        self.factors.copy_(self.factors.new_tensor([1.0, key_factor, value_factor]))

    def forward(self) -> torch.Tensor:
        """Return the factors, (2,). A call, as for every parameter, so that FSDP or ZeRO-3 gathers them."""
        factors = self.fixed(self.factors)
        return factors[1:] / factors[0]


ENCODERS: dict[str, type[PrefixEncoder]] = {}
"""The classes of encoders by the name that `reparameterization` has in a configuration."""


class PrefixEncoder(nn.Module):
    """
    Produces the prefix of one attention module:

        P_K = scaling[0] · E_K            P_V = scaling[1] · E_V

    where `produce` computes (E_K, E_V) from the parameters. A subclass with a name is a reparameterization:

        class MyEncoder(PrefixEncoder, reparameterization="mine"): ...

    Args:
        shape (`KVShape`): The shape of the attention module's keys and values.

    Attributes:
        shares_parts (`bool`): Whether it uses the field `sharing`.
        has_hidden_layer (`bool`): Whether it uses the field `encoder_hidden_size`.
    """

    shares_parts = False
    has_hidden_layer = False

    def __init_subclass__(cls, reparameterization: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if reparameterization is not None:
            ENCODERS[reparameterization] = cls

    @classmethod
    def from_config(cls, config: PrefixPlusConfig, shape: KVShape, shared_parts: nn.ModuleDict) -> PrefixEncoder:
        """
        Return the encoder of one attention module. Its parameters are not filled yet.

        Args:
            config (`PrefixPlusConfig`): The adapter's configuration.
            shape (`KVShape`): The shape of the attention module's keys and values.
            shared_parts (`nn.ModuleDict`): The parts that the adapter's layers share; added to.
        """
        raise NotImplementedError

    def __init__(self, shape: KVShape) -> None:
        super().__init__()
        self.shape = shape
        self._scalings: tuple[nn.ModuleDict, str] = (nn.ModuleDict({"alone": Scaling()}), "alone")

    @property
    def scaling(self) -> Scaling:
        """The factors on keys and on values."""
        scalings, name = self._scalings
        scaling: Any = scalings[name]
        return scaling

    def take_scaling_from(self, scalings: nn.ModuleDict, name: str) -> None:
        """Use `scalings[name]` as the [`Scaling`]. It is looked up at each use, like shared parts."""
        self._scalings = (scalings, name)

    def parts(self) -> list[nn.Module]:
        """The modules whose own parameters the prefix depends on."""
        raise NotImplementedError

    def own_parts(self) -> list[nn.Module]:
        """This encoder, and the shared parts that no earlier layer uses."""
        return [self]

    def shared_parts_made(self) -> list[str]:
        """The names of the shared parts that no earlier layer uses."""
        return []

    def take_over(self, parts: Collection[str]) -> None:
        """Take ownership of the shared parts used here, because the layer that made them is about to be removed."""

    def parameters_by_kind(self) -> Iterator[tuple[str, nn.Parameter]]:
        """
        Yield the parameters that the prefix depends on, each with its kind: `"keys"`, `"values"` or `"projection"`.
        """
        for part in self.parts():
            yield from (("projection", parameter) for parameter in part.parameters())

    def is_empty(self) -> bool:
        """Whether the parameters have no memory yet, because a checkpoint is about to fill them."""
        return any(parameter.is_meta for part in self.parts() for parameter in part.parameters())

    def initialize_parameters(self, key_std: float | torch.Tensor, value_std: float) -> None:
        """
        Fill the parameters that this layer owns at random, so that E_K and E_V have these standard deviations:
        numbers, or for the keys (heads, key_dim), one for each head and dim.
        """
        raise NotImplementedError

    def key_source(self) -> nn.Module:
        """
        The module that produces E_K: this one, or one that layers share, which then have the same spread of keys.
        """
        raise NotImplementedError

    def spread_keys(self, factors: torch.Tensor) -> None:
        """
        Multiply the E_K of [`PrefixEncoder.key_source`], without its offset, by a factor for each head, (heads,).
        """
        raise NotImplementedError

    def shift_keys(self, offset: torch.Tensor) -> None:
        """Add (heads, key_dim) to every token's E_K in this layer alone."""
        raise NotImplementedError

    def produce(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return E_K (heads, tokens, key_dim) and E_V (heads, tokens, value_dim)."""
        raise NotImplementedError

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys (heads, tokens, key_dim) and the values (heads, tokens, value_dim)."""
        key, value = self.produce()
        scalings, name = self._scalings
        scaling = scalings[name]().to(key.device)
        return key * scaling[0], value * scaling[1]


def make_encoder(config: PrefixPlusConfig, shape: KVShape, shared_parts: nn.ModuleDict) -> PrefixEncoder:
    """Return the encoder that [`PrefixEncoder.from_config`] of the reparameterization's class makes."""
    return ENCODERS[str(config.reparameterization)].from_config(config, shape, shared_parts)


def per_head(std: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    """Standard deviations (heads, key_dim) in a form that broadcasts to keys (heads, tokens, key_dim), and a number as it is."""
    if isinstance(std, torch.Tensor):
        std = std.to(like.device, like.dtype)
        return std if like.dim() == 2 else std[:, None]
    return std
