"""
Converting `prefix_tuning` adapters of AdapterHub's library `adapters` to PREFIX_PLUS adapters with the same output, and back.

That library puts its prefix before the keys and values as they enter attention, after their rotary position, and leaves the
positions of the real tokens alone, as a joint prefix at fixed positions does here. So keys and values stay as they are. Its weights
are one tensor for all attention modules of a kind, or a multilayer perceptron that computes it:

    control_trans, (tokens · modules · 2 · kv_heads · head_dim), by token, then module, then key or value
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.activations import ACT2FN

from ..adapters.lookup import layers_with_adapter
from ..adapters.snapshot import all_or_nothing
from ..config import PrefixPlusConfig, shortened
from ..probing.geometry import AttentionGeometry
from ..probing.recording import evaluating
from ..probing.targets import select_modules
from ..saving.files import CONFIG_NAME, write_atomically
from ..saving.reading import find_file, naming_file, read_fields
from ..saving.together import saving_together
from ..starting.initialization import initialize_from_key_values
from .arguments import check_base_model, check_fixed_positions, check_joint, task_type_of
from .flatten import prefix_key_values


SAFETENSORS_NAME = "adapter.safetensors"
PICKLE_NAME = "pytorch_adapter.bin"

LAYOUT_VERSION = "adapters.1.3.0"
"""The version of the library whose layout this is, as its configurations name it."""

MODEL_TYPES = (
    "bart",
    "bert",
    "electra",
    "gpt2",
    "gptj",
    "llama",
    "mbart",
    "mistral",
    "roberta",
    "xlm-roberta",
)
"""The models on which the outputs of that library and of this package were found equal."""

KINDS = {"encoder_prefix": "encoder", "self_prefix": "self", "cross_prefix": "cross"}
"""The kinds of attention modules here, by that library's name for the prefix in them."""

DEFAULTS: dict[str, Any] = {
    "architecture": "prefix_tuning",
    "bottleneck_size": 512,
    "cross_prefix": True,
    "dropout": 0.0,
    "encoder_prefix": True,
    "flat": False,
    "init_weights_seed": None,
    "leave_out": [],
    "non_linearity": "tanh",
    "prefix_length": 30,
    "shared_gating": True,
    "use_gating": False,
}
"""What a configuration of that library has where it says nothing."""

