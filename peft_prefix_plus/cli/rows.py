"""Reading rows of data as dictionaries: from JSON-lines files, and with `datasets` from CSV and Parquet files, folders and the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..config import shortened
from .errors import CommandError, shown_as_command_error


class Row(NamedTuple):
    """
    A row of data.

    Attributes:
        place (`str`): Where it is, for errors.
        fields (`dict[str, Any]`): Its fields by name.
    """

    place: str
    fields: dict[str, Any]


TABLES = {".csv": "csv", ".parquet": "parquet"}
"""The formats that `datasets` reads, by the file's ending. Any other file is read as JSON lines."""


def read_rows(source: str | Path, split: str = "train", name: str | None = None) -> list[Row]:
    """
    Read the rows of a file, of a folder of files, or of a data set on the Hub.

    Args:
        source (`str` or `Path`): A JSON-lines, CSV or Parquet file, a folder that `datasets` can load, or a name on the Hub.
        split (`str`, defaults to `"train"`): The split of a folder or data set. A file has only one.
        name (`str`, *optional*): The configuration of a data set that has several.

    Returns:
        `list[Row]`: The rows.

    Raises:
        CommandError: If the source cannot be read, or has no rows.
    """
    path = Path(source)
    table = TABLES.get(path.suffix.lower())
    if path.is_file() and table is not None:
        return _load(str(source), table, data_files=str(path), split="train")
    if not has_one_split(source):
        return _load(f"{source}, split {split!r}", str(source), name=name, split=split)
    return _read_lines(path)


def has_one_split(source: str | Path) -> bool:
    """Return whether a source is a file, rather than a folder or a name on the Hub."""
    path = Path(source)
    return path.is_file() or (not path.is_dir() and not _is_hub_name(str(source)))


def _is_hub_name(source: str) -> bool:
    """Return whether a text can be NAME or OWNER/NAME. With the ending of a data file it is a path."""
    parts = source.split("/")
    is_file_name = Path(source).suffix.lower() in (*TABLES, ".json", ".jsonl", ".txt")
    return len(parts) <= 2 and all(parts) and parts[0] not in (".", "..", "~") and not is_file_name


def _load(place: str, *arguments: str, **options: Any) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise CommandError(
            f"Reading {place} needs the package datasets. Install with: "
            'pip install "peft-prefix-plus[cli]". Or give a JSON-lines file.'
        ) from error
    with shown_as_command_error(Exception, while_doing=f"Cannot read {place}"):
        dataset = datasets.load_dataset(*arguments, **options)
        names = {
            column: feature.names
            for column, feature in dataset.features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
        rows = [Row(f"{place}, row {number}", dict(fields)) for number, fields in enumerate(dataset, start=1)]
    for row in rows:
        for column, labels in names.items():
            number = row.fields[column]
            row.fields[column] = labels[number] if isinstance(number, int) and number >= 0 else None
    if not rows:
        raise CommandError(f"{place} has no rows.")
    return rows


def _read_lines(path: Path) -> list[Row]:
    """Return the objects in a JSON-lines file."""
    text = read_text(path)
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise CommandError(
                f"{place}: expected one JSON object per line, found {shortened(line)} ({error.msg}, column {error.colno})."
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deep, or numbers of thousands of digits
            raise CommandError(f"{place}: cannot read {shortened(line)}: {error}.") from error
        if not isinstance(fields, dict):
            raise CommandError(f"{place}: expected a JSON object, found {shortened(line)}.")
        found.append(Row(place, fields))
    if not found:
        raise CommandError(f"{path} is empty: expected one JSON object per line.")
    return found


def read_text(path: Path) -> str:
    """
    Return the text of a file.

    Raises:
        CommandError: If it cannot be read, or is not UTF-8.
    """
    with shown_as_command_error(OSError, UnicodeDecodeError, while_doing=f"Cannot read {path}"):
        return path.read_text(encoding="utf-8-sig")
