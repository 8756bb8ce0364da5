"""Which attention modules an adapter prefixes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import regex
import torch
from torch import nn

from ..attention import UNSUPPORTED
from ..config import PrefixPlusConfig, numbered_layer, shortened
from ..registration import METHOD_NAME
from .geometry import AttentionGeometry
from .modules import attention_modules
from .probe import PROBE_TOKENS, probe


MATCHING_SECONDS = 2.0
"""How long a regular expression may take over one name. Those of models are short, and most take microseconds."""


UNREAD = {
    "CanineForSequenceClassification": "canine.final_char_encoder.",
    "CanineForMultipleChoice": "canine.final_char_encoder.",
}
"""Where a head does not read what attention modules compute, by its class: the start of their names. No loss reaches them."""


@dataclass(frozen=True)
class Selection:
    """
    The attention modules that an adapter prefixes.

    Attributes:
        modules (`dict[str, AttentionGeometry]`): The chosen modules by name, in the model's order.
        excluded (`frozenset[str]`): Attention modules that `exclude_modules` left out.
        impossible (`dict[str, str]`): Attention modules that were to have a prefix and cannot, and why not.
    """

    modules: dict[str, AttentionGeometry]
    excluded: frozenset[str]
    impossible: dict[str, str]


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
    rejected: dict[str, str] = {}
    geometries = probe(model, named, rejected, **_probe_options(config))
    unread = UNREAD.get(type(model).__name__)
    found = [name for name in geometries if name not in excluded and not (unread and name.startswith(unread))]
    chosen = found if targets is None else named
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
    impossible = {
        name: reason
        for name, reason in rejected.items()
        if targets is None and name not in excluded and _is_attention_to_prefix(model, name, config)
    }
    return Selection({name: geometries[name] for name in chosen}, frozenset(excluded), impossible)


def resolve_position_free(model: nn.Module, config: PrefixPlusConfig, selection: Selection) -> bool:
    """
    Return the value that a configuration's `position_free` resolves to on a model.

    Raises:
        ValueError: If it is `True` and the rotation of queries of a chosen module cannot be undone.
    """
    obstacles = {name: geometry.obstacle for name, geometry in selection.modules.items() if geometry.obstacle}
    if config.position_free is None:
        return not obstacles
    if config.position_free:
        for name, obstacle in obstacles.items():
            raise ValueError(
                f"`position_free` is True, but the rotation of queries in {name} of {type(model).__name__} cannot be undone: "
                f"{obstacle}. Use position_free=False, or leave it None."
            )
    return config.position_free


def warn_of_impossible(model: nn.Module, selection: Selection) -> None:
    """Warn of the attention modules that a user would expect to have a prefix, if there are any."""
    if not selection.impossible:
        return
    names = list(selection.impossible)
    classes = sorted({type(model.get_submodule(name)).__name__ for name in names})
    warnings.warn(
        f"{len(names)} attention modules of {type(model).__name__} get no prefix: {_examples(names)}. What "
        f"{' and '.join(classes)} compute is attention in another form (over local blocks, for instance), which a prefix "
        f"cannot enter ({selection.impossible[names[0]]}). {len(selection.modules)} others have a prefix: "
        f"{_examples(list(selection.modules))}. If that is what you want, name those in `target_modules`, or these in "
        "`exclude_modules`.",
        stacklevel=2,
    )


def select_saved_modules(
    model: nn.Module, config: PrefixPlusConfig, state_dict: Mapping[str, torch.Tensor]
) -> Selection:
    """
    Choose the attention modules that have a prefix in a checkpoint, and determine their geometry.

    Args:
        model (`nn.Module`): The model, which is left as it is.
        config (`PrefixPlusConfig`): The configuration.
        state_dict (`Mapping[str, torch.Tensor]`): The checkpoint; only its keys are used.

    Raises:
        ValueError: If the checkpoint has no prefix, or one for a module that the model does not have.
    """
    candidates = _candidates(model)
    is_parameter = re.compile(rf"(?:(?P<module>.+)\.)?{METHOD_NAME}\.{METHOD_NAME}_(?P<container>\w+)\.")
    matches = [match for match in map(is_parameter.match, state_dict) if match is not None]
    saved = {match["module"] for match in matches if match["container"] != "shared"}
    unknown = sorted(saved.difference(candidates))
    if unknown or not saved:
        found = f"parameters of {unknown[0]}" if unknown else "no parameters of a PREFIX_PLUS adapter"
        raise ValueError(
            f"The `state_dict` has {found}; the attention modules of {type(model).__name__} are "
            f"{_examples(candidates)}. Pass the state dict of an adapter that was saved from the same base model."
        )
    geometries = probe(model, wanted=saved, **_probe_options(config))
    return Selection({name: geometry for name, geometry in geometries.items() if name in saved}, frozenset(), {})


def _probe_options(config: PrefixPlusConfig) -> dict[str, Any]:
    """How many of the base model's own keys and values the adapter's start needs, and where."""
    if config.init_weights != "activations":
        return {}
    return {"num_tokens": max(PROBE_TOKENS, config.num_virtual_tokens), "are_before": True}


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
                f"`{field}` is {shortened(repr(targets))}, but {shortened(repr(shown))} names no attention module of {type(model).__name__}. Its "
                f"attention modules are {_examples(candidates)}; name them by suffix or by one regular expression, or "
                "use None."
            )


def _matches(targets: str | Collection[str], name: str) -> bool:
    if isinstance(targets, str):
        return _match(targets, name, regex.fullmatch) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _match(pattern: str, name: str, match: Callable[..., Any]) -> Any:
    """
    Match a module's name with a regular expression, as `re` does, in limited time: some expressions backtrack
    exponentially.

    Raises:
        ValueError: If it takes too long.
    """
    try:
        return match(pattern, name, timeout=MATCHING_SECONDS)
    except TimeoutError as error:
        raise ValueError(
            f"The regular expression {shortened(repr(pattern))} takes more than {MATCHING_SECONDS:.0f} seconds to match the "
            f"name {name!r}. Write it without repetitions inside repetitions, or name modules by suffix."
        ) from error


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
            f"`layers_to_transform` is {shortened(str(config.layers_to_transform))}, but no attention module lies in a numbered layer "
            f"(`layers_pattern` is {config.layers_pattern!r}). The modules are {_examples(list(names))}."
        )
    lengths = {stack: len(model.get_submodule(stack)) for stack in stacks}  # type: ignore[arg-type]
    chosen: set[str] = set()
    for layer in dict.fromkeys(wanted):
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


def _is_attention_to_prefix(model: nn.Module, name: str, config: PrefixPlusConfig) -> bool:
    """
    Whether a module that the probe rejected is attention, and where the configuration wants prefixes.

    The name of its class distinguishes attention from other modules with a softmax (the router of a mixture of
    experts).
    """
    if "attention" not in type(model.get_submodule(name)).__name__.lower():
        return False
    if not config.encoder_prefix and getattr(model.config, "is_encoder_decoder", False):
        encoder = getattr(model, "get_encoder", lambda: None)()
        if encoder is not None and any(module is model.get_submodule(name) for module in encoder.modules()):
            return False
    if config.layers_to_transform is None:
        return True
    stack, index = layer_of(name, config.layers_pattern)
    if stack is None:
        return False
    layers = config.layers_to_transform
    wanted = layers if isinstance(layers, list) else [layers]
    return index in wanted or index - len(model.get_submodule(stack)) in wanted  # type: ignore[arg-type]


def layer_of(name: str, layers_pattern: str | list[str] | None) -> tuple[str | None, int]:
    """Split a module's name into the name of its stack of layers and its layer's index, as PEFT counts layers."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for pattern in patterns or [r"[^.]*"]:
        match = _match(numbered_layer(pattern), name, regex.match)
        if match is not None:
            return match[1], int(match[match.re.groups])
    return None, -1


def _examples(names: Collection[str], limit: int = 4) -> str:
    shown = ", ".join(list(names)[:limit])
    return shown if len(names) <= limit else f"{shown} … ({len(names)} in all)"