ACTIVATIONS = {"leakyrelu": "leaky_relu"}
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What activations are called here, and what they were called in configurations that name no version."""


class Stack(NamedTuple):
    """The attention modules of one kind in a model, by the index of their layer as that library counts layers."""

    modules: dict[int, str]
    shape: tuple[int, int]


def from_adapterhub(
    adapter: str | os.PathLike[str],
    model: nn.Module,
    adapter_name: str = "default",
    allow_pickle: bool = False,
    **hub_arguments: Any,
) -> PeftModel:
    """
    Convert a `prefix_tuning` adapter of AdapterHub's library `adapters` to a PREFIX_PLUS adapter with the same output.

    Prediction heads, which that library saves in files of their own, are not read.

    Args:
        adapter (`str` or `os.PathLike`): A directory or a repository on the Hub with the saved adapter.
        model (`nn.Module`): The base model, without adapters. It is adapted in place.
        adapter_name (`str`, defaults to `"default"`): The name of the new adapter.
        allow_pickle (`bool`, defaults to `False`):
            Also load an adapter that was not saved in the safetensors format, as most are. Only tensors are unpickled.
        hub_arguments: `revision`, `subfolder`, `token`, `cache_dir` and so on, as for [`hf_hub_download`].

    Returns:
        `PeftModel`: The model with the new adapter, `reparameterization="none"`, which can be trained further.

    Raises:
        TypeError: If `model` is not a base model.
        ValueError: If there is no such adapter, it is broken or of another model, or no prefix here gives the same output: with a
            gate that depends on the input, or on models with position biases (T5, DeBERTa). The model is then left as it was.

    Example:

    ```py
    >>> import tempfile
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, from_adapterhub, to_adapterhub

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig.servable(num_virtual_tokens=10))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = to_adapterhub(model, save_directory=folder)
    ...     model = from_adapterhub(folder, model.unload())
    >>> model.peft_config["default"].num_virtual_tokens
    10

    ```
    """
    base: Any = model
    check_base_model(base, os.fspath(adapter))
    saved = read_adapterhub_config(adapter, **hub_arguments)
    _check_model(base, saved.get("model_type"))
    fields = _fields(adapter, saved)
    tensors = _own_tensors(adapter, saved, _read_weights(adapter, allow_pickle, hub_arguments))
    with all_or_nothing(base), evaluating(base):
        stacks = _stacks(base)
        key_values = {}
        used = [location for location, kind in KINDS.items() if kind in stacks and fields.get(location) is not False]
        for name in tensors:
            if name.split(".")[0] not in used:
                raise ValueError(
                    f"The adapter {os.fspath(adapter)!r} has a tensor {name}, but its configuration and the base model have prefixes only "
                    f"in {', '.join(used)}."
                )
        for location in used:
            kind = KINDS[location]
            modules = [name for layer, name in stacks[kind].modules.items() if layer not in fields["leave_out"]]
            numbers = _numbers(adapter, fields, location, tensors, len(modules), stacks[kind].shape)
            for index, name in enumerate(modules):
                key_values[name] = (numbers[:, index, 0].transpose(0, 1), numbers[:, index, 1].transpose(0, 1))
        ordered = {
            name: key_values[name] for name in select_modules(base, PrefixPlusConfig()).modules if name in key_values
        }
        config = PrefixPlusConfig(
            num_virtual_tokens=fields["prefix_length"],
            base_model_name_or_path=saved.get("model_name") or getattr(base, "name_or_path", None) or None,
            task_type=task_type_of(base),
            decoupled=False,
            position_free=False,
        )
        if list(select_modules(base, config).modules) != list(ordered):
            config.target_modules = list(ordered)
        result = get_peft_model(base, config, adapter_name=adapter_name)
        initialize_from_key_values(result, ordered, adapter_name)
    return result


def to_adapterhub(
    model: PeftModel, adapter_name: str = "default", save_directory: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    Convert a PREFIX_PLUS adapter to a `prefix_tuning` adapter of AdapterHub's library `adapters` with the same output. This is
    the inverse of [`from_adapterhub`]. Of a reparameterization, only the prefix that it computes remains (`flat`).

    That library loads the files by `model.load_adapter(save_directory, use_safetensors=True)`.

    Args:
        model (`PeftModel`): A model with the adapter, which is left as it is.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        save_directory (`str` or `os.PathLike`, *optional*): A directory to save `adapter_config.json` and
            `adapter.safetensors` in.

    Returns:
        `tuple[dict, dict[str, torch.Tensor]]`: The configuration and the tensors, as that library saves them.

    Raises:
        ValueError: If that library cannot express the adapter: position-free, a softmax of its own, a gate, `modules_to_save`, a
            choice of modules that is none of layers, or on a model whose prefixes it adds in another way or not at all.
    """
    layers = layers_with_adapter(model, adapter_name)
    base: Any = model.get_base_model()
    configs: Any = model.peft_config
    config = configs[adapter_name]
    _check_model(base, base.config.model_type)
    check_joint("AdapterHub", config)
    check_fixed_positions("AdapterHub", adapter_name, layers)
    if config.modules_to_save:
        raise ValueError(
            f"Adapter {adapter_name!r} has modules of its own, {', '.join(config.modules_to_save)}, and AdapterHub saves only "
            "prediction heads of its own beside a prefix. Train one without `modules_to_save`."
        )
    prefixes = prefix_key_values(model, adapter_name)
    stacks = _stacks(base)
    fields = _fields_of(stacks, list(prefixes), config.num_virtual_tokens)
    start = f"{base.base_model_prefix}." if hasattr(base, base.base_model_prefix) else ""
    tensors = {}
    for location, kind in KINDS.items():
        columns = [
            torch.stack([part.transpose(0, 1) for part in prefixes[name]], dim=1)  # (tokens, 2, kv_heads, head_dim)
            for name in (stacks[kind].modules.values() if kind in stacks else ())
            if name in prefixes
        ]
        if columns:
            path = f"{start}prefix_tuning.prefix_tunings.{adapter_name}.{location}.control_trans"
            tensors[path] = torch.stack(columns, dim=1).flatten().cpu()
    saved = {
        "config": fields,
        "hidden_size": base.config.hidden_size,
        "model_class": type(base).__name__,
        "model_name": config.base_model_name_or_path or "",
        "model_type": base.config.model_type,
        "name": adapter_name,
        "version": LAYOUT_VERSION,
    }
    if save_directory is not None:
        with saving_together(save_directory) as folder:
            save_file(tensors, os.path.join(folder, SAFETENSORS_NAME))
            write_atomically(os.path.join(folder, CONFIG_NAME), json.dumps(saved, indent=2, sort_keys=True))
    return saved, tensors


