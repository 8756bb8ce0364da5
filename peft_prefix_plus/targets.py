"""Which attention modules an adapter prefixes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from peft.utils.other import match_target_against_key
from torch import nn

from .attention import UNSUPPORTED
from .config import PrefixPlusConfig
from .geometry import AttentionGeometry, attention_modules, probe
from .registration import METHOD_NAME


@dataclass(frozen=True)
class Selection:
    """
    The attention modules that an adapter prefixes.

    Attributes:
        modules (`dict[str, AttentionGeometry]`): The chosen modules by name, in the model's order.
        excluded (`frozenset[str]`): Attention modules that `exclude_modules` left out.
    """

    modules: dict[str, AttentionGeometry]
    excluded: frozenset[str]


def select_modules(model: nn.Module, config: PrefixPlusConfig) -> Selection:
    """
    Choose the attention modules that a configuration names, and determine their geometry.

    Args:
        model (`nn.Module`): The model, which is left as it is.
        config (`PrefixPlusConfig`): The configuration.

    Raises:
        ValueError: If the model has no attention modules, or the configuration names none or some that do not exist.
    """
    candidates = _candidates(model)
    for field in ("target_modules", "exclude_modules"):
        _check_names(model, candidates, field, getattr(config, field))
    targets = config.target_modules
    named = [] if targets is None else [name for name in candidates if _matches(targets, name)]
    excluded = [name for name in candidates if config.exclude_modules and _matches(config.exclude_modules, name)]
    named = [name for name in named if name not in excluded]
    geometries = probe(model, wanted=named)
    chosen = [name for name in geometries if name not in excluded] if targets is None else named
    if not chosen:
        raise ValueError(f"`exclude_modules` is {config.exclude_modules!r}, which leaves no attention module.")
    kinds = {"self", *(["encoder"] if config.encoder_prefix else []), *(["cross"] if config.cross_prefix else [])}
    chosen = [name for name in chosen if geometries[name].kind in kinds]
    if not chosen:
        raise ValueError(
            f"`encoder_prefix` is {config.encoder_prefix} and `cross_prefix` is {config.cross_prefix}, which leaves no "
            "attention module among those chosen."
        )
    if config.layers_to_transform is not None:
        chosen = restrict_to_layers(model, chosen, config)
    return Selection({name: geometries[name] for name in chosen}, frozenset(excluded))


def select_saved_modules(
    model: nn.Module, config: PrefixPlusConfig, state_dict: Mapping[str, torch.Tensor]
) -> Selection:
    """
    Choose the attention modules whose prefixes a checkpoint has, and determine their geometry.

    Args:
        model (`nn.Module`): The model, which is left as it is.
        config (`PrefixPlusConfig`): The configuration. Under `sharing="all"` one module has the parameters of all, and
            the configuration says which those are.
        state_dict (`Mapping[str, torch.Tensor]`): The checkpoint; only its keys are used.

    Raises:
        ValueError: If the checkpoint has no prefix, or one for a module that the model does not have.
    """
    candidates = _candidates(model)
    marker = f".{METHOD_NAME}.{METHOD_NAME}_"
    saved = {key.partition(marker)[0] for key in state_dict if marker in key}
    unknown = sorted(saved.difference(candidates))
    if unknown or not saved:
        found = f"parameters of {unknown[0]}" if unknown else "no parameters of a PREFIX_PLUS adapter"
        raise ValueError(
            f"The `state_dict` has {found}; the attention modules of {type(model).__name__} are "
            f"{_examples(candidates)}. Pass the state dict of an adapter that was saved from the same base model."
        )
    if config.reparameterization != "none" and config.sharing == "all":
        saved.update(select_modules(model, config).modules)
    geometries = probe(model, wanted=saved)
    return Selection({name: geometry for name, geometry in geometries.items() if name in saved}, frozenset())


def _candidates(model: nn.Module) -> list[str]:
    for name, module in model.named_modules():
        reason = UNSUPPORTED.get(type(module).__name__)
        if reason is not None:
            raise ValueError(
                f"PREFIX_PLUS cannot prefix {type(model).__name__}: its {name} ({type(module).__name__}) computes {reason}."
            )
    candidates = list(attention_modules(model))
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no attention module that PREFIX_PLUS can prefix: none of its modules computes "
            "attention through transformers' attention interface, or takes a softmax of scores by itself. Use a model "
            "with attention, or another PEFT method."
        )
    return candidates


def _check_names(model: nn.Module, candidates: list[str], field: str, targets: str | list[str] | None) -> None:
    for target in [targets] if isinstance(targets, str) else [[target] for target in targets or ()]:
        if not any(_matches(target, name) for name in candidates):
            shown = target if isinstance(target, str) else target[0]
            raise ValueError(
                f"`{field}` is {targets!r}, but {shown!r} names no attention module of {type(model).__name__}. Its "
                f"attention modules are {_examples(candidates)}; name them by suffix or by one regular expression, or "
                "use None."
            )


def _matches(targets: str | Collection[str], name: str) -> bool:
    if isinstance(targets, str):
        return bool(match_target_against_key(targets, name))
    return any(name == target or name.endswith(f".{target}") for target in targets)


def restrict_to_layers(model: nn.Module, names: Iterable[str], config: PrefixPlusConfig) -> list[str]:
    """Keep the modules whose layer `layers_to_transform` names; negative numbers count from each stack's last layer."""
    assert config.layers_to_transform is not None
    wanted = (
        config.layers_to_transform if isinstance(config.layers_to_transform, list) else [config.layers_to_transform]
    )
    stacks: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        stack, index = layer_of(name, config.layers_pattern)
        if stack is not None:
            stacks.setdefault(stack, []).append((index, name))
    if not stacks:
        raise ValueError(
            f"`layers_to_transform` is {config.layers_to_transform}, but no attention module lies in a numbered layer "
            f"(`layers_pattern` is {config.layers_pattern!r}). The modules are {_examples(list(names))}."
        )
    lengths = {stack: len(model.get_submodule(stack)) for stack in stacks}  # type: ignore[arg-type]
    chosen: set[str] = set()
    for layer in wanted:
        hits = {
            name
            for stack, members in stacks.items()
            for index, name in members
            if index == (layer + lengths[stack] if layer < 0 else layer)
        }
        if not hits:
            with_attention = {stack: sorted({index for index, _ in members}) for stack, members in stacks.items()}
            raise ValueError(
                f"`layers_to_transform` names layer {layer}, which is out of range or has no attention module to "
                f"prefix. The layers that have one are {with_attention}; negative numbers count from the last layer."
            )
        chosen |= hits
    return [name for name in names if name in chosen]


def layer_of(name: str, layers_pattern: str | list[str] | None) -> tuple[str | None, int]:
    """Split a module's name into the name of its stack of layers and its layer's index, as PEFT counts layers."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for pattern in patterns or [r"[^.]*"]:
        match = re.match(rf"(?P<stack>(?:|.*?\.)(?:{pattern}))\.(?P<index>\d+)\.", name)
        if match is not None:
            return match["stack"], int(match["index"])
    return None, -1


def _examples(names: Collection[str], limit: int = 4) -> str:
    shown = ", ".join(list(names)[:limit])
    return shown if len(names) <= limit else f"{shown} … ({len(names)} in all)"
