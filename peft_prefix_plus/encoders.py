"""The reparameterizations: what turns an adapter's parameters into the prefix (P_K, P_V) of one attention module."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN


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
        num_heads, key_dim, value_dim = self
        key, value = flat.split([num_heads * key_dim, num_heads * value_dim], dim=-1)
        return (
            key.unflatten(-1, (num_heads, key_dim)).transpose(0, 1),
            value.unflatten(-1, (num_heads, value_dim)).transpose(0, 1),
        )


DEFAULT_STD = 0.02
"""Standard deviation of a prefix started with `init_weights=True`."""

PARTS = ("virtual_tokens", "hidden", "output")
"""The parts of a [`ProjectedEncoder`], in the order that they are made in."""

SHARED_PARTS = {
    "none": (),
    "input": ("virtual_tokens", "hidden"),
    "projection": ("hidden", "output"),
    "all": ("virtual_tokens", "hidden", "output"),
}
"""Which parts of the encoder the layers share, by `sharing`."""


def target_std(init_weights: bool | str) -> float:
    """The standard deviation of a prefix under `init_weights` (0 for zeros)."""
    if init_weights == "zero":
        return 0.0
    return DEFAULT_STD if init_weights is True else 1.0


class DirectEncoder(nn.Module):
    """
    `reparameterization="none"`: the keys and values are the parameters.

    Args:
        num_virtual_tokens (`int`): The length of the prefix.
        shape (`KVShape`): The shape of the attention module's keys and values.
    """

    def __init__(self, num_virtual_tokens: int, shape: KVShape) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(shape.num_heads, num_virtual_tokens, shape.key_dim))
        self.value = nn.Parameter(torch.empty(shape.num_heads, num_virtual_tokens, shape.value_dim))

    def parts(self) -> list[nn.Module]:
        """The modules whose own parameters the prefix depends on."""
        return [self]

    @classmethod
    def holding(cls, key: torch.Tensor, value: torch.Tensor) -> DirectEncoder:
        """Return the encoder of given keys (heads, tokens, key_dim) and values (heads, tokens, value_dim)."""
        encoder = cls(key.shape[1], KVShape(key.shape[0], key.shape[2], value.shape[2]))
        encoder.key, encoder.value = nn.Parameter(key), nn.Parameter(value)
        return encoder

    @torch.no_grad()
    def initialize_parameters(self, init_weights: bool | str) -> None:
        std = target_std(init_weights)
        self.key.normal_(std=std)
        self.value.normal_(std=std)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys (heads, tokens, key_dim) and the values (heads, tokens, value_dim)."""
        return self.key, self.value


class VirtualTokens(nn.Module):
    """The learned input P' of a reparameterization, (tokens, encoder_dim)."""

    def __init__(self, num_virtual_tokens: int, encoder_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_virtual_tokens, encoder_dim))

    def forward(self) -> torch.Tensor:
        return self.weight


class ProjectedEncoder(nn.Module):
    """
    `reparameterization="linear"` or `"mlp"`: the keys and values are a projection of the learned input P'.

        linear:  P = P' W_up            mlp:  P = W_2 act(W_1 P' + b_1) + b_2

    Parts that layers share are modules of the first layer that uses them; the others refer to them without registering
    them, so that every parameter has one name.

    Args:
        num_virtual_tokens (`int`): The length of the prefix.
        shape (`KVShape`): The shape of the attention module's keys and values.
        encoder_dim (`int`): k, the width of P'.
        hidden_size (`int`, *optional*): The hidden width of the MLP; `None` for the linear reparameterization.
        activation (`str`): The MLP's activation.
        sharing (`str`): What the layers share.
        shared_parts (`MutableMapping`): The parts that earlier layers of the same adapter have made; added to.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        shape: KVShape,
        encoder_dim: int,
        hidden_size: int | None,
        activation: str,
        sharing: str,
        shared_parts: MutableMapping[tuple[str, KVShape | None], nn.Module],
    ) -> None:
        super().__init__()
        self.shape = shape
        self.activation = ACT2FN[activation] if hidden_size is not None else None
        self._borrowed: dict[str, nn.Module] = {}
        width = encoder_dim if hidden_size is None else hidden_size
        builders = {
            "virtual_tokens": lambda: VirtualTokens(num_virtual_tokens, encoder_dim),
            "hidden": lambda: nn.Linear(encoder_dim, width),
            "output": lambda: nn.Linear(width, shape.size, bias=hidden_size is not None),
        }
        if hidden_size is None:
            del builders["hidden"]
        network_is_shared = "output" in SHARED_PARTS[sharing]
        for name, build in builders.items():
            if name not in SHARED_PARTS[sharing]:
                self.add_module(name, build())
                continue
            # A projection network fits one shape; P', and a hidden layer shared without its output, fit all.
            key = (name, shape if network_is_shared and name != "virtual_tokens" else None)
            if key in shared_parts:
                self._borrowed[name] = shared_parts[key]
            else:
                self.add_module(name, build())
                shared_parts[key] = self.get_submodule(name)

    def parts(self) -> list[nn.Module]:
        """The modules whose own parameters the prefix depends on, shared ones included."""
        return [*self.children(), *self._borrowed.values()]

    def part(self, name: str) -> nn.Module:
        """Return `virtual_tokens`, `hidden` or `output`, this layer's own or the one it shares."""
        return self._borrowed[name] if name in self._borrowed else self.get_submodule(name)

    def take_over(self, parts: Collection[nn.Module]) -> None:
        """Make those of the parts that this layer refers to its own: the layer that they were modules of is to go."""
        for name in [name for name, part in self._borrowed.items() if part in parts]:
            self.add_module(name, self._borrowed.pop(name))
        for name in PARTS:  # an optimizer's saved state goes by the order of the parameters
            if name in self._modules:
                self._modules[name] = self._modules.pop(name)

    @torch.no_grad()
    def initialize_parameters(self, init_weights: bool | str) -> None:
        """Fill the parameters that this layer owns so that the produced prefix has the standard deviation asked for."""
        for name, part in self.named_children():
            if isinstance(part, VirtualTokens):
                part.weight.normal_()
            elif isinstance(part, nn.Linear):
                if name == "hidden":
                    part.weight.normal_(std=part.in_features**-0.5)
                else:
                    part.weight.normal_(std=target_std(init_weights) / self._norm_of_activations(part.in_features))
                if part.bias is not None:
                    part.bias.zero_()

    def _norm_of_activations(self, width: int) -> float:
        """The norm that what the output projection reads has at the start, on average."""
        inputs = torch.randn(256, width)
        if self.activation is not None:
            inputs = self.activation(inputs)
        return inputs.norm(dim=-1).square().mean().sqrt().item() or 1.0

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys (heads, tokens, key_dim) and the values (heads, tokens, value_dim)."""
        produced = self.part("virtual_tokens")()
        if self.activation is not None:
            produced = self.activation(_apply(self.part("hidden"), produced))
        return self.shape.split(_apply(self.part("output"), produced))


def _apply(linear: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Apply a linear layer where it lies: layers that share one can be on other devices."""
    device = next(linear.parameters()).device
    is_offloaded = device.type == "meta"  # its hook brings it to the inputs
    return linear(inputs if is_offloaded else inputs.to(device))
