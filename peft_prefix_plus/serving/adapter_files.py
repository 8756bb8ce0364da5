"""Where the files of an adapter that is to be served lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils.hub import CHAT_TEMPLATE_FILE


def adapter_folder(adapter: str, **hub_arguments: Any) -> Path:
    """
    Return the directory that has an adapter's files, of the formats that are read here only.

    Args:
        adapter (`str`): A directory or a repository on the Hub, from which the files are fetched.
        hub_arguments: `revision`, `token` and so on, as for [`snapshot_download`].

    Raises:
        ValueError: If there are none.
    """
    if os.path.isdir(adapter):
        folder = Path(adapter)
    else:
        try:
            folder = Path(
                snapshot_download(
                    adapter,
                    allow_patterns=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CHAT_TEMPLATE_FILE],
                    **hub_arguments,
                )
            )
        except (OSError, ValueError) as error:  # what the Hub raises is either
            raise ValueError(
                f"The adapter {adapter!r} is no directory, and cannot be had from the Hub: {error}"
            ) from error
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"The adapter {adapter!r} has no {name}. Save it by model.save_pretrained().")
    return folder


def chat_template(folder: Path) -> str | None:
    """Return the chat template that an adapter was saved with, if there is one."""
    path = folder / CHAT_TEMPLATE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None
