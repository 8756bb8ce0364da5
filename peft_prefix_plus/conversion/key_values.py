"""
An adapter's keys and values in one file, as its attention modules read them, for any other program; and back.

The file is one of safetensors. For each attention module, under its name in the base model, it has

- `NAME.key`, (kv_heads, num_virtual_tokens, key_dim): as scores take them. Scales and reparameterizations are multiplied in, the
  model's own factor on scores is not;
- `NAME.value`, (kv_heads, num_virtual_tokens, value_dim);
- `NAME.gate`, (query_heads,): g, only in the gated form.

Its metadata has these strings:

- `layout`: `"prefix-key-values/1"`;
- `form`, with s the attention module's factor on scores:
  `"joint"`: K and V stand before the real keys and values, in their softmax;
  `"decoupled"`: silu(c · tanh(s · Q Kᵀ / c)) V is added to what the module computes of the real ones, with c the `score_cap`;
  `"gated"`: tanh(g) · softmax(s · Q Kᵀ) V is added;
- `score_cap`: c, only in the decoupled form;
- `queries`: the queries that meet the keys: `"rotated"`, as the attention module computes them (the prefix has fixed positions, and the
  real tokens keep theirs), or `"unrotated"`, before their rotary position. Without rotary positions the two are the same;
- `modules`: the names of the attention modules, in the model's order, as a JSON list;
- `num_virtual_tokens`, and, as far as they are known, `base_model`, `revision` and `task_type`.

No key has a log-weight: a start that needs one has multiplied it into its keys.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..adapters.lookup import layers_with_adapter
from ..adapters.snapshot import all_or_nothing
from ..attention.added import DECOUPLED_CAP
from ..config import PrefixPlusConfig, shortened
from ..layer import GATE_SCALE
from ..probing.recording import evaluating
from ..probing.targets import select_modules
from ..saving.reading import naming_file
from ..saving.together import saving_together
from ..starting.initialization import initialize_from_key_values
from .arguments import check_base_model, task_type_of
from .flatten import prefix_key_values


LAYOUT = "prefix-key-values/1"
FILE_NAME = "key_values.safetensors"

FORMS = ("joint", "decoupled", "gated")
"""The forms of a prefix, as files name them."""

EXACT = 1e-5
"""How far the keys and values of a fitted reparameterization may be off, relative to their norm, to count as the file's: rounding."""


class KeyValuesFile(NamedTuple):
    """What a file of keys and values holds."""

    metadata: dict[str, str]
    modules: list[str]
    tensors: dict[str, torch.Tensor]


