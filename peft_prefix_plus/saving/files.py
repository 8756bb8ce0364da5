"""
Writing files safely, and keeping a model card up to date. Every save rewrites the section of a card that says how to
load the adapters, from the adapters in the card's directory.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from glob import escape as glob_escape
from glob import glob
from typing import Any

import peft
import yaml
from huggingface_hub import ModelCard, metadata_load
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..registration import PREFIX_PLUS
from .model_card import SavedAdapter, Training, how_to_use, is_hub_id, update_metadata, with_section
from .reading import read_fields
from .weights import UNFINISHED, read_weights


CARD_NAME = "README.md"
CONFIG_NAME = "adapter_config.json"
TRAINER_STATE = "trainer_state.json"

NOT_LEARNED = ".key_start.", ".prefix_plus_scaling."
"""What the names of tensors contain that an adapter's file has beside what was learned: where keys started, and the measured scales."""


def prefix_tuning_folder(adapter_name: str) -> str:
    """The folder for an adapter as one of PEFT's PREFIX_TUNING. Below each other there are no folders: pushing leaves them out."""
    return "prefix_tuning" if adapter_name == "default" else f"{adapter_name}_prefix_tuning"


CONVERTED = {"prefix_plus_converted": "true"}
"""What the metadata of the weights in such a folder has: a user's own folder of that name is not one."""


