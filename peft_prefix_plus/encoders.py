"""The reparameterizations: they turn an adapter's parameters into the prefix (P_K, P_V) of one attention module."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN


if TYPE_CHECKING:
    from .config import PrefixPlusConfig


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


SHARED_PARTS = {
    "none": (),
    "input": ("virtual_tokens", "hidden"),
    "projection": ("hidden", "output"),
    "all": ("virtual_tokens", "hidden", "output"),
}
"""Which parts of the encoder the layers share, by `sharing`."""


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


GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

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
        self.key.normal_().mul_(_per_head(key_std, self.key))
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
        self.key_start.amplitude.bernoulli_().mul_(2).sub_(1).mul_(_per_head(key_std, self.key_start.amplitude))
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


class VirtualTokens(nn.Module):
    """The learned input P' of a reparameterization, (tokens, encoder_dim)."""

    def __init__(self, num_virtual_tokens: int, encoder_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_virtual_tokens, encoder_dim))

    def forward(self) -> torch.Tensor:
        """Return a copy of P', which stays valid when FSDP or ZeRO-3 shards the parameter again."""
        return self.weight.clone()


class ProjectedEncoder(PrefixEncoder):
    """
    A reparameterization whose E_K and E_V are a linear map W of features, which a subclass computes from the learned
    input P'. Each layer has its own learned offset o on the keys of all tokens.

        [E_K - o; E_V] = W features(P')

    The offset moves the keys to where the layer's queries pay them little attention, whatever the layers share. A
    prefix starts there.

    Parts that layers share are modules of the model, not of a layer; encoders refer to them without registering them.
    So every parameter has one name, and a model that is sharded layer by layer keeps them complete while any layer
    runs.

    Args:
        config (`PrefixPlusConfig`): The adapter's configuration.
        shape (`KVShape`): The shape of the attention module's keys and values.
        shared_parts (`nn.ModuleDict`): The parts that encoders of the same adapter have made and share; added to.
    """

    shares_parts = True

    @classmethod
    def from_config(cls, config: PrefixPlusConfig, shape: KVShape, shared_parts: nn.ModuleDict) -> ProjectedEncoder:
        return cls(config, shape, shared_parts)

    def builders(self, config: PrefixPlusConfig) -> dict[str, Callable[[], nn.Module]]:
        """
        The constructors of the parts, in order: `virtual_tokens`, `hidden` if there is one, and `output`, which is W.
        """
        raise NotImplementedError

    def features(self) -> torch.Tensor:
        """Return the features, which are the input of the output projection, (tokens, width)."""
        raise NotImplementedError

    def norm_of_features(self, width: int) -> float:
        """The average norm of a row of the features at the start."""
        raise NotImplementedError

    def __init__(self, config: PrefixPlusConfig, shape: KVShape, shared_parts: nn.ModuleDict) -> None:
        super().__init__(shape)
        # What is shared is looked up at each use: wrappers (FSDP's, of checkpointing) take a module's place in its parent.
        self._shared_parts = (shared_parts,)  # in a tuple: it must not become a child of each layer
        self._shared: dict[str, str] = {}  # the names there
        self._made: list[str] = []  # of those, the ones that were not there before
        self.key_offset = nn.Parameter(torch.zeros(shape.num_heads, shape.key_dim))
        shared = SHARED_PARTS[config.sharing]
        network_is_shared = "output" in shared
        for name, build in self.builders(config).items():
            if name not in shared:
                self.add_module(name, build())
                continue
            # A projection network fits one shape; P', and a hidden layer shared without its output, fit all.
            fits_all = name == "virtual_tokens" or not network_is_shared
            key = name if fits_all else f"{name}_{shape.num_heads}x{shape.key_dim}x{shape.value_dim}"
            if key not in shared_parts:
                shared_parts[key] = build()
                self._made.append(name)
            self._shared[name] = key

    def parts(self) -> list[nn.Module]:
        """The modules whose own parameters the prefix depends on, shared ones included."""
        return [self, *self.children(), *map(self.part, self._shared)]

    def own_parts(self) -> list[nn.Module]:
        return [self, *(self.part(name) for name in self._made)]

    def part(self, name: str) -> Any:
        """Return `virtual_tokens`, `hidden` or `output`, this layer's own or the shared one, possibly in a wrapper."""
        return self._shared_parts[0][self._shared[name]] if name in self._shared else self.get_submodule(name)

    def take_over(self, parts: Collection[str]) -> None:
        self._made += [name for name, key in self._shared.items() if key in parts and name not in self._made]

    def shared_parts_made(self) -> list[str]:
        return [self._shared[name] for name in self._made]

    @torch.no_grad()
    def initialize_parameters(self, key_std: float | torch.Tensor, value_std: float) -> None:
        self.key_offset.zero_()
        for name in [name for name, _ in self.named_children()] + self._made:
            part = self.part(name)
            if isinstance(part, VirtualTokens):
                # rows of norm 1: with greater ones a step of the projection would move the prefix further than of "none"
                part.weight.normal_(std=part.weight.shape[1] ** -0.5)
            elif isinstance(part, nn.Linear):
                if name == "hidden":
                    part.weight.normal_(std=part.in_features**-0.5)
                else:
                    norm = self.norm_of_features(part.in_features)
                    keys, values = self.shape.split_columns(part.weight.T)
                    keys.normal_().unflatten(-1, self.key_offset.shape).mul_(
                        _per_head(key_std, self.key_offset) / norm
                    )
                    values.normal_(std=value_std / norm)
                if part.bias is not None:
                    part.bias.zero_()

    def key_source(self) -> nn.Module:
        return self.part("output")

    @torch.no_grad()
    def spread_keys(self, factors: torch.Tensor) -> None:
        output: Any = self.key_source()
        for parameter in output.parameters():  # the weight, and for an MLP the bias
            keys, _ = self.shape.split_columns(parameter if parameter.dim() == 1 else parameter.T)
            keys.unflatten(-1, self.key_offset.shape).mul_(factors.to(parameter)[:, None])

    @torch.no_grad()
    def shift_keys(self, offset: torch.Tensor) -> None:
        self.key_offset.add_(offset.to(self.key_offset))

    def produce(self) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.shape.split(_apply(self.part("output"), self.features()))
        return key + self.key_offset.to(key.device)[:, None], value