def to_key_values(
    model: PeftModel, adapter_name: str = "default", path: str | os.PathLike[str] | None = None
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """
    Export an adapter's keys and values as attention reads them, with what another program must know to use them. This is
    exact for every form. [Saving and sharing](saving.md#keys-and-values-for-other-programs) describes the file.

    Args:
        model (`PeftModel`): A model with the adapter, which is left as it is.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        path (`str` or `os.PathLike`, *optional*):
            The file to write, or a directory for a file `key_values.safetensors`.

    Returns:
        `tuple[dict[str, str], dict[str, torch.Tensor]]`: The file's metadata and its tensors.

    Raises:
        ValueError: If the model has no such adapter, or the adapter has `modules_to_save`, which are no part of a prefix.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, to_key_values

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig(num_virtual_tokens=10))
    >>> metadata, tensors = to_key_values(model)
    >>> metadata["form"], metadata["queries"]
    ('decoupled', 'unrotated')
    >>> {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    {'model.layers.0.self_attn.key': (4, 10, 16), 'model.layers.0.self_attn.value': (4, 10, 16)}

    ```
    """
    layers = layers_with_adapter(model, adapter_name)
    configs: Any = model.peft_config
    config = configs[adapter_name]
    if config.modules_to_save:
        raise ValueError(
            f"Adapter {adapter_name!r} has modules of its own, {', '.join(config.modules_to_save)}, which are no part of a prefix. "
            "Train one without `modules_to_save`, or share the adapter as model.save_pretrained() saves it."
        )
    tensors = {}
    for name, (key, value) in prefix_key_values(model, adapter_name).items():
        tensors[f"{name}.key"], tensors[f"{name}.value"] = key, value
    if config.gating:
        for name, layer in layers:
            gate = layer.prefix_plus_gate(adapter_name)
            assert gate is not None
            tensors[f"{name}.gate"] = gate.detach().clone()
    is_unrotated = any(layer.reads_unrotated(adapter_name) for _, layer in layers)
    known = {
        "base_model": config.base_model_name_or_path,
        "revision": config.revision,
        "task_type": config.task_type,
    }
    form = "gated" if config.gating else "decoupled" if config.decoupled else "joint"
    metadata = {
        "format": "pt",
        "layout": LAYOUT,
        "form": form,
        **({"score_cap": str(DECOUPLED_CAP)} if form == "decoupled" else {}),
        "queries": "unrotated" if is_unrotated else "rotated",
        "num_virtual_tokens": str(config.num_virtual_tokens),
        "modules": json.dumps([name for name, _ in layers]),
        **{name: str(getattr(value, "value", value)) for name, value in known.items() if value is not None},
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if path is not None:
        file = Path(path) if os.fspath(path).endswith(".safetensors") else Path(path) / FILE_NAME
        with saving_together(file.parent) as folder:
            save_file(tensors, os.path.join(folder, file.name), metadata=metadata)
    return metadata, tensors


def from_key_values(
    path: str | os.PathLike[str],
    model: nn.Module,
    adapter_name: str = "default",
    allow_approximate: bool = False,
    **fields: Any,
) -> PeftModel:
    """
    Make an adapter from a file of keys and values, the inverse of [`to_key_values`].

    Args:
        path (`str` or `os.PathLike`): The file, or a directory with a file `key_values.safetensors`.
        model (`nn.Module`): The base model, without adapters. It is adapted in place.
        adapter_name (`str`, defaults to `"default"`): The name of the new adapter.
        allow_approximate (`bool`, defaults to `False`):
            Take a reparameterization that cannot produce the file's keys and values exactly. They are then fitted by least
            squares, and a warning says how far they are off.
        fields: Further fields of [`PrefixPlusConfig`], such as `reparameterization`.

    Returns:
        `PeftModel`: The model with the new adapter, which can be trained further.

    Raises:
        TypeError: If `model` is not a base model.
        ValueError: If the file is broken or of another model, `fields` contradict it, or the adapter's keys and values differ
            from the file's and `allow_approximate` is `False`. The model is then left as it was.

    Warns:
        UserWarning: If keys and values are approximate.

    Example:

    ```py
    >>> import os, tempfile
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, from_key_values, to_key_values

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig(num_virtual_tokens=10))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "prefix.safetensors")
    ...     _ = to_key_values(model, path=path)
    ...     model = from_key_values(path, model.unload())
    >>> model.peft_config["default"].num_virtual_tokens
    10

    ```
    """
    check_base_model(model, os.fspath(path))
    file = read_key_values(path)
    config = _config(file, {"task_type": file.metadata.get("task_type", task_type_of(model)), **fields})
    key_values = {name: (file.tensors[f"{name}.key"], file.tensors[f"{name}.value"]) for name in file.modules}
    with all_or_nothing(model), evaluating(model):
        if list(select_modules(model, config).modules) != file.modules:
            config.target_modules = file.modules
        result = get_peft_model(model, config, adapter_name=adapter_name)
        residuals = initialize_from_key_values(result, key_values, adapter_name)
        _fill_gates(result, adapter_name, file)
        name, error = max(
            ((name, max(residual)) for name, residual in residuals.items()), key=lambda named: float(named[1])
        )
        is_exact = error <= max(EXACT, _rounding(result, adapter_name))
        if not is_exact and not allow_approximate:
            raise ValueError(
                f"The adapter cannot hold the keys and values of {os.fspath(path)}: those of {name} would be off by {error:.2%} of "
                'their norm. Use reparameterization="none", which holds any, or a larger encoder_dim; or pass '
                "allow_approximate=True if this is close enough."
            )
    if not is_exact:
        warnings.warn(
            f"The adapter's keys and values are not exactly those of {os.fspath(path)}: in {name} they are off by {error:.2%} of their "
            "norm.",
            stacklevel=2,
        )
    return result


def read_key_values(path: str | os.PathLike[str]) -> KeyValuesFile:
    """
    Read a file of keys and values.

    Args:
        path (`str` or `os.PathLike`): The file, or a directory with a file `key_values.safetensors`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is broken or of another layout.
    """
    path = find_key_values(path)
    with naming_file(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    known = {"layout": (LAYOUT,), "form": FORMS, "queries": ("rotated", "unrotated")}
    if metadata.get("form") == "decoupled":
        known["score_cap"] = (str(DECOUPLED_CAP),)
    for name, allowed in known.items():
        if metadata.get(name) not in allowed:
            raise ValueError(
                f"{path} is no file of keys and values that is known here: `{name}` in its metadata must be "
                f"{' or '.join(map(repr, allowed))}, got {metadata.get(name)!r}."
            )
    modules = _names_in(path, metadata)
    parts = ("key", "value", *(["gate"] if metadata["form"] == "gated" else []))
    expected = {f"{name}.{part}" for name in modules for part in parts}
    if set(tensors) != expected:
        odd = sorted(expected.symmetric_difference(tensors))
        raise ValueError(
            f"{path} must have exactly the tensors {', '.join(f'NAME.{part}' for part in parts)} of each of its modules; "
            f"{shortened(', '.join(odd))} {'is' if len(odd) == 1 else 'are'} missing or too many."
        )
    for name, tensor in tensors.items():
        dims = 1 if name.endswith(".gate") else 3
        if tensor.dim() != dims or not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise ValueError(
                f"{path}: {name} must be a tensor of {dims} dims of finite real numbers, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}."
            )
    return KeyValuesFile(metadata, modules, tensors)


def find_key_values(path: str | os.PathLike[str]) -> str:
    """Return the file that a path means: itself, or the one in the directory."""
    found = os.path.join(path, FILE_NAME) if os.path.isdir(path) else os.fspath(path)
    if not os.path.isfile(found):
        raise FileNotFoundError(
            f"{found} does not exist. Write a file of keys and values by to_key_values(model, path=…)."
        )
    return found


# ---------------------------------------------------------------------------------------------------- what it says


def _names_in(path: str, metadata: Mapping[str, str]) -> list[str]:
    try:
        modules = json.loads(metadata.get("modules", ""))
    except (ValueError, RecursionError):
        modules = None
    if not isinstance(modules, list) or not modules or not all(isinstance(name, str) for name in modules):
        raise ValueError(
            f"{path}: `modules` in its metadata must be a JSON list of the attention modules' names, got "
            f"{shortened(repr(metadata.get('modules')))}."
        )
    return modules


def _config(file: KeyValuesFile, fields: Mapping[str, Any]) -> PrefixPlusConfig:
    """Return the configuration that a file asks for, with the fields of the user."""
    form = file.metadata["form"]
    fixed = {
        "num_virtual_tokens": file.tensors[f"{file.modules[0]}.key"].shape[1],
        "decoupled": form == "decoupled",
        "gating": form == "gated",
        "position_free": file.metadata["queries"] == "unrotated",
    }
    for name, value in fixed.items():
        if name in fields and fields[name] != value:
            raise ValueError(
                f"`{name}` is {fields[name]!r}, but the file's keys and values are of one with {value!r}. Leave it out."
            )
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        if fields.get(name) is not None:
            raise ValueError(
                f"`{name}` cannot be chosen here: the file says which attention modules have a prefix. Leave it out."
            )
    known = {
        "base_model_name_or_path": file.metadata.get("base_model"),
        "revision": file.metadata.get("revision"),
    }
    reparameterization = fields.get("reparameterization") or "none"  # the default may be one that takes no given keys
    return PrefixPlusConfig(**{**known, **fields, **fixed, "reparameterization": reparameterization})


def _fill_gates(model: PeftModel, adapter_name: str, file: KeyValuesFile) -> None:
    if file.metadata["form"] != "gated":
        return
    for name, layer in layers_with_adapter(model, adapter_name):
        gate, given = layer.prefix_plus_gate[adapter_name], file.tensors[f"{name}.gate"]
        if given.shape != gate.shape:
            raise ValueError(
                f"The gate of {name} must have shape {tuple(gate.shape)} (query_heads,), got {tuple(given.shape)}."
            )
        gate.data.copy_(given / GATE_SCALE)


def _rounding(model: PeftModel, adapter_name: str) -> float:
    """How far rounding to the adapter's dtype brings keys and values off, relative to their norm."""
    _, layer = layers_with_adapter(model, adapter_name)[0]
    return max(torch.finfo(tensor.dtype).eps for tensor in layer.prefix_key_value(adapter_name))
