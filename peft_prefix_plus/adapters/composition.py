"""Combining several adapters into one: their prefixes concatenated, or a weighted sum of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..registration import METHOD_NAME
from ..starting.fitting import KeyValue
from .lookup import layers_with_adapter


if TYPE_CHECKING:
    from ..config import PrefixPlusConfig


COMBINATIONS = ("cat", "linear")
"""The ways to make several adapters into one."""

FORM = ("gating", "decoupled", "position_free")
"""The fields that say how a prefix takes part in attention."""


def compose(model: nn.Module, adapters: Sequence[str], new: str) -> None:
    """
    Concatenate the prefixes of several adapters into a new adapter, which is saved as one file. With it active, the
    model's output is that with all of them active at once. It has `reparameterization="none"` and is not active yet.
    The others stay.

    Args:
        model (`nn.Module`): A `PeftModel` or a [`PrefixPlusModel`] with the adapters.
        adapters (`Sequence[str]`): Their names, at least two, in the order of concatenation.
        new (`str`): The name of the new adapter.

    Raises:
        TypeError: If the model has no tuner of PREFIX_PLUS.
        ValueError: If there is no adapter of a name, `new` is taken, or the adapters' forms differ. The model is then
            as it was.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, compose

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig(num_virtual_tokens=10), adapter_name="manual")
    >>> model.add_adapter("examples", PrefixPlusConfig(num_virtual_tokens=4))
    >>> compose(model, ["manual", "examples"], new="both")
    >>> model.set_adapter("both")
    >>> model.peft_config["both"].num_virtual_tokens
    14

    ```
    """
    tuner: Any = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, BaseTuner) or tuner.prefix != f"{METHOD_NAME}_":
        raise TypeError(f"`model` must be a PeftModel with PREFIX_PLUS adapters, got {type(model).__name__}.")
    if len(adapters) < 2:
        raise ValueError(f"`adapters` must be at least two names, got {list(adapters)!r}.")
    tuner.add_weighted_adapter(list(adapters), [1.0] * len(adapters), new, combination_type="cat")


def check_combination(
    configs: Mapping[str, Any], adapters: Sequence[str], weights: Sequence[float], new: str, combination_type: str
) -> None:
    """
    Raise if adapters cannot be combined.

    Args:
        configs (`Mapping[str, PeftConfig]`): The configurations of all adapters of the model.
        adapters (`Sequence[str]`): The adapters, each of which is among them.
        weights (`Sequence[float]`): Their weights.
        new (`str`): The name of the new adapter.
        combination_type (`str`): `"cat"` or `"linear"`.
    """
    if combination_type not in COMBINATIONS:
        raise ValueError(f"`combination_type` must be one of {COMBINATIONS}, got {combination_type!r}.")
    if new in configs:
        raise ValueError(f"There is an adapter named {new!r} already. Choose another name, or delete it first.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"`adapters` and `weights` must have one entry for each adapter, got {len(adapters)} and {len(weights)}."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"`weights` must be finite numbers, got {list(weights)!r}.")
    if combination_type == "cat" and any(weight != 1.0 for weight in weights):
        raise ValueError(
            f'With combination_type="cat" all `weights` must be 1, got {list(weights)!r}: prefixes that stand one after the other '
            'share one softmax, in which a prefix has no weight. Use combination_type="linear" for a weighted sum.'
        )
    first, *others = (configs[name] for name in adapters)
    for name, config in zip(adapters[1:], others, strict=True):
        for field in FORM:
            if getattr(config, field) != getattr(first, field):
                raise ValueError(
                    f"Only adapters of one form can be made into one: {adapters[0]!r} has {field}={getattr(first, field)} and "
                    f"{name!r} has {field}={getattr(config, field)}. Make them with the same {field}, or activate both."
                )
    if combination_type == "cat" and first.gating:
        raise ValueError(
            "Adapters with gating=True have a softmax and gates of their own each, which one adapter does not: they cannot be put one "
            "after the other. Activate all of them."
        )
    saved = [name for name in adapters if configs[name].modules_to_save]
    if saved:
        raise ValueError(
            f"Adapter {saved[0]!r} has modules of its own that are saved in full "
            f"({', '.join(configs[saved[0]].modules_to_save)}), and which of several would count is not known. Only adapters "
            "without `modules_to_save` can be made into one."
        )


@torch.no_grad()
def combined_prefixes(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], combination_type: str
) -> tuple[dict[str, KeyValue], dict[str, torch.Tensor]]:
    """
    Return the keys and values of a combination, by attention module, and the gates, if the adapters have any.

    Raises:
        ValueError: If the adapters are in different modules or, for a sum, have different lengths.
    """
    layers = {adapter: dict(layers_with_adapter(model, adapter)) for adapter in adapters}
    names = list(layers[adapters[0]])
    for adapter in adapters[1:]:
        if set(layers[adapter]) != set(names):
            odd = sorted(set(layers[adapter]).symmetric_difference(names))
            raise ValueError(
                f"Only adapters in the same attention modules can be made into one: of {adapters[0]!r} and {adapter!r}, only one "
                f"has a prefix in {', '.join(odd)}."
            )
    prefixes: dict[str, KeyValue] = {}
    gates: dict[str, torch.Tensor] = {}
    for name in names:
        pairs = [layers[adapter][name].prefix_key_value(adapter) for adapter in adapters]
        if combination_type == "cat":
            prefixes[name] = (
                torch.cat([key for key, _ in pairs], dim=1),
                torch.cat([value for _, value in pairs], dim=1),
            )
            continue
        lengths = [key.shape[1] for key, _ in pairs]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"A weighted sum needs prefixes of one length; those of {', '.join(map(repr, adapters))} have "
                f"num_virtual_tokens = {', '.join(map(str, lengths))}."
            )
        prefixes[name] = _sum([key for key, _ in pairs], weights), _sum([value for _, value in pairs], weights)
        if adapters[0] in layers[adapters[0]][name].prefix_plus_gate:
            gates[name] = _sum([layers[adapter][name].prefix_plus_gate[adapter] for adapter in adapters], weights)
    return prefixes, gates


def _sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return torch.stack([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]).sum(dim=0)


def combined_config(configs: Sequence[Any], num_tokens: int) -> PrefixPlusConfig:
    """Return the configuration of a combination of adapters."""
    config: Any = replace(
        configs[0],
        num_virtual_tokens=num_tokens,
        reparameterization="none",
        encoder_hidden_size=None,
        prefix_scaling=None,  # measured anew: a power of two, which rounds nothing
        inference_mode=all(each.inference_mode for each in configs),
    )
    return config
