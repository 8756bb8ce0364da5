"""Rows of data, as dictionaries: from JSON-lines files, and through `datasets` from CSV and Parquet files, folders and the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from .errors import CommandError, shown_as_command_error


class Row(NamedTuple):
    """A row, and the words that say where it is."""

    place: str
    fields: dict[str, Any]


TABLES = {".csv": "csv", ".parquet": "parquet"}
"""The files that `datasets` reads, by their endings. Any other file has JSON lines."""


def read_rows(source: str | Path, split: str = "train", name: str | None = None) -> list[Row]:
    """
    Read the rows of a file, of a folder of files, or of a data set on the Hub.

    Args:
        source (`str` or `Path`): A JSON-lines, CSV or Parquet file, a folder that `datasets` can load, or a name on the Hub.
        split (`str`, defaults to `"train"`): The split, if the source is no file; a file has one.
        name (`str`, *optional*): The configuration of a data set that has several.

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
    """Tell whether a source is a file, as opposed to a folder or a name on the Hub."""
    path = Path(source)
    return path.is_file() or (not path.is_dir() and not _is_hub_name(str(source)))


def _is_hub_name(source: str) -> bool:
    """Tell whether a text can be NAME or OWNER/NAME; what ends like a file of data is meant as one."""
    parts = source.split("/")
    is_file_name = Path(source).suffix.lower() in (*TABLES, ".json", ".jsonl", ".txt")
    return len(parts) <= 2 and all(parts) and parts[0] not in (".", "..", "~") and not is_file_name


def _load(place: str, *arguments: str, **options: Any) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise CommandError(
            f"Reading {place} needs the package datasets, which is not installed. Install it by: "
            'pip install "peft-prefix-plus[cli]", or give a JSON-lines file.'
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
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"Cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise CommandError(
                f"{place}: expected one JSON object per line, found {shorten(line)} ({error.msg}, column {error.colno})."
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deep, or numbers of thousands of digits
            raise CommandError(f"{place}: cannot read {shorten(line)}: {error}.") from error
        if not isinstance(fields, dict):
            raise CommandError(f"{place}: expected a JSON object, found {shorten(line)}.")
        found.append(Row(place, fields))
    if not found:
        raise CommandError(f"{path} is empty: expected one JSON object per line.")
    return found


def shorten(text: str, limit: int = 60) -> str:
    """Cut a text that is to be shown in an error."""
    return text if len(text) <= limit else f"{text[:limit]}…"
