"""Putting all files of a save in place at once, as far as a file system can."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils import CONFIG_NAME

from .weights import UNFINISHED


STALE_SECONDS = 3600.0
"""After how long a folder that an interrupted save has left is removed by the next save. No adapter takes so long to write."""


@contextmanager
def saving_together(directory: str | os.PathLike[str]) -> Iterator[str]:
    """
    Give a folder to save into, and put its files in a directory when all of them are written.

    If the block fails, the directory is as it was. If the process is killed, what it had is there until the first new file is
    put in place; then what is missing of the new files is in the folder, beside them.

    Args:
        directory (`str` or `os.PathLike`): The directory, made if it does not exist.
    """
    directory = os.fspath(directory)
    os.makedirs(directory, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=UNFINISHED, dir=directory)
    try:
        yield folder
        for path in _files(folder):
            with open(os.path.join(folder, path), "rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        _put_in_place(folder, directory)
    except BaseException:
        _put_in_place(folder, directory)  # an interrupt is raised when all is in place; a full disk fails again
        raise
    shutil.rmtree(folder, ignore_errors=True)
    _remove_stale(directory)


def _put_in_place(folder: str, directory: str) -> None:
    for path in _files(folder):
        target = os.path.join(directory, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(os.path.join(folder, path), target)


def _files(folder: str) -> list[str]:
    """The files below a folder, each configuration last: the weights before it say what it has to be."""
    found = [
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names
    ]
    return sorted(found, key=lambda path: (os.path.basename(path) == CONFIG_NAME, path))


def _remove_stale(directory: str) -> None:
    for entry in os.scandir(directory):
        if entry.name.startswith(UNFINISHED) and time.time() - entry.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(entry.path, ignore_errors=True)
