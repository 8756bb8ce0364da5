"""What vLLM can take of an adapter: keys and values as they stand in a cache, made without the base model's weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..adapters.checkpoints import CONTAINERS, check_checkpoint
from ..config import PrefixPlusConfig
from ..conversion.exactness import exact_up_to
from ..conversion.measured_rotations import Rotation
from ..conversion.prefix_tuning import PROMPT_EMBEDDINGS
from ..encoders import Scaling, make_encoder
from ..probing.geometry import AttentionGeometry
from ..probing.modules import attention_modules
from ..probing.targets import layer_of, select_modules
from ..registration import METHOD_NAME, PREFIX_PLUS
from .store import KeyValues


RETRAIN = "Train one by PrefixPlusConfig.servable(...), or by prefix-plus train --servable; transformers can use this one."
"""The way out for an adapter whose form vLLM cannot take."""


class UnservableError(ValueError):
    """vLLM cannot serve a model's prefixes, or an adapter: the message says why, and what to do."""


@dataclass(frozen=True)
class ServedModel:
    """
    What must be known of a base model to serve its prefixes.

    Attributes:
        name (`str`): The model's class, for errors.
        geometries (`Mapping[str, AttentionGeometry]`): Its attention modules, by name, in the model's order.
        rotations (`Mapping[str, Rotation]`): How they rotate keys by their positions; empty if that cannot be told.
        obstacle (`str`): Why it cannot.
        bound (`tuple[int, str]`, *optional*): Up to how many tokens, prefix included, a prefix in the cache is exact, and why.
    """

    name: str
    geometries: Mapping[str, AttentionGeometry]
    rotations: Mapping[str, Rotation]
    obstacle: str
    bound: tuple[int, str] | None


def served_model(name: str, max_model_len: int | None = None, **hub_arguments: Any) -> ServedModel:
    """
    Look at a base model, of which only the configuration is read.

    Args:
        name (`str`): A directory or a name on the Hub.
        max_model_len (`int`, *optional*): The longest text that is served, prefix included.
        hub_arguments: `revision`, `trust_remote_code` and so on, as for [`AutoConfig.from_pretrained`].

    Raises:
        UnservableError: If vLLM cannot take a prefix for it.
    """
    return _look_at(AutoConfig.from_pretrained(name, **hub_arguments), max_model_len, hub_arguments.get("trust_remote_code"))


def _look_at(config: Any, max_model_len: int | None, trust_remote_code: bool | None = None) -> ServedModel:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    kind = type(model).__name__
    geometries = select_modules(model, PrefixPlusConfig()).modules
    _check_layers(kind, model, geometries)
    bound = _bound(kind, model, max_model_len)
    try:
        rotations, obstacle = _rotations(model, geometries), ""
    except UnservableError as error:
        rotations, obstacle = {}, str(error)
    return ServedModel(kind, geometries, rotations, obstacle, bound)


def fold(adapter: str, model: ServedModel, **hub_arguments: Any) -> KeyValues:
    """
    Return an adapter's keys and values as they stand in a cache, with the prefix at positions 0 … L_p − 1 and the text after it.

    In training a query at position t meets a prefix's key p as (R(t) q)ᵀ p. In the cache it stands at t + L_p, and the key that it
    meets in the same way is R(L_p) p. The scale and the reparameterization are multiplied in.

    Args:
        adapter (`str`): A directory or a repository on the Hub, with an adapter of PREFIX_PLUS or PEFT's PREFIX_TUNING.
        model (`ServedModel`): The base model.
        hub_arguments: `revision`, `token` and so on, as for [`snapshot_download`].

    Raises:
        UnservableError: If vLLM cannot take the adapter: the message says why, and what to do.
        ValueError: If it is broken, or of another base model.
    """
    folder = _folder(adapter, hub_arguments)
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        state_dict = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"The adapter {adapter!r} cannot be read: {error}") from error
    if config.peft_type == PeftType.PREFIX_TUNING:
        return _fold_prefix_tuning(adapter, model, config, state_dict)
    if config.peft_type != PREFIX_PLUS:
        raise UnservableError(
            f"The adapter {adapter!r} is one of {PeftType(config.peft_type).value}; PREFIX_PLUS and PREFIX_TUNING are served here."
        )
    _check_form(adapter, model, config)
    prefixes = _produce(config, model.geometries, state_dict)
    length = config.num_virtual_tokens
    return {
        layer: (model.rotations[name].rotate(key, length), value)
        for layer, (name, (key, value)) in enumerate(prefixes.items())
    }


