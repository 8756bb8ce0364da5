"""The reparameterizations that project a smaller learned input, and can share the projection between layers: "linear" and "mlp"."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .base import KVShape, PrefixEncoder, per_head


if TYPE_CHECKING:
    from ..config import PrefixPlusConfig


SHARED_PARTS = {
    "none": (),
    "input": ("virtual_tokens", "hidden"),
    "projection": ("hidden", "output"),
    "all": ("virtual_tokens", "hidden", "output"),
}
"""Which parts of the encoder the layers share, by `sharing`."""


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
                    keys.normal_().unflatten(-1, self.key_offset.shape).mul_(per_head(key_std, self.key_offset) / norm)
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


def _apply(linear: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Apply a linear layer on its own device; layers that share one can be on other devices."""
    device = next(linear.parameters()).device
    is_offloaded = device.type == "meta"  # its hook brings it to the inputs
    return linear(inputs if is_offloaded else inputs.to(device))
