"""
The folder beside an adapter that has it as one of PEFT's PREFIX_TUNING, which loads on a machine without this package.

`conversion` says how an adapter is converted: it imports this module, not the other way round.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from peft import PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from .files import CONVERTED, is_prefix_tuning_folder, prefix_tuning_folder
from .together import saving_together


Exported = dict[str, tuple[Any, dict[str, torch.Tensor]]]
"""By adapter, the configuration and the tensors of PEFT's PREFIX_TUNING that give the same output."""

CONVERTERS: dict[PeftType, Callable[[Any, str], tuple[Any, dict[str, torch.Tensor]]]] = {}
"""What converts an adapter of a model to one of another method."""


def as_prefix_tuning(model: Any, names: list[str], directory: str | os.PathLike[str] | None = None) -> Exported:
    """
    Return adapters as PEFT's PREFIX_TUNING has them.

    Args:
        model (`PeftModel`): The model that has them.
        names (`list[str]`): The adapters.
        directory (`str` or `os.PathLike`, *optional*): Where they are to be saved, if it is known.

    Raises:
        ValueError: If there are none, PREFIX_TUNING has no adapter with the same output, or another adapter's folder is in the way.
    """
    if not names:
        raise ValueError("`include_prefix_tuning` is True, and no PREFIX_PLUS adapter is saved.")
    folders = {prefix_tuning_folder(name) for name in names}
    for name in folders.intersection(model.peft_config):
        raise ValueError(
            f"The adapter {name!r} is saved in the folder of that name, which `include_prefix_tuning` needs. Name the adapter otherwise."
        )
    for path in [os.path.join(directory, folder) for folder in sorted(folders)] if directory is not None else ():
        if os.path.isfile(os.path.join(path, CONFIG_NAME)) and not is_prefix_tuning_folder(path):
            raise ValueError(
                f"{path} has an adapter that `include_prefix_tuning` did not put there, and needs that place. Move it, or save elsewhere."
            )
    exported = {}
    for name in names:
        try:
            exported[name] = CONVERTERS[PeftType.PREFIX_TUNING](model, name)
        except ValueError as error:
            raise ValueError(f"`include_prefix_tuning` is True for the adapter {name!r}. {error}") from error
    return exported


def write_prefix_tuning(exported: Mapping[str, tuple[Any, dict[str, torch.Tensor]]], folder: str) -> None:
    """Write each adapter into its folder in a folder."""
    for name, (config, tensors) in exported.items():
        save_cached_prefix(config, tensors, os.path.join(folder, prefix_tuning_folder(name)), CONVERTED)


def save_cached_prefix(
    config: Any,
    state_dict: dict[str, torch.Tensor],
    save_directory: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter of PREFIX_TUNING or CARTRIDGE as PEFT writes it, all files together."""
    with saving_together(save_directory) as folder:
        save_file(
            state_dict, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt", **(metadata or {})}
        )
        config.save_pretrained(folder)


def remove_outdated_prefix_tuning(folder: str) -> None:
    """Remove what an earlier save has put beside an adapter that is another one now, and nothing else."""
    if not is_prefix_tuning_folder(folder):
        return
    for name in (
        CONFIG_NAME,
        SAFETENSORS_WEIGHTS_NAME,
    ):  # the weights last: by them the rest is known after an interrupt
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))
    if not os.listdir(folder):
        os.rmdir(folder)
    warnings.warn(
        f"{folder} held the adapter that was saved there before, and is removed. Save with include_prefix_tuning=True to "
        "have it of this one.",
        stacklevel=3,
    )
