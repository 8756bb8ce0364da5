"""
An adapter's weights in a file: their shapes, and the settings that they were saved with.

Both are read before anything is built for them, and only from the file's header.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open

from ..registration import METHOD_NAME
from .reading import find_file, naming_file


SETTINGS_KEY = "prefix_plus_settings"
"""The name, in the metadata of the weights' file, of the settings as JSON."""

NOT_SETTINGS_OF_WEIGHTS = {
    # where an adapter comes from, and what it is used for: may be edited in a saved configuration
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    # how it starts and trains
    *("encoder_dropout", "init_weights", "prefix_scaling"),
    # which modules it has: the names of the tensors say so
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "encoder_prefix", "cross_prefix"),
    "modules_to_save",
}
"""The fields of a configuration that do not change what weights of the same names and shapes compute."""

ADVICE = (
    "The adapter was saved from another base model or with other settings. Load it into the model that its "
    "`base_model_name_or_path` names, with the `adapter_config.json` that it was saved with."
)


@dataclass(frozen=True)
class SavedWeights:
    """
    The contents of the header of a file of weights.

    Attributes:
        path (`str`): The file.
        shapes (`dict[str, tuple[int, ...]]`): The shapes of the tensors by name.
        settings (`dict[str, Any]`): The settings of the configuration that they were saved with; empty if it does not say.
    """

    path: str
    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any]


def settings_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that determine what its weights compute."""
    return {name: value for name, value in fields.items() if name not in NOT_SETTINGS_OF_WEIGHTS}


def difference_of_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """
    Return the name of a setting that differs between the two, or `None`. `position_free=None` matches anything: it
    depends on the model.
    """
    for name, value in settings_of(first).items():
        is_open = name == "position_free" and None in (value, second.get(name))
        if name in second and value != second[name] and not is_open:
            return name
    return None


# ---------------------------------------------------------------------------------------------------- reading


def find_weights(source: str, subfolder: str | None = None, **hub_kwargs: Any) -> str | None:
    """
    Return the file of an adapter's weights, as PEFT finds it, or `None` if there is none.

    Args:
        source (`str`): A directory or a repository on the Hub.
        subfolder (`str`, *optional*): A folder in it.
        hub_kwargs: As in `hf_hub_download`.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        try:
            path = find_file(source, name, subfolder, **hub_kwargs)
        except ValueError:
            continue  # loading asks again, and says what is wrong
        if path is not None:
            return path
    return None


def read_saved_weights(source: str, subfolder: str | None = None, **hub_kwargs: Any) -> SavedWeights | None:
    """
    Read what the file of an adapter's weights says of them, or return `None` if there is no file. Of a file on the Hub that is not in
    the cache, only the header is loaded.

    Args:
        source (`str`): A directory or a repository on the Hub.
        subfolder (`str`, *optional*): A folder in it.
        hub_kwargs: As in `hf_hub_download`.

    Raises:
        ValueError: If the file is broken, or a pickle of more than tensors.
    """
    if not os.path.isdir(source) and not hub_kwargs.get("force_download"):
        remote = _read_remote_header(
            source, f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}" if subfolder else SAFETENSORS_WEIGHTS_NAME, hub_kwargs
        )
        if remote is not None:
            return remote
    path = find_weights(source, subfolder, **hub_kwargs)
    return None if path is None else read_weights(path)


def _read_remote_header(repo_id: str, name: str, hub_kwargs: Mapping[str, Any]) -> SavedWeights | None:
    """Load the header of a file on the Hub that is not in the cache; `None` if that does not work, or is not needed."""
    revision = hub_kwargs.get("revision")
    try:
        # what is cached is of the commit that the configuration, which is loaded first, has just been found at
        cached = try_to_load_from_cache(repo_id, name, cache_dir=hub_kwargs.get("cache_dir"), revision=revision)
        if isinstance(cached, str) or hub_kwargs.get("local_files_only"):
            return None
        header = HfApi(endpoint=hub_kwargs.get("endpoint")).parse_safetensors_file_metadata(
            repo_id, name, revision=revision, token=hub_kwargs.get("token")
        )
    except Exception:  # noqa: BLE001 - downloading the file says what is wrong
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
    return SavedWeights(f"{repo_id}/{name}", shapes, _settings_in(header.metadata or {}))


def read_weights(path: str) -> SavedWeights:
    """
    Read what a file of weights says of them.

    Raises:
        ValueError: If the file is broken, or a pickle of more than tensors.
    """
    with naming_file(path):
        if not path.endswith(".safetensors"):
            return SavedWeights(path, _shapes_in_pickle(path), {})
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    return SavedWeights(path, shapes, _settings_in(metadata))


