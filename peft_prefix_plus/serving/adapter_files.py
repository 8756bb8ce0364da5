"""The files and the name of an adapter to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils.hub import CHAT_TEMPLATE_FILE

from ..saving.reading import find_folder


def adapter_folder(adapter: str, **hub_arguments: Any) -> Path:
    """
    Return the directory of an adapter's files. From the Hub, only the files that serving reads are downloaded.

    Args:
        adapter (`str`): A directory or a repository on the Hub.
        hub_arguments: `revision`, `token` and so on, as for [`snapshot_download`].

    Returns:
        `Path`: The directory.

    Raises:
        ValueError: If there is no such adapter, or its configuration or weights are missing.
    """
    folder = find_folder(adapter, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CHAT_TEMPLATE_FILE], **hub_arguments)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"The adapter {adapter!r} has no {name}. Save it by model.save_pretrained().")
    return folder


def check_name(name: str, is_base_name: bool) -> None:
    """
    Raise unless an adapter may have a name.

    Args:
        name (`str`): The name.
        is_base_name (`bool`): Whether it is a name of the base model.

    Raises:
        ValueError: If it is empty, or the base model's.
    """
    if not name:
        raise ValueError("The name of an adapter is empty. Give it a name.")
    if is_base_name:
        raise ValueError(f"An adapter cannot be named {name!r}: that is the base model. Choose another name.")


def chat_template(folder: Path) -> str | None:
    """Return the chat template that an adapter was saved with, or `None`."""
    path = folder / CHAT_TEMPLATE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None
