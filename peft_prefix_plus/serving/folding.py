"""Turning an adapter into plain keys and values that vLLM can serve, without the base model's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..adapters.checkpoints import CONTAINERS, check_checkpoint
from ..config import PrefixPlusConfig
from ..conversion.cached_prefix import PROMPT_EMBEDDINGS
from ..conversion.exactness import exact_up_to
from ..conversion.measured_rotations import Rotation
from ..encoders import PrefixEncoder, Scaling, make_encoder
from ..layer import GATE_SCALE
from ..probing.geometry import AttentionGeometry
from ..probing.modules import attention_modules
from ..probing.targets import layer_of, select_modules
from ..registration import METHOD_NAME, PREFIX_PLUS
from ..saving.reading import load_config, naming_file
from .adapter_files import adapter_folder
from .store import FoldedPrefix, KeyValues, Turning


RETRAIN = "Train one with PrefixPlusConfig.servable(...) or prefix-plus train --servable, or serve this one with --engine transformers."
"""What to do about an adapter whose form vLLM cannot serve."""


class UnservableError(ValueError):
    """vLLM cannot serve an adapter, or any prefix of a model. The message says why, and what to do."""


@dataclass(frozen=True)
class ServedModel:
    """
    The facts about a base model that are needed to serve its prefixes.

    Attributes:
        name (`str`): The model's class, for errors.
        geometries (`Mapping[str, AttentionGeometry]`): Its attention modules, by name, in the model's order.
        rotations (`Mapping[str, Rotation]`): The rotation of keys by their positions, by module; empty if it is not known.
        turning (`Turning`, *optional*): The rotation of queries; `None` if there is none, or it is not known.
        obstacle (`str`): Why its cache cannot hold a prefix; empty if it can.
        turning_obstacle (`str`): Why the rotation of queries cannot be undone; empty if it can, or there is none.
        num_tokens (`int`, *optional*): The length of text, prefix included, up to which a prefix in the cache is exact; `None` if there is
            no limit.
    """

    name: str
    geometries: Mapping[str, AttentionGeometry]
    rotations: Mapping[str, Rotation]
    turning: Turning | None
    obstacle: str
    turning_obstacle: str
    num_tokens: int | None


def served_model(name: str, max_model_len: int | None = None, **hub_arguments: Any) -> ServedModel:
    """
    Return the facts about a base model. Only its configuration is read.

    Args:
        name (`str`): A directory or a name on the Hub.
        max_model_len (`int`, *optional*): The longest text that is served, prefix included.
        hub_arguments: `revision`, `trust_remote_code` and so on, as for [`AutoConfig.from_pretrained`].

    Returns:
        `ServedModel`: The facts.

    Raises:
        UnservableError: If vLLM cannot serve any prefix of it.
    """
    config = AutoConfig.from_pretrained(name, **hub_arguments)
    return _look_at(config, max_model_len, hub_arguments.get("trust_remote_code"))


def _look_at(config: Any, max_model_len: int | None, trust_remote_code: bool | None = None) -> ServedModel:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    geometries = select_modules(model, PrefixPlusConfig()).modules
    _check_layers(model, geometries)
    rotations, turning, turning_obstacle = _positions(model, geometries)
    exact = exact_up_to(model, 0, "the cache")
    obstacle = ""
    if exact is not None and (max_model_len is None or max_model_len > exact[0]):
        num_tokens, reason = exact
        obstacle = (
            f"A cached prefix of {type(model).__name__} is exact in texts of up to {num_tokens} tokens only: "
            f"{reason}. Limit the texts with --max-model-len {num_tokens}, or train an adapter with decoupled=True."
        )
    elif not rotations:
        obstacle = (
            f"A cached prefix needs rotary positions of a known form, which {type(model).__name__} does not have: "
            f"{turning_obstacle or 'its positions are learned, or biases'}. Train an adapter with decoupled=True."
        )
    return ServedModel(
        type(model).__name__,
        geometries,
        rotations,
        turning,
        obstacle,
        turning_obstacle,
        None if exact is None else exact[0],
    )


def fold(adapter: str, model: ServedModel, **hub_arguments: Any) -> FoldedPrefix:
    """
    Return an adapter as plain keys and values, with the scale and the reparameterization multiplied in.

    A joint prefix is in the cache at positions 0 … L_p − 1, before the text. In training, a query at position t scores its key p as
    (R(t) q)ᵀ p. With the cache, the query is at position t + L_p, so the cached key R(L_p) p gets the same score. The other forms are
    added to attention, so they take no positions and are not rotated.

    Args:
        adapter (`str`): A directory or a repository on the Hub, with an adapter of PREFIX_PLUS or PEFT's PREFIX_TUNING.
        model (`ServedModel`): The base model.
        hub_arguments: `revision`, `token` and so on, as for [`snapshot_download`].

    Returns:
        `FoldedPrefix`: The keys and values.

    Raises:
        UnservableError: If vLLM cannot serve the adapter. The message says why, and what to do.
        ValueError: If it is broken, or of another base model.
    """
    folder = adapter_folder(adapter, **hub_arguments)
    config: Any = load_config(folder)
    with naming_file(folder / SAFETENSORS_WEIGHTS_NAME):
        state_dict = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    if config.peft_type == PeftType.PREFIX_TUNING:
        return FoldedPrefix(_fold_prefix_tuning(adapter, model, config, state_dict))
    if config.peft_type != PREFIX_PLUS:
        raise UnservableError(
            f"{adapter!r} is a {PeftType(config.peft_type).value} adapter; prefix-plus serves PREFIX_PLUS and PREFIX_TUNING adapters."
        )
    reason = _why_not(model, config)
    if reason is not None:
        raise UnservableError(f"vLLM cannot serve the adapter {adapter!r}: {reason}")
    layers = {name: layer for layer, name in enumerate(model.geometries)}
    prefixes, gates = _produce(config, model.geometries, state_dict)
    length = config.num_virtual_tokens
    if _is_joint(config):
        return FoldedPrefix(
            {
                layers[name]: (model.rotations[name].rotate(key, length), value)
                for name, (key, value) in prefixes.items()
            }
        )
    return FoldedPrefix(
        {layers[name]: pair for name, pair in prefixes.items()},
        "gated" if config.gating else "decoupled",
        {layers[name]: gate for name, gate in gates.items()},
        model.turning if config.position_free else None,
    )


def why_not_served(model_config: Any, config: PrefixPlusConfig) -> str | None:
    """
    Return why vLLM cannot serve an adapter, and what to do, or `None` if it can.

    Args:
        model_config (`PreTrainedConfig`): The base model's configuration.
        config (`PrefixPlusConfig`): The adapter's configuration, as resolved on that model.

    Returns:
        `str`, *optional*: The reason.
    """
    try:
        return _why_not(_look_at(model_config, None), config)
    except Exception as error:  # noqa: BLE001 - models raise anything, and training must not end for it
        return str(error)


def _is_joint(config: PrefixPlusConfig) -> bool:
    return not config.gating and not config.decoupled


def _why_not(model: ServedModel, config: PrefixPlusConfig) -> str | None:
    if config.modules_to_save:
        return f"it has modules of its own (`modules_to_save`: {', '.join(config.modules_to_save)}), which a prefix cannot hold. {RETRAIN}"
    if not _is_joint(config):
        return model.turning_obstacle or None if config.position_free else None
    if config.position_free is not False:
        return (
            "it is position-free and joint: it needs queries that are not rotated, and rotated queries read the cache. "
            f"{RETRAIN}"
        )
    if any(value is not None for value in (config.layers_to_transform, config.target_modules, config.exclude_modules)):
        return f"it chooses layers or modules, and a cache has the same tokens in every layer. {RETRAIN}"
    if model.obstacle:
        return model.obstacle
    return _too_long(model, config.num_virtual_tokens)


def _too_long(model: ServedModel, length: int) -> str | None:
    if model.num_tokens is None or length < model.num_tokens:
        return None
    return (
        f"its {length} virtual tokens leave no room in the {model.num_tokens} tokens up to which a cached prefix of {model.name} is "
        "exact. Train a shorter one, or one with decoupled=True."
    )


# ---------------------------------------------------------------------------------------------------------- the model


def _check_layers(model: Any, geometries: Mapping[str, AttentionGeometry]) -> None:
    """Raise unless every layer of a model has one attention module, and the cache holds its keys and values unchanged."""
    kind, num_layers = type(model).__name__, model.config.get_text_config().num_hidden_layers
    layers = [layer_of(name, None)[1] for name in geometries]
    if layers != list(range(num_layers)) or set(geometries) != set(attention_modules(model)):
        raise UnservableError(
            f"vLLM cannot serve prefixes of {kind}: {len(geometries)} attention modules can have one, and the model has "
            f"{num_layers} layers. Only models with attention in every layer are served."
        )
    for name, geometry in geometries.items():
        shape = geometry.shape
        if shape.key_dim != shape.value_dim or hasattr(model.get_submodule(name), "qk_rope_head_dim"):
            raise UnservableError(
                f"vLLM cannot serve prefixes of {kind}: {name} has keys of {shape.key_dim} and values of {shape.value_dim} "
                "dims, which its cache holds in another form (latent attention)."
            )


def _positions(
    model: Any, geometries: Mapping[str, AttentionGeometry]
) -> tuple[dict[str, Rotation], Turning | None, str]:
    """
    Find the rotation of keys and queries by their positions.

    Returns:
        `tuple`: The rotations of keys by module, empty if they are not known; the rotation of queries, or `None`; the reason why it is
            not known, or "".
    """
    for name, geometry in geometries.items():
        if geometry.obstacle:
            return {}, None, f"the rotation of queries in {name} cannot be undone ({geometry.obstacle})"
    rotating = {name: each.rotation for name, each in geometries.items() if each.rotation is not None}
    if not rotating:
        return {}, None, ""
    embeddings = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if len(embeddings) != 1 or len(set(rotating.values())) != 1:
        return {}, None, "its layers rotate in several ways"
    config = model.config.get_text_config()
    if getattr(embeddings[0], "rope_type", "default") in LENGTH_DEPENDENT:
        return (
            {},
            None,
            f"its rotary frequencies, of type {embeddings[0].rope_type!r}, depend on the length of the text",
        )
    with torch.device("cpu"):  # the model's own is on the meta device
        embedding = type(embeddings[0])(config)
    frequencies, rotation = tuple(embedding.inv_freq.double().tolist()), next(iter(rotating.values()))
    rotations = {}
    for name, geometry in geometries.items():
        offset = geometry.shape.key_dim - 2 * len(frequencies) if rotation.is_last else 0
        signed = tuple(-each for each in frequencies) if rotation.is_clockwise else frequencies
        # some models have layers without positions
        rotations[name] = Rotation(signed, offset, rotation.is_interleaved) if name in rotating else Rotation()
    turning = Turning(
        frequencies,
        float(getattr(embedding, "attention_scaling", 1.0)),
        rotation.is_interleaved,
        rotation.is_clockwise,
        rotation.is_last,
        tuple(layer for layer, name in enumerate(geometries) if name in rotating),
    )
    return rotations, turning, ""


LENGTH_DEPENDENT = ("dynamic", "longrope")
"""The types of rotary frequencies that change with the length of the text."""


# -------------------------------------------------------------------------------------------------------- the adapter


def _produce(
    config: PrefixPlusConfig, geometries: Mapping[str, AttentionGeometry], state_dict: Mapping[str, torch.Tensor]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    """
    Compute an adapter's prefix, (kv_heads, tokens, dim) each, and gate, (query_heads,), in each module from its checkpoint.

    Raises:
        ValueError: If the checkpoint does not fit.
    """
    names = _prefixed(config, geometries, state_dict)
    shared, scalings = nn.ModuleDict({}), nn.ModuleDict({})
    encoders: dict[str, PrefixEncoder] = {}
    gates: dict[str, nn.ParameterDict] = {}
    parts: dict[str, nn.Module] = {}
    for index, name in enumerate(names):
        scaling = scalings[str(index)] = Scaling()
        encoder = encoders[name] = make_encoder(config, geometries[name].shape, shared)
        encoder.take_scaling_from(scalings, str(index))
        layer = f"{name}.{METHOD_NAME}.{METHOD_NAME}"
        parts[f"{layer}_encoder.{ADAPTER}."], parts[f"{layer}_scaling.{ADAPTER}."] = encoder.eval(), scaling
        if config.gating:
            gates[name] = nn.ParameterDict({ADAPTER: torch.empty(geometries[name].num_query_heads)})
            parts[f"{layer}_gate."] = gates[name]
    parts[f"{METHOD_NAME}.{METHOD_NAME}_shared.{ADAPTER}."] = shared
    expected = {f"{path}{key}": value for path, part in parts.items() for key, value in part.state_dict().items()}
    container = re.compile(rf"(\.(?:{'|'.join(CONTAINERS)}))(?=\.|$)")
    found = {
        container.sub(rf"\1.{ADAPTER}", key.removeprefix("base_model.model."), count=1): tensor.clone()
        for key, tensor in state_dict.items()
    }
    check_checkpoint(expected, ADAPTER, found, expected)
    for path, part in parts.items():
        own = {key.removeprefix(path): tensor for key, tensor in found.items() if key.startswith(path)}
        part.load_state_dict(own, assign=True)
    with torch.no_grad():
        prefixes = {name: encoder() for name, encoder in encoders.items()}
        return prefixes, {name: gate[ADAPTER].detach() * GATE_SCALE for name, gate in gates.items()}


ADAPTER = "default"
"""The adapter's name here; a checkpoint has none."""