def why_not_served(model_config: Any, config: PrefixPlusConfig) -> str | None:
    """
    Return why vLLM cannot serve an adapter, and what to do, or `None` if it can.

    Args:
        model_config (`PreTrainedConfig`): The base model's configuration.
        config (`PrefixPlusConfig`): The adapter's, as it is on that model.
    """
    reason = _why_not_in_cache(config)
    if reason is not None:
        return f"{reason}. {RETRAIN}"
    try:
        return _look_at(model_config, None).obstacle or None
    except ValueError as error:
        return str(error)


def _why_not_in_cache(config: PrefixPlusConfig) -> str | None:
    """Return why the form of an adapter cannot be in a cache, whatever its model, or `None` if it can."""
    if config.gating or config.decoupled:
        form = "gated" if config.gating else "decoupled"
        return f"its form is {form}, whose prefix is no part of the softmax that reads the cache"
    if config.position_free is not False:
        return "it is position-free: it meets queries that are not rotated, and a cache is read by rotated ones"
    if any(value is not None for value in (config.layers_to_transform, config.target_modules, config.exclude_modules)):
        return "it chooses layers or modules, and a cache has the same tokens in all of them"
    if config.modules_to_save:
        return f"it has modules of its own, {', '.join(config.modules_to_save)}, which are no part of a cache"
    return None


# ---------------------------------------------------------------------------------------------------------- the model


def _check_layers(kind: str, model: Any, geometries: Mapping[str, AttentionGeometry]) -> None:
    """Raise unless every layer of a model has one attention module, whose keys and values a cache holds as they are."""
    num_layers = model.config.get_text_config().num_hidden_layers
    layers = [layer_of(name, None)[1] for name in geometries]
    if layers != list(range(num_layers)) or set(geometries) != set(attention_modules(model)):
        raise UnservableError(
            f"vLLM cannot serve prefixes of {kind}: {len(geometries)} attention modules can have one, and the model has "
            f"{num_layers} layers. A cache has the same tokens in all layers."
        )
    for name, geometry in geometries.items():
        shape = geometry.shape
        if shape.key_dim != shape.value_dim or hasattr(model.get_submodule(name), "qk_rope_head_dim"):
            raise UnservableError(
                f"vLLM cannot serve prefixes of {kind}: {name} has keys of {shape.key_dim} and values of {shape.value_dim} "
                "dims, which its cache holds in another form (latent attention)."
            )


def _bound(kind: str, model: Any, max_model_len: int | None) -> tuple[int, str] | None:
    """Return up to how many tokens a cached prefix is exact, or raise if texts can be longer than that."""
    exact = exact_up_to(model, 0)
    if exact is not None and (max_model_len is None or max_model_len > exact[0]):
        num_tokens, reason = exact
        raise UnservableError(
            f"vLLM cannot serve prefixes of {kind} in texts of more than {num_tokens} tokens: {reason.replace('PREFIX_TUNING', 'a cache')}. "
            f"Serve shorter texts, by --max-model-len {num_tokens}, or use transformers."
        )
    return exact


def _rotations(model: Any, geometries: Mapping[str, AttentionGeometry]) -> dict[str, Rotation]:
    """
    Tell how each attention module rotates its keys by their positions.

    Raises:
        UnservableError: If positions are not rotary, or the rotation cannot be told.
    """
    embeddings = [module for module in model.modules() if hasattr(module, "inv_freq")]
    rotating = [name for name, geometry in geometries.items() if geometry.rotation is not None]
    obstacles = [f"{name}: {geometry.obstacle}" for name, geometry in geometries.items() if geometry.obstacle]
    if obstacles or len(embeddings) != 1 or not rotating:
        reason = obstacles[0] if obstacles else "its positions are learned, biases, or several rotations"
        raise UnservableError(
            f"A PREFIX_PLUS adapter of {type(model).__name__} cannot be put into a cache: its keys would have to move with the "
            f"positions, and they move by one known rotation only where positions are rotary ({reason}). Use transformers."
        )
    config = model.config.get_text_config()
    with torch.device("cpu"):  # the model's own has no memory
        frequencies = type(embeddings[0])(config).inv_freq.double()
    rotations = {}
    for name, geometry in geometries.items():
        if geometry.rotation is None:  # some models have layers without positions
            rotations[name] = Rotation()
            continue
        rotated = 2 * len(frequencies)
        rotations[name] = Rotation(
            tuple((-frequencies if geometry.rotation.is_clockwise else frequencies).tolist()),
            geometry.shape.key_dim - rotated if geometry.rotation.is_last else 0,
            geometry.rotation.is_interleaved,
        )
    return rotations