# ------------------------------------------------------------------------------------------------------ the model


def _check_model(base: Any, model_type: str | None) -> None:
    """Raise unless a model is one on which both libraries give the same output."""
    own: str = base.config.model_type
    if model_type != own:
        raise ValueError(f"The adapter is one of a {model_type!r} model, and the base model is a {own!r} model.")
    if own not in MODEL_TYPES or getattr(base.config, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"Prefixes of {own!r} models are not converted to and from AdapterHub: its library has none for them, or adds position "
            f"biases that move with the prefix, or they were not compared. Those of {', '.join(MODEL_TYPES)} are."
        )


def _stacks(base: Any) -> dict[str, Stack]:
    """The attention modules of a model, by kind."""
    geometries = select_modules(base, PrefixPlusConfig()).modules
    by_kind: dict[str, dict[str, AttentionGeometry]] = {}
    for name, geometry in geometries.items():
        by_kind.setdefault(geometry.kind, {})[name] = geometry
    num_encoder_layers = len(by_kind.get("encoder", ()))
    stacks = {}
    for kind, found in by_kind.items():
        shapes = {(each.shape.num_heads, each.shape.key_dim, each.shape.value_dim) for each in found.values()}
        if len(shapes) > 1 or any(key_dim != value_dim for _, key_dim, value_dim in shapes):
            raise ValueError(
                f"AdapterHub has one shape for the keys and values of all layers, but those of {type(base).__name__} are of (heads, "
                f"key dim, value dim) {' and '.join(map(str, sorted(shapes)))}."
            )
        first = (
            0 if kind == "encoder" else num_encoder_layers
        )  # layers of the decoder are counted on from the encoder's
        num_heads, key_dim, _ = next(iter(shapes))
        stacks[kind] = Stack(dict(enumerate(found, start=first)), (num_heads, key_dim))
    return stacks


def _fields_of(stacks: Mapping[str, Stack], prefixed: list[str], length: int) -> dict[str, Any]:
    """
    Return the fields of a configuration of that library that prefixes these modules.

    Raises:
        ValueError: If none does.
    """
    fields = {**DEFAULTS, "flat": True, "prefix_length": length}
    kinds = {kind for kind, stack in stacks.items() if set(stack.modules.values()) & set(prefixed)}
    for location in ("encoder_prefix", "cross_prefix"):
        fields[location] = KINDS[location] in kinds or KINDS[location] not in stacks
    modules = [(layer, name) for kind in kinds for layer, name in stacks[kind].modules.items()]
    left_out = {layer for layer, name in modules if name not in prefixed}
    partly = sorted({layer for layer, name in modules if name in prefixed and layer in left_out})
    if partly or "self" not in kinds:
        what = (
            f"layer {partly[0]} has a prefix in some of its attention modules only"
            if partly
            else "no self-attention has one"
        )
        raise ValueError(
            f"AdapterHub leaves out layers, or all modules of a kind but self-attention. Here {what}, which cannot be expressed there."
        )
    fields["leave_out"] = sorted(left_out)
    return fields


# ------------------------------------------------------------------------------------------------------ the files


def read_adapterhub_config(adapter: str | os.PathLike[str], **hub_arguments: Any) -> dict[str, Any]:
    """
    Read the configuration of an adapter of that library.

    Args:
        adapter (`str` or `os.PathLike`): A directory or a repository on the Hub.
        hub_arguments: As for [`hf_hub_download`].

    Raises:
        ValueError: If there is none, or it is of another method.
    """
    path = find_file(adapter, CONFIG_NAME, **hub_arguments)
    if path is None:
        raise ValueError(f"{os.fspath(adapter)!r} has no {CONFIG_NAME}.")
    saved = read_fields(path)
    config = saved.get("config")
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if architecture != "prefix_tuning":
        raise ValueError(
            f"{path} must be the configuration of an adapter of AdapterHub with the architecture 'prefix_tuning', got "
            f"{shortened(repr(architecture))}."
        )
    return saved