def _settings_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        settings = json.loads(metadata.get(SETTINGS_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _shapes_in_pickle(path: str) -> dict[str, tuple[int, ...]]:
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, OSError) as error:  # as torch calls a broken archive
        raise pickle.UnpicklingError(str(error)) from error
    is_state_dict = isinstance(tensors, dict) and all(isinstance(each, torch.Tensor) for each in tensors.values())
    if not is_state_dict:
        raise pickle.UnpicklingError(f"it holds a {type(tensors).__name__}, expected a dictionary of tensors")
    return {str(name): tuple(tensor.shape) for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------- checking

_SIZED = re.compile(
    rf"(?:^|\.){METHOD_NAME}\.{METHOD_NAME}_(?:encoder|shared)\.(?P<part>key|value|virtual_tokens|hidden)(?:_\d+x\d+x\d+)?(?:\.weight)?$"
)


def check_saved_weights(weights: SavedWeights, fields: Mapping[str, Any]) -> None:
    """
    Raise unless weights have the sizes and settings of a configuration.

    Without this a configuration of a few bytes could ask for more memory than there is.

    Args:
        weights (`SavedWeights`): The weights.
        fields (`Mapping[str, Any]`): The configuration.
    """
    _check_sizes(weights, fields)
    name = difference_of_settings(fields, weights.settings)
    if name is not None:
        raise ValueError(
            f"{weights.path} and the adapter_config.json beside it were not saved together: `{name}` is {fields[name]!r} in the "
            f"configuration, and the weights were saved with {weights.settings[name]!r}. Either saving was interrupted between "
            f"the two, or one was replaced or edited. {_where_the_rest_is(weights.path)}"
        )


def _check_sizes(weights: SavedWeights, fields: Mapping[str, Any]) -> None:
    hidden_size = fields["encoder_hidden_size"] or fields["encoder_dim"]
    length, width = ("num_virtual_tokens", fields["num_virtual_tokens"]), ("encoder_dim", fields["encoder_dim"])
    direct = {"key": (None, length, None), "value": (None, length, None)}
    forms: dict[str, dict[str, Any]] = {
        "none": direct,
        "log": direct,
        "linear": {"virtual_tokens": (length, width)},
        "mlp": {"virtual_tokens": (length, width), "hidden": (("encoder_hidden_size", hidden_size), width)},
    }
    expected = forms.get(fields["reparameterization"], {})
    found: set[str] = set()
    for name, shape in weights.shapes.items():
        match = _SIZED.search(name)
        if match is None or match["part"] not in expected:
            continue
        found.add(match["part"])
        for size, wanted in zip(shape, expected[match["part"]], strict=False):
            if wanted is not None and size != wanted[1]:
                raise ValueError(
                    f"{weights.path} does not fit its configuration: {name} has shape {shape} in it, but `{wanted[0]}` is "
                    f"{wanted[1]}. {ADVICE}"
                )
    missing = [part for part in expected if part not in found]
    if missing:
        raise ValueError(
            f"{weights.path} does not fit its configuration: `reparameterization` is {fields['reparameterization']!r}, but it "
            f"has no tensor for {METHOD_NAME}_encoder.{missing[0]} of any attention module. {ADVICE}"
        )


def _where_the_rest_is(path: str) -> str:
    """The place of the configuration that belongs to weights from an interrupted save."""
    directory = os.path.dirname(path)
    if not os.path.exists(path):  # but on the Hub
        return "Take both files from one save."
    for parent, subfolder in ((directory, ""), (os.path.dirname(directory), os.path.basename(directory))):
        for name in sorted(os.listdir(parent or ".")):
            rest = os.path.join(parent, name, subfolder)
            left = os.listdir(rest) if name.startswith(UNFINISHED) and os.path.isdir(rest) else []
            if CONFIG_NAME in left and os.path.basename(path) not in left:
                return f"The configuration of these weights is {os.path.join(rest, CONFIG_NAME)}: move it here."
    return "Take both files from one save."


# ---------------------------------------------------------------------------------------------------- writing

UNFINISHED = ".saving-adapter-"
"""How the name of a folder starts that holds what is being saved."""


def write_settings(path: str, fields: Mapping[str, Any]) -> None:
    """
    Note in a safetensors file what settings of a configuration its weights were saved with.

    Args:
        path (`str`): The file. It is replaced in one step.
        fields (`Mapping[str, Any]`): The configuration.
    """
    temporary = f"{path}.{secrets.token_hex(8)}"
    try:
        with open(path, "rb") as old, open(temporary, "xb") as new:
            header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
            header.setdefault("__metadata__", {})[SETTINGS_KEY] = json.dumps(settings_of(fields), sort_keys=True)
            encoded = json.dumps(header, separators=(",", ":")).encode()
            encoded += b" " * (-len(encoded) % 8)  # so that the tensors stay aligned
            new.write(len(encoded).to_bytes(8, "little") + encoded)
            shutil.copyfileobj(old, new)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
