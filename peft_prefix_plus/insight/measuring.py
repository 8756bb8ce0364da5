"""How attention modules are measured: one forward, and the mean over the real queries for each query head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..adapters.lookup import base_of, prefix_layers
from ..attention import Observation, Prefix, attend_inline, observed_attention, watching
from ..layer import PrefixPlusLayer
from ..probing.modules import calls_attention_interface
from ..probing.recording import evaluating
from .real_queries import RealQueries


class JointPart(NamedTuple):
    """
    The part of an adapter in the softmax of the real tokens.

    Attributes:
        probabilities (`torch.Tensor`): Those of its positions, (batch, query_heads, tokens, prefix_tokens).
        value (`torch.Tensor`): Its values, (kv_heads, prefix_tokens, value_dim).
    """

    probabilities: torch.Tensor
    value: torch.Tensor

    def mass(self) -> torch.Tensor:
        """How much of the softmax falls on it, (batch, query_heads, tokens)."""
        return self.probabilities.double().sum(dim=-1)

    def output(self) -> torch.Tensor:
        """What it gives to the output, (batch, query_heads, tokens, value_dim)."""
        groups = self.probabilities.double().unflatten(1, (self.value.shape[0], -1))
        return (groups @ self.value.double().unsqueeze(1)).flatten(1, 2)


class AddedPart(NamedTuple):
    """
    The part of an adapter that is added to the attention over the real tokens.

    Attributes:
        prefix (`Prefix`): Its prefix.
        added (`torch.Tensor`): What it adds, (batch, query_heads, tokens, value_dim).
    """

    prefix: Prefix
    added: torch.Tensor

    def mass(self) -> torch.Tensor:
        """The factor that the attention of a prefix with a gate is added with, (batch, query_heads, tokens)."""
        assert self.prefix.gate is not None
        return self.prefix.gate.double().tanh().abs()[:, None].expand(self.added.shape[:-1])

    def output(self) -> torch.Tensor:
        """What it gives to the output, (batch, query_heads, tokens, value_dim)."""
        return self.added.double()


class Attended(NamedTuple):
    """
    A call of attention, taken apart.

    Attributes:
        output (`torch.Tensor`): Its output, (batch, query_heads, tokens, value_dim).
        measured (`list`): The parts of the adapters that are measured; at least one.
        others (`list`): Those of the other active adapters.
    """

    output: torch.Tensor
    measured: list[JointPart | AddedPart]
    others: list[JointPart | AddedPart]


Measure = Callable[[Attended], torch.Tensor]
"""Returns a number for each query, (batch, query_heads, tokens), of a call of attention."""


def layers_to_measure(model: nn.Module, adapter_name: str | None) -> dict[str, PrefixPlusLayer]:
    """
    Return the layers in which an adapter, or any, is active, by the names of their attention modules.

    Raises:
        ValueError: If there are none.
    """
    layers = {name: layer for name, layer in prefix_layers(base_of(model)) if active_adapters(layer, adapter_name)}
    if not layers or any(layer.disable_adapters for layer in layers.values()):
        wanted = "PREFIX_PLUS adapter" if adapter_name is None else f"PREFIX_PLUS adapter named {adapter_name!r}"
        raise ValueError(
            f"The model has no active {wanted}. Load one, or activate it by `set_adapter`, and call again."
        )
    return layers


def active_adapters(layer: PrefixPlusLayer, adapter_name: str | None = None) -> list[str]:
    """The adapters that take part in a layer's forward, in order; only the named one, if one is named."""
    active = [name for name in dict.fromkeys(layer.active_adapters) if name in layer.prefix_plus_encoder]
    return [name for name in active if adapter_name in (None, name)]