def _fields(adapter: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration, with defaults, or raise if no prefix here is like it."""
    fields = {**DEFAULTS, **saved["config"]}
    length, left_out = fields["prefix_length"], fields["leave_out"]
    are_layers = isinstance(left_out, list) and all(type(layer) is int for layer in left_out)
    if type(length) is not int or length < 1 or not are_layers or not isinstance(saved.get("name"), str):
        raise ValueError(
            f"{CONFIG_NAME} of {os.fspath(adapter)!r} must have a `name`, a `prefix_length` of at least 1 and `leave_out`, a list of the "
            f"numbers of layers; got {shortened(repr((saved.get('name'), length, left_out)))}."
        )
    if fields["use_gating"]:
        raise ValueError(
            f"The adapter {os.fspath(adapter)!r} has use_gating=True: its gate depends on the input, and no prefix here has such "
            "a gate. Train one without."
        )
    if "version" not in saved:
        fields["non_linearity"] = OLD_ACTIVATIONS.get(fields["non_linearity"], fields["non_linearity"])
    return fields


def _read_weights(adapter: Any, allow_pickle: bool, hub_arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    path = find_file(adapter, SAFETENSORS_NAME, **hub_arguments)
    if path is not None:
        with naming_file(path):
            return load_file(path)
    if not allow_pickle:
        raise ValueError(
            f"The adapter {os.fspath(adapter)!r} has no {SAFETENSORS_NAME}. If its weights are in {PICKLE_NAME} and you trust where they "
            "come from, pass allow_pickle=True: then tensors, and nothing else, are unpickled."
        )
    path = find_file(adapter, PICKLE_NAME, **hub_arguments)
    if path is None:
        raise ValueError(f"The adapter {os.fspath(adapter)!r} has neither {SAFETENSORS_NAME} nor {PICKLE_NAME}.")
    with naming_file(path):
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError) as error:  # as torch calls a broken archive
            raise pickle.UnpicklingError(str(error)) from error
        if not isinstance(tensors, dict) or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
            raise pickle.UnpicklingError(f"it holds a {type(tensors).__name__}, expected a dictionary of tensors")
        return tensors


def _own_tensors(
    adapter: Any, saved: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Return an adapter's tensors by location and part. Files that were unpickled have each of them several times, because
    every layer of that library has the prefixes of all.
    """
    own = re.compile(rf"(?:^|\.)prefix_tunings\.{re.escape(saved['name'])}\.(\w+\..+)$")
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        match = own.search(key)
        if match is None:
            raise ValueError(
                f"The adapter {os.fspath(adapter)!r} has a tensor {key}, which is no part of the prefix {saved['name']!r}, and is not "
                "converted."
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(
                f"The adapter {os.fspath(adapter)!r} has numbers in {key} that are not finite or not real."
            )
        known = tensors.setdefault(match[1], tensor)
        if not torch.equal(known, tensor):
            raise ValueError(f"The adapter {os.fspath(adapter)!r} has two different tensors for {match[1]}.")
    return tensors


def _numbers(
    adapter: Any,
    fields: Mapping[str, Any],
    location: str,
    tensors: Mapping[str, torch.Tensor],
    num_modules: int,
    shape: tuple[int, int],
) -> torch.Tensor:
    """Return the keys and values of one location, (tokens, modules, 2, kv_heads, head_dim)."""
    own = {
        name.removeprefix(f"{location}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{location}.")
    }
    length, wanted = fields["prefix_length"], (fields["prefix_length"], num_modules, 2, *shape)
    try:
        if fields["flat"]:
            return own["control_trans"].float().view(wanted)
        activation = ACT2FN[ACTIVATIONS.get(fields["non_linearity"].lower(), fields["non_linearity"].lower())]
        parts = [own[f"control_trans.{index}.{kind}"].float() for index in (0, 2) for kind in ("weight", "bias")]
        hidden = activation(nn.functional.linear(own["wte.weight"].float()[:length], parts[0], parts[1]))
        return nn.functional.linear(hidden, parts[2], parts[3]).view(wanted)
    except (KeyError, RuntimeError, AttributeError) as error:
        found = {name: tuple(tensor.shape) for name, tensor in own.items()}
        raise ValueError(
            f"The weights of {os.fspath(adapter)!r} do not fit its configuration and the base model: {location} must make keys and values "
            f"of (tokens, modules, 2, heads, dim) {wanted}, and has {found} ({error})."
        ) from error
