"""Reading the files of an adapter, from a directory or from a repository on the Hub, with errors that name what cannot be read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError


BROKEN_FILE = (
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    RecursionError,
    OverflowError,
    UnicodeError,
)
"""What reading a broken file raises, besides errors that say which file it is."""


# ---------------------------------------------------------------------------------------------------- finding


def find_file(
    source: str | os.PathLike[str], name: str, subfolder: str | None = None, **hub_kwargs: Any
) -> str | None:
    """
    Return a file of an adapter, downloaded if it is on the Hub, or `None` if the adapter has none of this name.

    Args:
        source (`str` or `os.PathLike`): A directory or a repository on the Hub.
        name (`str`): The name of the file.
        subfolder (`str`, *optional*): A folder in it.
        hub_kwargs: As in `hf_hub_download`.

    Raises:
        ValueError: If the Hub does not say whether there is one.
    """
    if os.path.isdir(source):
        path = os.path.join(source, subfolder or "", name)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(os.fspath(source), name, subfolder=subfolder, **hub_kwargs)
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError) as error:  # what the Hub raises is either
        raise _unavailable(source, f"its {name}", error) from error


def find_folder(source: str | os.PathLike[str], patterns: Sequence[str], **hub_kwargs: Any) -> Path:
    """
    Return the directory of an adapter's files, downloaded if they are on the Hub.

    Args:
        source (`str` or `os.PathLike`): A directory or a repository on the Hub.
        patterns (`Sequence[str]`): What to download of a repository, as in `snapshot_download`.
        hub_kwargs: As in `snapshot_download`.

    Raises:
        ValueError: If it is not a directory, and cannot be downloaded.
    """
    if os.path.isdir(source):
        return Path(source)
    try:
        return Path(snapshot_download(os.fspath(source), allow_patterns=list(patterns), **hub_kwargs))
    except (OSError, ValueError) as error:  # what the Hub raises is either
        raise _unavailable(source, "it", error) from error


def _unavailable(source: str | os.PathLike[str], what: str, error: Exception) -> ValueError:
    return ValueError(f"{os.fspath(source)!r} is not a directory, and {what} cannot be loaded from the Hub: {error}")


# ---------------------------------------------------------------------------------------------------- contents


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Return the fields of the object in a JSON file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not valid JSON, or anything but an object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(  # noqa: TRY004
            f"{os.fspath(path)} must contain a JSON object, and contains a {type(fields).__name__}."
        )
    return fields


def load_config(source: str | os.PathLike[str], subfolder: str | None = None, **hub_kwargs: Any) -> PeftConfig:
    """
    Load the configuration of an adapter of any method.

    Args:
        source (`str` or `os.PathLike`): A directory or a repository on the Hub.
        subfolder (`str`, *optional*): A folder in it.
        hub_kwargs: As in `hf_hub_download`.

    Raises:
        ValueError: If there is no configuration, it is broken, or PEFT does not know its method.
    """
    with naming_config(source, subfolder):
        config: PeftConfig = PeftConfig.from_pretrained(os.fspath(source), subfolder=subfolder, **hub_kwargs)
    return config


@contextmanager
def naming_config(source: str | os.PathLike[str], subfolder: str | None = None) -> Iterator[None]:
    """Make an error about the contents of a configuration name its file, and say what to do."""
    path = os.path.join(source, subfolder or "", CONFIG_NAME)
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"{path} is of the method {error}, which PEFT does not know. Import the package that has it."
        ) from error
    except (ValueError, TypeError, *BROKEN_FILE) as error:
        if CONFIG_NAME in str(error):
            raise  # it names the file
        raise _broken(path, error) from error


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make an error about a file's contents name the file, and say what to do."""
    try:
        yield
    except BROKEN_FILE as error:
        raise _broken(path, error) from error


def _broken(path: str | os.PathLike[str], error: Exception) -> ValueError:
    reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split()).rstrip(".")
    return ValueError(
        f"{os.fspath(path)} cannot be read as an adapter ({type(error).__name__}: {reason}). It is incomplete or broken: copy or "
        "download it again, or save the adapter anew."
    )