# -------------------------------------------------------------------------------------------------------- the adapter


def _folder(adapter: str, hub_arguments: Mapping[str, Any]) -> Path:
    """Return the directory that has an adapter's files, of the formats that are read here only."""
    if os.path.isdir(adapter):
        folder = Path(adapter)
    else:
        try:
            folder = Path(
                snapshot_download(adapter, allow_patterns=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME], **hub_arguments)
            )
        except (OSError, ValueError) as error:  # what the Hub raises is either
            raise ValueError(f"The adapter {adapter!r} is no directory, and cannot be had from the Hub: {error}") from error
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"The adapter {adapter!r} has no {name}. Save it by model.save_pretrained().")
    return folder


def _check_form(adapter: str, model: ServedModel, config: PrefixPlusConfig) -> None:
    reason = _why_not_in_cache(config)
    if reason is not None:
        raise UnservableError(f"vLLM cannot serve the adapter {adapter!r}: {reason}. {RETRAIN}")
    if model.obstacle:
        raise UnservableError(f"vLLM cannot serve the adapter {adapter!r}. {model.obstacle}")
    _check_length(adapter, model, config.num_virtual_tokens)


def _check_length(adapter: str, model: ServedModel, length: int) -> None:
    if model.bound is not None and length >= model.bound[0]:
        raise UnservableError(
            f"The adapter {adapter!r} has {length} virtual tokens, and leaves no room in the {model.bound[0]} tokens up to which "
            f"{model.name} takes a cached prefix."
        )


def _produce(
    config: PrefixPlusConfig, geometries: Mapping[str, AttentionGeometry], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Return the prefix, (kv_heads, tokens, dim) each, that an adapter's checkpoint makes in each module.

    Raises:
        ValueError: If the checkpoint does not fit.
    """
    adapter_name = "default"
    shared = nn.ModuleDict({})
    scalings = nn.ModuleDict({str(index): Scaling() for index in range(len(geometries))})
    encoders = []
    parts: dict[str, nn.Module] = {}
    for index, (name, geometry) in enumerate(geometries.items()):
        encoder = make_encoder(config, geometry.shape, shared)
        encoder.take_scaling_from(scalings, str(index))
        encoders.append(encoder.eval())
        parts[f"{name}.{METHOD_NAME}.{CONTAINERS[0]}.{adapter_name}"] = encoder
        parts[f"{name}.{METHOD_NAME}.{METHOD_NAME}_scaling.{adapter_name}"] = scalings[str(index)]
    parts[f"{METHOD_NAME}.{METHOD_NAME}_shared.{adapter_name}"] = shared
    expected = {f"{path}.{key}": value for path, part in parts.items() for key, value in part.state_dict().items()}
    containers = re.compile(rf"(\.(?:{'|'.join(CONTAINERS)}))\.")
    found = {
        containers.sub(rf"\1.{adapter_name}.", key.removeprefix("base_model.model."), count=1): tensor
        for key, tensor in state_dict.items()
    }
    check_checkpoint(expected, adapter_name, found, expected)
    for path, part in parts.items():
        own = {key.removeprefix(f"{path}."): tensor for key, tensor in found.items() if key.startswith(f"{path}.")}
        part.load_state_dict({key: tensor.clone() for key, tensor in own.items()}, assign=True)
    with torch.no_grad():
        return {name: encoder() for name, encoder in zip(geometries, encoders, strict=True)}


def _fold_prefix_tuning(
    adapter: str, model: ServedModel, config: Any, state_dict: Mapping[str, torch.Tensor]
) -> KeyValues:
    """Return the keys and values of PEFT's own method, which it puts into the cache itself: nothing has to be rotated."""
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
        raise ValueError(f"The PREFIX_TUNING adapter {adapter!r} has numbers that are not finite. Load an earlier checkpoint.")
    _check_length(adapter, model, length)
    pairs = embeddings.view(length, layers, 2, shape.num_heads, shape.key_dim).permute(1, 2, 3, 0, 4)
    return {layer: (pairs[layer, 0], pairs[layer, 1]) for layer in range(layers)}
