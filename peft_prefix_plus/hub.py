"""What goes to disk and to the Hub beside the weights."""

from __future__ import annotations

import os
import tempfile
from typing import Any


def write_atomically(path: str, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as writer:
            writer.write(text)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def update_model_card(save_directory: str, config: dict[str, Any]) -> None:
    pass