def _prefixed(
    config: PrefixPlusConfig, geometries: Mapping[str, AttentionGeometry], state_dict: Mapping[str, torch.Tensor]
) -> list[str]:
    """Return the modules that an adapter prefixes: all, or if it chooses some, those in its checkpoint."""
    if config.layers_to_transform is None and config.target_modules is None and config.exclude_modules is None:
        return list(geometries)
    starts = {name: f"base_model.model.{name}.{METHOD_NAME}." for name in geometries}
    return [name for name, start in starts.items() if any(key.startswith(start) for key in state_dict)]


def _fold_prefix_tuning(
    adapter: str, model: ServedModel, config: Any, state_dict: Mapping[str, torch.Tensor]
) -> KeyValues:
    """Return the keys and values of a PREFIX_TUNING adapter. PEFT puts them into the cache unchanged, so they are not rotated."""
    embeddings = state_dict.get(PROMPT_EMBEDDINGS)
    shape = next(iter(model.geometries.values())).shape
    layers, length = len(model.geometries), config.num_virtual_tokens
    width = 2 * layers * shape.num_heads * shape.key_dim
    if set(state_dict) != {PROMPT_EMBEDDINGS} or embeddings is None or embeddings.shape != (length, width):
        found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        raise ValueError(
            f"The PREFIX_TUNING adapter {adapter!r} must have {PROMPT_EMBEDDINGS} of shape {(length, width)} for {model.name} "
            f"and nothing else, got {found}."
        )
    if not embeddings.is_floating_point() or not bool(embeddings.isfinite().all()):
        raise ValueError(
            f"The PREFIX_TUNING adapter {adapter!r} has numbers that are not finite. Use an earlier checkpoint."
        )
    reason = model.obstacle if model.num_tokens is not None and model.obstacle else _too_long(model, length)
    if reason:
        raise UnservableError(f"vLLM cannot serve the adapter {adapter!r}: {reason}")
    pairs = embeddings.view(length, layers, 2, shape.num_heads, shape.key_dim).permute(1, 2, 3, 0, 4)
    return {layer: (pairs[layer, 0], pairs[layer, 1]) for layer in range(layers)}
