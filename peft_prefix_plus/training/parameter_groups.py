"""
Groups of parameters for an optimizer, so that keys, values, gates and projections can have their own learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..encoders import untrained_parameters
from ..layer import PrefixPlusLayer


KINDS = ("keys", "values", "gates", "projection", "other")


def prefix_plus_param_groups(
    model: nn.Module,
    lr: float,
    key_lr: float | None = None,
    value_lr: float | None = None,
    gate_lr: float | None = None,
    projection_lr: float | None = None,
    weight_decay: float = 0.0,
    adapter_name: str | None = None,
) -> list[dict[str, Any]]:
    """
    Return the trainable parameters in groups for the optimizers of `torch.optim`.

    A group's `name` is `"keys"`, `"values"`, `"gates"`, `"projection"` (P' and the network of a reparameterization) or
    `"other"` (everything else that is trainable: `modules_to_save`, other adapters). The last two groups' vectors and
    scalars, mostly biases, are in `"projection_no_decay"` and `"other_no_decay"`. These and gates have no weight
    decay. Every trainable parameter is in one group, except the scales and the starts of keys, whose gradient is zero. No group
    is empty.

    Args:
        model (`nn.Module`): A model with PREFIX_PLUS adapters.
        lr (`float`): The learning rate of every group without its own.
        key_lr (`float`, *optional*): The rate of the keys.
        value_lr (`float`, *optional*): The rate of the values.
        gate_lr (`float`, *optional*): The rate of the gates.
        projection_lr (`float`, *optional*): The rate of the projection.
        weight_decay (`float`, defaults to 0.0): The weight decay of all but gates, biases and other vectors.
        adapter_name (`str`, *optional*):
            Leave out what belongs to other PREFIX_PLUS adapters. `None` takes everything that is trainable.

    Returns:
        `list[dict]`: The groups, each with `name`, `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: If a rate is negative or not finite, or is given for something that is not trained: keys and
            values have no parameters of their own under a reparameterization. If nothing is trainable, or the model has
            no such adapter.

    Example:

    ```py
    >>> import torch
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, prefix_plus_param_groups

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig(task_type="CAUSAL_LM"))
    >>> groups = prefix_plus_param_groups(model, lr=1e-2, key_lr=5e-2)
    >>> {group["name"]: (len(group["params"]), group["lr"]) for group in groups}
    {'keys': (2, 0.05), 'values': (2, 0.01)}
    >>> optimizer = torch.optim.AdamW(groups)

    ```
    """
    given = {
        "keys": ("key_lr", key_lr),
        "values": ("value_lr", value_lr),
        "gates": ("gate_lr", gate_lr),
        "projection": ("projection_lr", projection_lr),
    }
    _check_number("lr", lr)
    _check_number("weight_decay", weight_decay)
    for argument, rate in given.values():
        if rate is not None:
            _check_number(argument, rate)

    left_out = set() if adapter_name is None else set(_parameters_of_others(model, adapter_name))
    left_out |= untrained_parameters(model)
    kinds = {parameter: kind for _, kind, parameter in _prefix_parameters(model)}
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    for parameter in model.parameters():  # yields a shared parameter once
        if parameter.requires_grad and parameter not in left_out:
            members[kinds.get(parameter, "other")].append(parameter)
    if not any(members.values()):
        raise ValueError(
            "The model has no trainable parameter"
            + (f" of adapter {adapter_name!r}" if adapter_name is not None else "")
            + ". Load a saved adapter with `is_trainable=True`, or make the adapter active by `set_adapter`."
        )
    for kind, (argument, rate) in given.items():
        if rate is not None:
            _check_is_trained(kind, argument, rate, members)

    groups = []
    for kind, parameters in members.items():
        rate = given[kind][1] if kind in given else None
        rate = lr if rate is None else rate
        for name, members_of_group in _by_decay(kind, parameters):
            decay = 0.0 if kind == "gates" or name.endswith("_no_decay") else weight_decay
            groups.append({"name": name, "params": members_of_group, "lr": rate, "weight_decay": decay})
    return groups


def _prefix_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield the parameters of all prefixes, each with its adapter's name and its kind; shared ones more than once."""
    for layer in model.modules():
        if not isinstance(layer, PrefixPlusLayer):
            continue
        for adapter_name in layer.prefix_plus_encoder:
            for kind, parameter in layer.encoder(adapter_name).parameters_by_kind():
                yield adapter_name, kind, parameter
        for adapter_name, gate in layer.prefix_plus_gate.items():
            yield adapter_name, "gates", gate


def _parameters_of_others(model: nn.Module, adapter_name: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of other adapters: their prefixes, and their copies of whole modules."""
    owned = list(_prefix_parameters(model))
    names = {owner for owner, _, _ in owned}
    if adapter_name not in names:
        raise ValueError(
            f"There is no PREFIX_PLUS adapter named {adapter_name!r} in the model; it has {sorted(names)}."
        )
    yield from (parameter for owner, _, parameter in owned if owner != adapter_name)
    for module in model.modules():
        saved = getattr(module, "modules_to_save", {}) if isinstance(module, AuxiliaryTrainingWrapper) else {}
        for other in names & set(saved) - {adapter_name}:
            yield from saved[other].parameters()


def _by_decay(kind: str, parameters: list[nn.Parameter]) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Yield the groups of a kind that have members: biases and other vectors apart where there are matrices too."""
    if kind not in ("projection", "other"):
        parts = {kind: parameters}
    else:
        parts = {
            kind: [parameter for parameter in parameters if parameter.ndim > 1],
            f"{kind}_no_decay": [parameter for parameter in parameters if parameter.ndim <= 1],
        }
    yield from ((name, members) for name, members in parts.items() if members)


def _check_number(argument: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{argument}` must be a finite number that is not negative, got {value}.")


def _check_is_trained(kind: str, argument: str, rate: float, members: dict[str, list[nn.Parameter]]) -> None:
    """Raise if a rate is given for parameters that are not trained, or that it would cover only in part."""
    if kind in ("keys", "values") and members["projection"]:
        raise ValueError(
            f"`{argument}` is {rate}, but an adapter with a reparameterization is trained: one matrix produces both its "
            "keys and its values, so they cannot have different rates. Use `projection_lr`, or reparameterization='none' (`flatten` "
            "converts an adapter)."
        )
    if not members[kind]:
        trained = [name for name, parameters in members.items() if parameters]
        raise ValueError(f"`{argument}` is {rate}, but no {kind} are trained, only {', '.join(trained)}.")