class LinearEncoder(ProjectedEncoder, reparameterization="linear"):
    """
    `reparameterization="linear"`: the features are the learned input P' itself.

        [E_K - o; E_V] = P' W_up
    """

    def builders(self, config: PrefixPlusConfig) -> dict[str, Callable[[], nn.Module]]:
        return {
            "virtual_tokens": lambda: VirtualTokens(config.num_virtual_tokens, config.encoder_dim),
            "output": lambda: nn.Linear(config.encoder_dim, self.shape.size, bias=False),
        }

    def features(self) -> torch.Tensor:
        produced: torch.Tensor = self.part("virtual_tokens")()
        return produced

    def norm_of_features(self, width: int) -> float:
        return 1.0


class MLPEncoder(ProjectedEncoder, reparameterization="mlp"):
    """
    `reparameterization="mlp"`: the features are the units of a hidden layer.

        [E_K - o; E_V] = W_2 act(W_1 P' + b_1) + b_2
    """

    has_hidden_layer = True

    def builders(self, config: PrefixPlusConfig) -> dict[str, Callable[[], nn.Module]]:
        self.activation = ACT2FN[config.encoder_activation]
        width = config.encoder_hidden_size or config.encoder_dim
        return {
            "virtual_tokens": lambda: VirtualTokens(config.num_virtual_tokens, config.encoder_dim),
            "hidden": lambda: nn.Linear(config.encoder_dim, width),
            "output": lambda: nn.Linear(width, self.shape.size),
        }

    def features(self) -> torch.Tensor:
        hidden: torch.Tensor = self.activation(_apply(self.part("hidden"), self.part("virtual_tokens")()))
        return hidden

    def norm_of_features(self, width: int) -> float:
        hidden: Any = self.part("hidden")
        units = self.activation(torch.randn(256, width, device="cpu") * hidden.in_features**-0.5)
        return float(units.norm(dim=-1).square().mean().sqrt()) or 1.0


def make_encoder(config: PrefixPlusConfig, shape: KVShape, shared_parts: nn.ModuleDict) -> PrefixEncoder:
    """Return the encoder that [`PrefixEncoder.from_config`] of the reparameterization's class makes."""
    return ENCODERS[str(config.reparameterization)].from_config(config, shape, shared_parts)


def _per_head(std: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    """Standard deviations (heads, key_dim) in a form that broadcasts to keys (heads, tokens, key_dim), and a number as it is."""
    if isinstance(std, torch.Tensor):
        std = std.to(like.device, like.dtype)
        return std if like.dim() == 2 else std[:, None]
    return std


def _apply(linear: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Apply a linear layer on its own device; layers that share one can be on other devices."""
    device = next(linear.parameters()).device
    is_offloaded = device.type == "meta"  # its hook brings it to the inputs
    return linear(inputs if is_offloaded else inputs.to(device))
