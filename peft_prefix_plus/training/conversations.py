"""Conversations for distillation, each with a prompt, an answer and a window of the document, in a JSON-lines file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Conversation:
    """
    A prompt and its answer.

    Attributes:
        prompt (`str`): The prompt.
        answer_ids (`list[int]`): The answer's tokens.
        window (`int`): The index of the document's window in the teacher's context.
        kind (`str`): The kind of template that it was made from, or `"prompt"` or `"given"`.
        answer (`str`): The answer as text, for readers of the file.
    """

    prompt: str
    answer_ids: list[int]
    window: int = 0
    kind: str = "given"
    answer: str = ""


class ConversationFile:
    """
    A JSON-lines file to which conversations are added in batches, each completely or not at all. A batch is one write,
    forced to the disk. When the file is opened again, a partial batch of a killed process is cut off.

    Args:
        path (`Path`): The file, which need not exist.
        batch_size (`int`): The lines of every batch but the last.
    """

    def __init__(self, path: Path, batch_size: int) -> None:
        self.path = path
        self.batch_size = batch_size

    def read(self, expected: int) -> list[Conversation]:
        """
        Return the conversations of all complete batches.

        Args:
            expected (`int`): How many conversations the finished file has.

        Raises:
            ValueError: If a complete line is not a conversation.
        """
        if not self.path.exists():
            return []
        *lines, _ = self.path.read_bytes().split(b"\n")  # after the last line's end: nothing, or an unfinished one
        whole = len(lines) if len(lines) >= expected else len(lines) - len(lines) % self.batch_size
        kept = lines[: min(whole, expected)]
        conversations = [self._parse(number, line) for number, line in enumerate(kept, start=1)]
        size = sum(len(line) + 1 for line in kept)
        if size < self.path.stat().st_size:
            os.truncate(self.path, size)
        return conversations

    def append(self, conversations: Sequence[Conversation]) -> None:
        """Add a batch."""
        lines = "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in conversations)
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, number: int, line: bytes) -> Conversation:
        try:
            return Conversation(**json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.path}, line {number}, is not a conversation of this package ({error}). Delete the file, or use another directory."
            ) from error


def batches(total: int, size: int, done: int = 0) -> Iterator[range]:
    """Yield the indices from `done` to `total` in batches."""
    for start in range(done, total, size):
        yield range(start, min(start + size, total))
