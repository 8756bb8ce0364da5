"""Fewer layers: choosing which of an adapter's to keep, and removing the prefix from the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..adapters.lookup import base_of, layers_with_adapter
from ..adapters.shared import shared_parts
from ..adapters.snapshot import all_or_nothing
from ..config import PrefixPlusConfig
from ..encoders import NotTrained
from ..layer import PrefixPlusLayer, detach
from ..probing.recording import evaluating
from ..probing.targets import layer_of, restrict_to_layers, select_modules


IGNORED_LABEL = -100

Batch = Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class LayerSuggestion:
    """
    What [`suggest_layers`] found. Printed, it is a table.

    Attributes:
        layers (`list[int]`): The layers to keep, in order.
        loss_increases (`dict[int, float]`): For every layer, how much the loss rises if its prefix alone is removed.
        loss (`float`): The loss with all of the prefix.
        loss_of_kept (`float`): The loss with the prefix of the layers to keep.
        parameters (`int`): The parameters of all of the prefix.
        parameters_of_kept (`int`): Those of the layers to keep.
    """

    layers: list[int]
    loss_increases: dict[int, float]
    loss: float
    loss_of_kept: float
    parameters: int
    parameters_of_kept: int

    def __repr__(self) -> str:
        lines = ["layer    loss rises by  keep"]
        for layer, increase in self.loss_increases.items():
            lines.append(f"{layer:>5}  {increase:>+15.6f}  {'yes' if layer in self.layers else 'no'}")
        lines.append(f"loss: {self.loss:.6f} with all layers, {self.loss_of_kept:.6f} with those kept")
        lines.append(f"parameters: {self.parameters:,} in all layers, {self.parameters_of_kept:,} in those kept")
        return "\n".join(lines)


def suggest_layers(
    model: nn.Module,
    data: Iterable[Batch],
    budget: float,
    adapter_name: str = "default",
    greedy: bool = False,
) -> LayerSuggestion:
    """
    Find out which layers' prefixes matter most for the loss, and which to keep within a budget of parameters. The loss
    is measured once with the whole prefix, and once without each layer's. The layers whose removal raises it most are
    kept, as many as fit the budget; parameters that layers share count once. Pass the result to [`prune_layers`].

    Args:
        model (`nn.Module`): A model with the adapter, active. It is left as it was.
        data (`Iterable[Mapping]`): Batches of the model's inputs with `labels`. They are kept and used many times.
        budget (`int` or `float`): The most parameters to keep, or a fraction of the adapter's in (0, 1].
        adapter_name (`str`, defaults to `"default"`): The adapter.
        greedy (`bool`, defaults to `False`): Remove one layer at a time, always the one whose removal raises the loss
            least, until the rest fits. This accounts for layers that can replace each other, and measures the loss
            about N²/2 times for N layers instead of N times.

    Returns:
        [`LayerSuggestion`]: The layers to keep, by the numbers that `layers_to_transform` counts with, and what was measured.

    Raises:
        TypeError: If the budget is no number.
        ValueError: If the adapter is missing or not active, the budget is out of range or too small for any layer, the data
            have no labels, or a prefix lies outside the numbered layers.

    Example:

    ```py
    >>> import torch
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, prune_layers, suggest_layers

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
    >>> tokens = torch.randint(3, 100, (2, 8))
    >>> suggestion = suggest_layers(model, [{"input_ids": tokens, "labels": tokens}], budget=0.5)
    >>> len(suggestion.layers), suggestion.parameters, suggestion.parameters_of_kept
    (2, 5120, 2560)
    >>> prune_layers(model, suggestion.layers)
    >>> model.peft_config["default"].layers_to_transform == suggestion.layers
    True

    ```
    """
    members = _layers_by_number(model, adapter_name)
    for name, layer in layers_with_adapter(model, adapter_name):
        if adapter_name not in layer.active_adapters or layer.disable_adapters:
            raise ValueError(
                f"The adapter {adapter_name!r} is not active in {name}, so its effect cannot be measured. Activate it by "
                f"model.set_adapter({adapter_name!r})."
            )
    parameters = {number: _parameters_of(layers, adapter_name) for number, layers in members.items()}
    limit = _number_of_parameters(budget, _count(parameters, members))
    smallest = min(members, key=lambda number: _count(parameters, [number]))
    if _count(parameters, [smallest]) > limit:
        raise ValueError(
            f"`budget` is {budget!r}, which allows {limit:,} parameters, but layer {smallest} alone has "
            f"{_count(parameters, [smallest]):,}. Use a larger budget, or an adapter with fewer parameters per layer."
        )
    batches = list(data)
    weights = [_number_of_labels(model, batch) for batch in batches]
    if not sum(weights):
        raise ValueError(
            f"`data` has {len(batches)} batches without a single label that counts; expected at least one."
        )

    def loss_of(kept: Collection[int]) -> float:
        hidden = [layer for number, layers in members.items() if number not in kept for layer in layers]
        with ExitStack() as stack:
            for layer in hidden:
                stack.enter_context(layer.hiding(adapter_name))
            return _mean_loss(model, batches, weights)

    with evaluating(model):
        loss = loss_of(members)
        losses = {number: loss_of(members.keys() - {number}) for number in members}
        choose = _kept_greedily if greedy else _kept_by_rank
        kept = choose(losses, lambda numbers: _count(parameters, numbers) <= limit, loss_of)
        loss_of_kept = loss if len(kept) == len(members) else loss_of(kept)
    increases = {number: without - loss for number, without in losses.items()}
    return LayerSuggestion(kept, increases, loss, loss_of_kept, _count(parameters, members), _count(parameters, kept))


def prune_layers(model: nn.Module, layers: int | Iterable[int], adapter_name: str = "default") -> None:
    """
    Keep an adapter's prefix in these layers only, in place.

    The output is then that with the other layers' prefixes hidden, and a layer without any adapter is the base model's
    again. `layers_to_transform` of the adapter's config lists the remaining layers, so the adapter is saved and loaded
    like any other. Parts that layers share pass to the first remaining layer. The remaining parameters are the same
    objects, and an optimizer keeps its state for them. It skips the removed ones, which have no gradient; to free
    their memory, make a new optimizer.

    Args:
        model (`nn.Module`): A model with the adapter.
        layers (`int` or `Iterable[int]`): The layers to keep, by the numbers that `layers_to_transform` counts with.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Raises:
        TypeError: If a layer is no int.
        ValueError: If the adapter is missing, has no prefix in one of the layers, chooses its modules by a regular
            expression, or has modules that layer numbers cannot distinguish from others. The model is then left as it
            was.
    """
    found = dict(layers_with_adapter(model, adapter_name))
    configs: Any = model.peft_config
    config: PrefixPlusConfig = configs[adapter_name]
    is_pattern = isinstance(config.target_modules, str)
    if is_pattern:
        raise ValueError(
            f"The adapter {adapter_name!r} has the regular expression {config.target_modules!r} for `target_modules`, which "
            "names the layers itself, so `layers_to_transform` cannot name them too. Give `target_modules` as a list of "
            "suffixes when making the adapter."
        )
    pruned = replace(config, layers_to_transform=[layers] if isinstance(layers, int) else list(layers))
    pruned.layers_to_transform = sorted(set(pruned.layers_to_transform))  # type: ignore[arg-type]
    base = base_of(model)
    kept = restrict_to_layers(base, found, pruned)
    with all_or_nothing(model, adapter_name=adapter_name):
        differing = sorted(set(select_modules(base, pruned).modules).symmetric_difference(kept))
        if differing:
            raise ValueError(
                f"`layers_to_transform`={pruned.layers_to_transform} cannot say which modules of the adapter {adapter_name!r} "
                f"are left: it would choose {differing[0]} too, which has no prefix of the adapter now. Keep other layers, or "
                "make an adapter with these."
            )
        gone = [layer for name, layer in found.items() if name not in kept]
        orphans: set[str] = set()
        for layer in gone:
            orphans.update(layer.encoder(adapter_name).shared_parts_made())
            for parameter in layer.adapter_parameters(adapter_name):
                parameter.grad = None
            layer.remove_adapter(adapter_name)
            if not layer.prefix_plus_encoder:
                detach(layer.attention)
        for name in kept:
            encoder = found[name].encoder(adapter_name)
            encoder.take_over(orphans)
            orphans.difference_update(encoder.shared_parts_made())
        for name in orphans:  # of a shape that no layer has any more
            del shared_parts(base, adapter_name)[name]
        configs[adapter_name] = pruned


# ---------------------------------------------------------------------------------------------------- measuring


def _layers_by_number(model: nn.Module, adapter_name: str) -> dict[int, list[PrefixPlusLayer]]:
    """Return an adapter's layers by the number of the model's layer that they lie in, in order."""
    configs: Any = model.peft_config
    found: dict[int, list[PrefixPlusLayer]] = {}
    for name, layer in layers_with_adapter(model, adapter_name):
        stack, number = layer_of(name, configs[adapter_name].layers_pattern)
        if stack is None:
            raise ValueError(
                f"The prefix of {name} lies outside the numbered layers, so `layers_to_transform` cannot name it. Leave it "
                "out by `exclude_modules` when making the adapter."
            )
        found.setdefault(number, []).append(layer)
    return dict(sorted(found.items()))


def _parameters_of(layers: Iterable[PrefixPlusLayer], adapter_name: str) -> set[nn.Parameter]:
    """The parameters that an adapter's prefixes in some layers learn, shared ones included."""
    parameters: set[nn.Parameter] = set()
    for layer in layers:
        for part in layer.encoder(adapter_name).parts():
            if not isinstance(part, NotTrained):
                parameters.update(part.parameters(recurse=False))
        if adapter_name in layer.prefix_plus_gate:
            parameters.add(layer.prefix_plus_gate[adapter_name])
    return parameters


