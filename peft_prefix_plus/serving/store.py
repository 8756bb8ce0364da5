"""
The folder from which a server's processes take their adapters.

    <sha256>.safetensors    one prefix: `layers.<i>.key` and `layers.<i>.value`, (kv_heads, tokens, dim) each, as they stand in a
                            cache whose text begins at position `num_virtual_tokens`; the number is in the metadata
    adapters.json           which prefix each name stands for

A file is named by what is in it. So a name that gets another prefix never meets cached blocks of the old one, and two names of the
same prefix share them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


KeyValues = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values, (kv_heads, tokens, dim) each, by layer."""

FORMAT = "prefix_plus_key_values"
NAMES = "adapters.json"
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """
    An adapter that can be asked for.

    Attributes:
        digest (`str`): The name of its prefix's file.
        num_virtual_tokens (`int`): How many tokens it takes of the context.
        source (`str`): The directory or repository that it came from.
    """

    digest: str
    num_virtual_tokens: int
    source: str


class PrefixStore:
    """
    The adapters of a server, in a folder that all its processes read.

    Args:
        directory (`str` or `os.PathLike`): The folder, which exists. With several machines, one that all of them see.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(f"The adapters' folder {str(directory)!r} does not exist. Make it, or name another one.")
        self._entries: dict[str, Entry] = {}
        self._seen: tuple[int, int] | None = None

    def entries(self) -> dict[str, Entry]:
        """Return the adapters by name. The file is read again only after another process has changed it."""
        try:
            status = os.stat(self.directory / NAMES)
        except FileNotFoundError:
            return {}
        seen = (status.st_mtime_ns, status.st_ino)
        if seen != self._seen:
            found = json.loads((self.directory / NAMES).read_text(encoding="utf-8"))
            self._entries = {name: Entry(**fields) for name, fields in found.items()}
            self._seen = seen
        return self._entries

    def add(self, name: str, key_values: KeyValues, source: str) -> Entry:
        """
        Let a name stand for a prefix, whatever it stood for before.

        Args:
            name (`str`): The name.
            key_values (`KeyValues`): The prefix.
            source (`str`): Where the adapter came from.
        """
        tensors = {}
        for layer, (key, value) in key_values.items():
            tensors[f"layers.{layer}.key"] = key.contiguous()
            tensors[f"layers.{layer}.value"] = value.contiguous()
        num_virtual_tokens = next(iter(tensors.values())).shape[1]
        metadata = {"format": FORMAT, "num_virtual_tokens": str(num_virtual_tokens)}
        content = save(tensors, metadata=metadata)
        entry = Entry(hashlib.sha256(content).hexdigest(), num_virtual_tokens, source)
        with self._changing() as entries:
            if not self._path(entry.digest).exists():
                self._write(self._path(entry.digest), content)
            before = entries.get(name)
            entries[name] = entry
            self._write_names(entries)
            self._drop_unnamed(before, entries)
        return entry

    def remove(self, name: str) -> None:
        """
        Let a name stand for nothing.

        Raises:
            KeyError: If there is no adapter of that name.
        """
        with self._changing() as entries:
            before = entries.pop(name)
            self._write_names(entries)
            self._drop_unnamed(before, entries)

    def num_virtual_tokens(self, digest: str) -> int:
        """
        Return the length of a prefix.

        Raises:
            ValueError: If there is no such prefix.
        """
        with self._opened(digest) as file:
            return int(file.metadata()["num_virtual_tokens"])

    def load(self, digest: str) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """
        Return a prefix's keys and values, (kv_heads, tokens, dim) each, by layer.

        Raises:
            ValueError: If there is no such prefix.
        """
        with self._opened(digest) as file:
            layers = sorted({int(name.split(".")[1]) for name in file.keys()})  # noqa: SIM118 - a file is not iterable
            return {
                layer: (file.get_tensor(f"layers.{layer}.key"), file.get_tensor(f"layers.{layer}.value"))
                for layer in layers
            }

    def _path(self, digest: str) -> Path:
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            raise ValueError(f"A prefix is named by 64 hexadecimal digits, got {str(digest)[:100]!r}.")
        return self.directory / f"{digest}.safetensors"

    @contextmanager
    def _opened(self, digest: str) -> Iterator[safe_open]:
        try:
            with safe_open(self._path(digest), framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise ValueError(f"The prefix {digest} cannot be read: {error}. Its adapter may have been removed.") from error

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Entry]]:
        """Give the adapters to one process at a time to change."""
        with open(self.directory / ".lock", "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield dict(self.entries())

    def _write_names(self, entries: Mapping[str, Entry]) -> None:
        content = json.dumps({name: asdict(entry) for name, entry in entries.items()}, indent=2)
        self._write(self.directory / NAMES, content.encode())

    def _drop_unnamed(self, before: Entry | None, entries: Mapping[str, Entry]) -> None:
        if before is not None and all(entry.digest != before.digest for entry in entries.values()):
            self._path(before.digest).unlink(missing_ok=True)

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file so that others see all of it or nothing."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