def is_prefix_tuning_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter as one of PEFT's PREFIX_TUNING that was put there beside its own form."""
    try:
        with safe_open(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
            return CONVERTED.items() <= (file.metadata() or {}).items()
    except (OSError, SafetensorError):
        return False


def write_atomically(path: str, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one."""
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{secrets.token_hex(8)}")
    try:
        # opened by name, not by `tempfile`, so that the file can be read by whom the user's umask says
        with open(temporary, "x", encoding="utf-8", newline="") as writer:
            writer.write(text)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


# ---------------------------------------------------------------------------------------------------- when to write


def update_card_of_saved_config(save_directory: str) -> None:
    """
    Update the card that PEFT wrote for a configuration saved in a directory, if there is one.

    PEFT saves an adapter that is not named "default" in a folder of that name below the card. Only a card that this
    version of PEFT wrote is touched there: the folder above a saved configuration may be anything.

    Args:
        save_directory (`str`): The directory that has the `adapter_config.json`.
    """
    if os.path.exists(os.path.join(save_directory, CARD_NAME)):
        update_model_card(save_directory)
        return
    parent = os.path.dirname(os.path.abspath(save_directory))
    card = _load_card(parent)
    if card is not None and f"- PEFT {peft.__version__}" in card.text.splitlines():
        update_model_card(parent)


def update_model_card(directory: str, repo_id: str | None = None, any_library: bool = False) -> None:
    """
    Make the card in a directory describe the PREFIX_PLUS adapters there, and say how to load them.

    Without a card, without an adapter, or if the card cannot be parsed, nothing happens.

    Args:
        directory (`str`): The directory, which has adapters in it or in its folders.
        repo_id (`str`, *optional*): The repository that the directory goes to; `None` if it is not known.
        any_library (`bool`, defaults to `False`):
            Take over a card that names another library; otherwise such a card is left alone.
    """
    card = _load_card(directory)
    adapters = list(_saved_adapters(directory)) if card is not None else []
    if card is None or not adapters or not (any_library or card.data.library_name == "peft"):
        return
    update_metadata(card.data, adapters[0])
    training = _training_of(directory, card.data)
    parent, name = os.path.split(os.path.abspath(directory))
    name = os.path.basename(parent) if name.startswith(UNFINISHED) else name  # which the card is about to be moved to
    card.text = with_section(card.text, how_to_use(adapters, repo_id, name, training))
    write_atomically(os.path.join(directory, CARD_NAME), str(card))


def write_model_card(write: Callable[[str], None], directory: str, repo_id: str | None, has_prefix: bool) -> None:
    """
    Write a model's card, complete it, and never leave half of one.

    Args:
        write (`Callable`): Writes PEFT's card in a directory, over the one that is there.
        directory (`str`): The directory of the card.
        repo_id (`str`, *optional*): The repository that the directory goes to; `None` if it is not known.
        has_prefix (`bool`): Whether the model has a PREFIX_PLUS adapter. Another model's card is left as PEFT writes it.
    """
    previous = _load_metadata(directory)
    card = os.path.join(directory, CARD_NAME)
    with tempfile.TemporaryDirectory() as folder:
        if os.path.exists(card):
            shutil.copy(card, folder)
        write(folder)
        with open(os.path.join(folder, CARD_NAME), encoding="utf-8", newline="") as written:
            write_atomically(card, written.read())
    if has_prefix:
        _restore_metadata(directory, previous)
        update_model_card(directory, repo_id)


# ---------------------------------------------------------------------------------------------------- what is there


def _saved_adapters(directory: str) -> Iterator[SavedAdapter]:
    """Yield the PREFIX_PLUS adapters of a directory; a folder with a card of its own (a checkpoint) is not part of it."""
    folders = sorted(
        entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith(UNFINISHED)
    )
    for subfolder in [None, *folders]:
        path = os.path.join(directory, subfolder or "")
        if subfolder is not None and os.path.exists(os.path.join(path, CARD_NAME)):
            continue
        try:
            config = read_fields(os.path.join(path, CONFIG_NAME))
        except (OSError, ValueError):
            continue
        if config.get("peft_type") == PREFIX_PLUS.value:
            adapter = SavedAdapter(subfolder, config)
            folder = prefix_tuning_folder(adapter.name)
            has_prefix_tuning = is_prefix_tuning_folder(os.path.join(directory, folder))
            yield replace(
                adapter,
                num_parameters=_num_parameters(path),
                prefix_tuning=folder if has_prefix_tuning else None,
            )


def _num_parameters(folder: str) -> int | None:
    """The number of parameters that an adapter has learned, if its file of weights can be read."""
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return None
    try:
        shapes = read_weights(path).shapes
    except (OSError, ValueError):
        return None
    return sum(math.prod(shape) for name, shape in shapes.items() if not any(part in name for part in NOT_LEARNED))


def _training_of(directory: str, data: Any) -> Training:
    """What the Trainer has left in a directory, in its checkpoints and on the card, about the training."""
    paths = [
        os.path.join(directory, TRAINER_STATE),
        *sorted(
            glob(os.path.join(glob_escape(directory), "checkpoint-*", TRAINER_STATE)),
            key=os.path.getmtime,
            reverse=True,
        ),
    ]
    state: dict[str, Any] = {}
    for path in filter(os.path.isfile, paths):
        try:
            state = read_fields(path)
            break
        except (OSError, ValueError):
            continue
    return Training.of(state, data.datasets)


def _load_metadata(directory: str) -> dict[str, Any]:
    """Return the metadata of the card in a directory; empty if there is no card or it cannot be parsed."""
    try:
        return metadata_load(os.path.join(directory, CARD_NAME)) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _load_card(directory: str) -> Any:
    """Return the `ModelCard` in a directory; `None` if there is none, or it has no metadata or cannot be parsed."""
    if not _load_metadata(directory):
        return None
    try:
        return ModelCard.load(os.path.join(directory, CARD_NAME))
    except (ValueError, TypeError):
        return None


def _restore_metadata(directory: str, previous: dict[str, Any]) -> None:
    """Put back what PEFT drops from a card that it updates: the user's tags, and a base model's id for its directory."""
    card = _load_card(directory)
    if card is None:
        return
    tags = {tag for tag in previous.get("tags") or [] if not tag.startswith("base_model:adapter:")}
    card.data.tags = sorted(tags.union(card.data.tags or [])) or None
    if not is_hub_id(card.data.base_model) and previous.get("base_model"):
        card.data.base_model = previous["base_model"]
    write_atomically(os.path.join(directory, CARD_NAME), str(card))