def _count(parameters: Mapping[int, set[nn.Parameter]], numbers: Iterable[int]) -> int:
    """How many numbers the parameters of some layers have, each parameter once."""
    needed: set[nn.Parameter] = set().union(*(parameters[number] for number in numbers))
    return sum(parameter.numel() for parameter in needed)


def _number_of_parameters(budget: float, total: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"`budget` must be a number of parameters or a fraction, got {budget!r}.")
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise ValueError(f"`budget` as a fraction must be in (0, 1], got {budget}. A number of parameters is an int.")
    if isinstance(budget, int) and budget < 1:
        raise ValueError(f"`budget` must be at least 1, got {budget}.")
    return int(budget * total) if isinstance(budget, float) else budget


def _number_of_labels(model: nn.Module, batch: Batch) -> int:
    """The number of labels that a batch's mean loss covers."""
    has_labels = isinstance(batch, Mapping) and isinstance(batch.get("labels"), torch.Tensor)
    if not has_labels:
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"`data` must have batches of inputs with the tensor `labels`, got {found}.")
    labels = batch["labels"]
    base: Any = base_of(model)
    if base.can_generate() and not base.config.is_encoder_decoder:
        labels = labels[..., 1:]  # a causal model's first token is predicted from nothing
    return int((labels != IGNORED_LABEL).sum())


