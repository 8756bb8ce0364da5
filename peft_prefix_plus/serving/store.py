"""
The folder of adapters that the processes of a server share.

    <sha256>.safetensors    one prefix: `layers.<i>.key` and `layers.<i>.value`, (kv_heads, tokens, dim) each, and for a gated one
                            `layers.<i>.gate`, (query_heads,); its form and the rest of [`FoldedPrefix`] as JSON in the metadata
    adapters.json           the prefix of each name

A file is named by the hash of its content. So when a name gets another prefix, it never uses cached blocks of the old one, and two names
of the same prefix share their blocks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


KeyValues = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values, (kv_heads, tokens, dim) each, by layer."""

FORMAT = "prefix_plus_key_values"


@dataclass(frozen=True)
class Turning:
    """
    The rotary rotation of the queries, which a position-free prefix needs undone.

    Attributes:
        frequencies (`tuple[float, ...]`): The angle per position of each plane.
        factor (`float`): The factor on the rotated queries (YaRN).
        is_interleaved, is_clockwise, is_last (`bool`): As in [`QueryRotation`].
        layers (`tuple[int, ...]`): The layers whose queries are rotated.
    """

    frequencies: tuple[float, ...]
    factor: float
    is_interleaved: bool
    is_clockwise: bool
    is_last: bool
    layers: tuple[int, ...]


@dataclass(frozen=True)
class FoldedPrefix:
    """
    A prefix ready to serve: plain keys and values, with the scale and the reparameterization multiplied in.

    Attributes:
        key_values (`KeyValues`): Its keys and values. Those of a joint prefix are rotated for a cache, at positions
            0 … num_virtual_tokens − 1. Those of the other forms are unchanged.
        form (`str`): `"joint"`, in the softmax of the real tokens, or `"decoupled"` or `"gated"`, added to attention.
        gates (`Mapping[int, torch.Tensor]`): The gates of a gated prefix by layer, (query_heads,).
        turning (`Turning`, *optional*): The rotation of the queries to undo, for a position-free prefix.
    """

    key_values: KeyValues
    form: str = "joint"
    gates: Mapping[int, torch.Tensor] = field(default_factory=dict)
    turning: Turning | None = None

    @property
    def num_virtual_tokens(self) -> int:
        """The length of the prefix."""
        return next(iter(self.key_values.values()))[0].shape[1]

    @property
    def num_cached_tokens(self) -> int:
        """How many tokens of the context it takes; 0 if it is added to attention."""
        return self.num_virtual_tokens if self.form == "joint" else 0


NAMES = "adapters.json"
KEPT_SECONDS = 3600.0
"""How long a prefix without a name is kept."""
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """
    An adapter with a name.

    Attributes:
        digest (`str`): The hash of its prefix, which names the file.
        form (`str`): The form of the prefix.
        num_cached_tokens (`int`): How many tokens of the context it takes.
        source (`str`): The directory or repository that it came from.
    """

    digest: str
    form: str
    num_cached_tokens: int
    source: str


class PrefixStore:
    """
    The adapters of a server, in a folder that all its processes read.

    Args:
        directory (`str` or `os.PathLike`): The folder, which must exist. Several machines need one that all of them can access.

    Raises:
        ValueError: If it does not exist.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(f"The adapters' folder {str(directory)!r} does not exist. Make it, or name another one.")
        self._entries: dict[str, Entry] = {}
        self._seen: tuple[int, int] | None = None

    def entries(self) -> dict[str, Entry]:
        """Return the adapters by name. The file is read again only after it has changed."""
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

    def add(self, name: str, prefix: FoldedPrefix, source: str) -> Entry:
        """
        Store a prefix under a name. A prefix that had the name loses it.

        Args:
            name (`str`): The name.
            prefix (`FoldedPrefix`): The prefix.
            source (`str`): The adapter's directory or repository, to show to clients.

        Returns:
            `Entry`: The entry of the name.
        """
        tensors = {f"layers.{layer}.gate": gate.contiguous() for layer, gate in prefix.gates.items()}
        for layer, (key, value) in prefix.key_values.items():
            tensors[f"layers.{layer}.key"] = key.contiguous()
            tensors[f"layers.{layer}.value"] = value.contiguous()
        turning = None if prefix.turning is None else asdict(prefix.turning)
        about = {
            "format": FORMAT,
            "form": prefix.form,
            "num_cached_tokens": prefix.num_cached_tokens,
            "turning": turning,
        }
        content = save(
            tensors, metadata={"about": json.dumps(about)}
        )  # one entry, because the order of several is random
        entry = Entry(hashlib.sha256(content).hexdigest(), prefix.form, prefix.num_cached_tokens, source)
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
        Remove a name.

        Raises:
            KeyError: If no adapter has the name.
        """
        with self._changing() as entries:
            before = entries.pop(name)
            self._write_names(entries)
            self._drop_unnamed(before, entries)

    def about(self, digest: str) -> tuple[str, int]:
        """
        Return the form of a prefix, and how many tokens of the context it takes.

        Raises:
            ValueError: If no readable prefix has this digest.
        """
        with self._opened(digest) as file:
            about = _about(file)
            return str(about["form"]), int(about["num_cached_tokens"])

    def load(self, digest: str) -> FoldedPrefix:
        """
        Return the prefix of a digest.

        Raises:
            ValueError: If no readable prefix has this digest.
        """
        with self._opened(digest) as file:
            about = _about(file)
            names = list(file.keys())
            layers = sorted({int(name.split(".")[1]) for name in names})
            turning = about["turning"]
            if turning is not None:
                turning = Turning(**{**turning, **{name: tuple(turning[name]) for name in ("frequencies", "layers")}})
            return FoldedPrefix(
                {
                    layer: (file.get_tensor(f"layers.{layer}.key"), file.get_tensor(f"layers.{layer}.value"))
                    for layer in layers
                },
                about["form"],
                {
                    layer: file.get_tensor(f"layers.{layer}.gate")
                    for layer in layers
                    if f"layers.{layer}.gate" in names
                },
                turning,
            )

    def _path(self, digest: str) -> Path:
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            raise ValueError(f"The digest of a prefix must be 64 hexadecimal digits, got {str(digest)[:100]!r}.")
        return self.directory / f"{digest}.safetensors"

    @contextmanager
    def _opened(self, digest: str) -> Iterator[Any]:
        try:
            with safe_open(self._path(digest), framework="pt") as file:
                yield file
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"The prefix {digest} cannot be read: {error}. If its adapter has been removed, load it again."
            ) from error

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Entry]]:
        """Lock the folder, and yield the adapters by name to change."""
        with open(self.directory / ".lock", "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield dict(self.entries())

    def _write_names(self, entries: Mapping[str, Entry]) -> None:
        content = json.dumps({name: asdict(entry) for name, entry in entries.items()}, indent=2)
        self._write(self.directory / NAMES, content.encode())

    def _drop_unnamed(self, before: Entry | None, entries: Mapping[str, Entry]) -> None:
        """Remove the files that have had no name for `KEPT_SECONDS`. Running requests may need newer ones."""
        named = {entry.digest for entry in entries.values()}
        if before is not None and before.digest not in named:
            os.utime(self._path(before.digest))
        for path in self.directory.glob("*.safetensors"):
            if path.stem not in named and path.stat().st_mtime < time.time() - KEPT_SECONDS:
                path.unlink(missing_ok=True)

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file so that others see all of it or nothing."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _about(file: Any) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(file.metadata()["about"])
    return about
