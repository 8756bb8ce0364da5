"""Turning tokens that arrive one by one into text that can be shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


INCOMPLETE = "\ufffd"
"""A tokenizer's output for bytes that are not a whole character yet."""


class TextStream:
    """
    The text of tokens, up to the first stop string.

    A piece of text is released when no later token can change it: its last character is complete, and its end cannot be the
    beginning of a stop string. The pieces joined are the whole text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        stop (`Sequence[str]`): The stop strings. The text ends before the first of them.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        # The text of a token depends on the tokens before it (a space in front of a word). So new tokens are decoded together with
        # some old ones: those from `_context` up to `_decoded`.
        self._context = 0
        self._decoded = 0
        self._held = ""
        self.has_stopped = False

    def add(self, token: int) -> str:
        """Add a token, and return the text that is ready now. After a stop string this is empty."""
        self._tokens.append(token)
        return self._release(self._new_text(is_last=False), is_last=False)

    def end(self) -> str:
        """Return the rest of the text. No token may be added afterwards."""
        return self._release(self._new_text(is_last=True), is_last=True)

    def _new_text(self, is_last: bool) -> str:
        """Return the text of the tokens that are not decoded yet, or "" if it may still change."""
        known = self._decode(self._tokens[self._context : self._decoded])
        text = self._decode(self._tokens[self._context :])
        if text.endswith(INCOMPLETE) and not is_last:
            return ""
        new = text[len(known) :]
        if new:  # tokens without text of their own must stay before the next ones
            self._context, self._decoded = self._decoded, len(self._tokens)
        return new

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, new: str, is_last: bool) -> str:
        """Return the part of the held and the new text that can be shown."""
        if self.has_stopped:
            return ""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.has_stopped = True
            return text[: min(found)]
        num_held = 0 if is_last else self._num_held(text)
        ready = len(text) - num_held
        self._held = text[ready:]
        return text[:ready]

    def _num_held(self, text: str) -> int:
        """Return how many characters at the end may begin a stop string."""
        lengths = [
            length
            for stop in self._stop
            for length in range(1, min(len(stop) - 1, len(text)) + 1)
            if text.endswith(stop[:length])
        ]
        return max(lengths, default=0)