def _mean_loss(model: nn.Module, batches: Sequence[Batch], weights: Sequence[int]) -> float:
    """The mean of the loss over the labels of all batches."""
    device = next(model.parameters()).device
    total = 0.0
    for batch, weight in zip(batches, weights, strict=True):
        if not weight:
            continue
        inputs = {name: item.to(device) if isinstance(item, torch.Tensor) else item for name, item in batch.items()}
        loss = getattr(model(**inputs), "loss", None)
        if loss is None:
            raise ValueError(f"{type(base_of(model)).__name__} returns no loss for the inputs {sorted(batch)}.")
        total += loss.item() * weight
    return total / sum(weights)


# ---------------------------------------------------------------------------------------------------- choosing

Fits = Callable[[Collection[int]], bool]
LossOf = Callable[[Collection[int]], float]


def _kept_by_rank(losses: Mapping[int, float], fits: Fits, loss_of: LossOf) -> list[int]:
    """The layers whose removal raises the loss most, as far as each still fits."""
    kept: list[int] = []
    for number in sorted(losses, key=lambda number: -losses[number]):
        if fits([*kept, number]):
            kept.append(number)
    return sorted(kept)


def _kept_greedily(losses: Mapping[int, float], fits: Fits, loss_of: LossOf) -> list[int]:
    """
    The layers that remain after repeatedly removing the one whose removal raises the loss least, until the rest fits.
    """
    kept = list(losses)
    while not fits(kept):
        if len(kept) < len(losses):
            losses = {number: loss_of([other for other in kept if other != number]) for number in kept}
        # never so that only layers are left that are too large by themselves
        removable = [number for number in kept if any(fits([other]) for other in kept if other != number)]
        kept.remove(min(removable, key=lambda number: losses[number]))
    return sorted(kept)