def mean_over_queries(
    measure: Measure, model: nn.Module, adapter_name: str | None, inputs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """
    Run a model once, without gradients and dropout, and measure its attention modules.

    Args:
        measure (`Measure`): What is measured of each query.
        model (`nn.Module`): A model with an adapter.
        adapter_name (`str`, *optional*): One of the active adapters; `None` means all of them together.
        inputs (`dict`): The model's inputs.

    Returns:
        `dict[str, torch.Tensor]`: By the attention module's name, the mean over the real queries, (query_heads,), on the CPU. It
        has the modules with an active prefix that the forward reaches.

    Raises:
        ValueError: If there is no active prefix, a mask does not tell which queries are real, or `adapter_names` gives the rows
            adapters of their own.
    """
    if inputs.get("adapter_names") is not None:
        raise ValueError(
            "`adapter_names` gives the rows adapters of their own, and a mean over such rows means nothing. Measure the "
            "rows of each adapter in a call of their own, with that adapter active."
        )
    layers = layers_to_measure(model, adapter_name)
    real_queries = RealQueries(base_of(model), inputs)
    means = {name: _Mean(measure, name, layer, adapter_name, real_queries) for name, layer in layers.items()}
    interface: dict[nn.Module, Callable[..., Any]] = {}
    inline: dict[nn.Module, Callable[..., Any]] = {}
    for name, layer in layers.items():
        observe = means[name].observe
        if calls_attention_interface(layer.attention):
            interface[layer.attention] = partial(observed_attention, observe)
        else:
            inline[layer.attention] = partial(attend_inline, observe=observe)
    with evaluating(model), watching(interface, inline):
        model(**inputs)
    return {name: mean.result() for name, mean in means.items() if mean.was_reached}


class _Mean:
    """
    The mean of a measure in one attention module, over all the times that a forward calls it.

    Args:
        measure (`Measure`): The measure.
        name (`str`): The module's name.
        layer (`PrefixPlusLayer`): Its layer.
        adapter_name (`str`, *optional*): The adapter, or all the active ones.
        real_queries (`RealQueries`): Which queries count.
    """

    @torch.no_grad()
    def __init__(
        self, measure: Measure, name: str, layer: PrefixPlusLayer, adapter_name: str | None, real_queries: RealQueries
    ) -> None:
        self.name = name
        self.was_reached = False
        self._measure = measure
        self._real_queries = real_queries
        active = active_adapters(layer)
        self._joint = [each for each in active if layer.is_joint(each)]
        self._lengths = [layer.prefix_key_value(each)[0].shape[1] for each in self._joint]
        self._added = [each for each in active if not layer.is_joint(each)]
        self._measured = active_adapters(layer, adapter_name)
        self._sum: Any = 0.0
        self._count = 0
        self._dtype = torch.float32

    def observe(self, observation: Observation) -> None:
        """Take in one call."""
        self.was_reached = True
        of_queries = self._measure(self._taken_apart(observation))
        is_real = self._real_queries.of_module(self.name, *of_queries.shape[::2]).to(of_queries.device)
        self._sum = self._sum + of_queries.masked_fill(~is_real[:, None], 0.0).sum(dim=(0, 2)).cpu()
        self._count += int(is_real.sum())
        self._dtype = torch.promote_types(observation.output.dtype, torch.float32)

    def _taken_apart(self, observation: Observation) -> Attended:
        parts: dict[str, JointPart | AddedPart] = {}
        if observation.prefix is not None and observation.probabilities is not None:
            probabilities = observation.probabilities.split(self._lengths, dim=-1)
            values = observation.prefix.value.split(self._lengths, dim=1)
            parts.update(zip(self._joint, map(JointPart, probabilities, values), strict=True))
        parts.update(zip(self._added, (AddedPart(*each) for each in observation.added), strict=True))
        return Attended(
            observation.output,
            [part for name, part in parts.items() if name in self._measured],
            [part for name, part in parts.items() if name not in self._measured],
        )

    def result(self) -> torch.Tensor:
        """The mean for each query head, (query_heads,)."""
        return (self._sum / self._count).to(self._dtype)
