"""Finding and removing the Trainer's checkpoints in a directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..saving.files import TRAINER_STATE
from ..saving.reading import read_fields


def checkpoints(output: Path, complete_only: bool = False) -> list[Path]:
    """Return the checkpoints in a directory, oldest first. One is complete if the Trainer wrote its last file."""
    numbered = {}
    for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdigit() and path.is_dir() and (not complete_only or _is_complete(path)):
            numbered[int(number)] = path
    return [numbered[number] for number in sorted(numbered)]


def remove_checkpoints(output: Path) -> None:
    """Remove all checkpoints in a directory."""
    for checkpoint in checkpoints(output):
        shutil.rmtree(checkpoint)


def _is_complete(checkpoint: Path) -> bool:
    try:
        read_fields(checkpoint / TRAINER_STATE)
    except (OSError, ValueError):
        return False
    return True
