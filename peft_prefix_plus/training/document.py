"""A document as the teacher reads it: its windows, and the token ids of conversations with and without it in the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase


Message = dict[str, str]

OVERLAP = 8
"""Neighbouring windows share one part in this many of their tokens."""

MERGING = 8
"""How many plain tokens before a prompt can change with the prompt's first tokens. A special token never changes."""


@dataclass(frozen=True)
class Window:
    """
    A part of a document that fits into the model's context: the whole document if that fits.

    Attributes:
        messages (`tuple[Message, ...]`): The messages before a conversation.
        in_prompt (`str`): The text before the first prompt, if the chat template has no system message.
        text (`str`): The text from which self-study takes pieces.
        token_ids (`tuple[int, ...]`): The tokens with which every conversation about it begins.
    """

    messages: tuple[Message, ...]
    in_prompt: str
    text: str
    token_ids: tuple[int, ...]


class Chat:
    """
    The token ids of conversations of one prompt and one answer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with a chat template.

    Raises:
        ValueError: If it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer ({type(tokenizer).__name__} of {tokenizer.name_or_path!r}) has no chat template, which tells where "
                "the document, a prompt and an answer stand. Use a chat model's tokenizer, or set `tokenizer.chat_template`."
            )
        self.tokenizer = tokenizer

    def prompt(self, prompt: str, window: Window | None = None) -> list[int]:
        """Return the tokens up to where the answer begins, with a window in the context or, with `None`, without."""
        return self.plain(self._render(self._messages(prompt, window), True))

    def answer(self, answer: str) -> list[int]:
        """Return an answer's tokens, with the one that ends it."""
        return [*self.plain(answer), *self.end_ids()]

    def plain(self, text: str) -> list[int]:
        """Return a text's tokens, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def end_ids(self) -> list[int]:
        """Return the token that ends an answer in the chat template, in a list that is empty if there is none."""
        question, mark = {"role": "user", "content": "?"}, "answer"
        rendered = self._render([question, {"role": "assistant", "content": mark}], False)
        after = self.plain(rendered.rpartition(mark)[2])
        end = self.tokenizer.eos_token_id
        return after[:1] or ([] if end is None else [end])

    def window(self, messages: Sequence[Message], in_prompt: str, text: str) -> Window:
        """Return a window of these messages, with the tokens with which all of its conversations begin."""
        window = Window(tuple(messages), in_prompt, text, ())
        before = self.before_prompt(window)
        rendered = self._render(self._messages("a", window), True)
        encoded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        inside = [end <= len(before) for _, end in encoded["offset_mapping"]]
        token_ids = encoded["input_ids"][: sum(inside)]
        special = set(self.tokenizer.all_special_ids)
        after_special = max((i + 1 for i, token in enumerate(token_ids) if token in special), default=0)
        return Window(
            window.messages, in_prompt, text, tuple(token_ids[: max(after_special, len(token_ids) - MERGING)])
        )

    def before_prompt(self, window: Window) -> str:
        """Return the text before every prompt with this window in the context."""
        one, another = (self._render(self._messages(probe, window), True) for probe in ("a", "1"))
        return one[: next((i for i, pair in enumerate(zip(one, another, strict=False)) if len(set(pair)) > 1), None)]

    def first_tokens(self, text: str, count: int) -> str:
        """
        Return the first tokens of a text, or the whole text if those tokens alone would be tokenized differently.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]]
        cut = text[: ends[count - 1]] if count < len(ends) else text
        return cut if self.plain(cut) == encoded["input_ids"][:count] else text

    def of_text(self, text: str) -> Window:
        """Return the window of a text: in a system message or, where the chat template has none, before the prompt."""
        system = ({"role": "system", "content": text},)
        try:
            takes_system = text.strip() in self._render([*system, {"role": "user", "content": "?"}], True)
        except TemplateError:  # a template that knows no system message may say so
            takes_system = False
        return self.window(system, "", text) if takes_system else self.window((), f"{text}\n\n", text)

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _messages(self, prompt: str, window: Window | None) -> list[Message]:
        before, in_prompt = ((), "") if window is None else (window.messages, window.in_prompt)
        return [*before, {"role": "user", "content": in_prompt + prompt}]

    def _render(self, messages: list[Message], is_prompt: bool) -> str:
        rendered: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
        return str(rendered)


def read_text(chat: Chat, text: str, window_tokens: int) -> list[Window]:
    """
    Split a text into overlapping windows.

    Args:
        chat (`Chat`): The tokenizer's chat.
        text (`str`): The text.
        window_tokens (`int`): The most tokens of a window, the chat template's included.

    Raises:
        ValueError: If the text is empty, or no text fits.
    """
    if not text.strip():
        raise ValueError("The text is empty: there is nothing to learn from it.")
    whole = chat.of_text(text)
    if len(whole.token_ids) <= window_tokens:
        return [whole]
    encoded = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    size = window_tokens - (len(whole.token_ids) - len(offsets))
    if size < OVERLAP:
        raise ValueError(
            f"A window of {window_tokens} tokens leaves {max(0, size)} for the text beside the chat template. Give more."
        )
    windows = []
    step = size - size // OVERLAP
    for start in range(0, max(1, len(offsets) - size // OVERLAP), step):
        part = offsets[start : start + size]
        windows.append(chat.of_text(text[part[0][0] : part[-1][1]]))
    return windows


def read_messages(chat: Chat, messages: Sequence[Message], window_tokens: int) -> list[Window]:
    """
    Return messages as one window.

    Args:
        chat (`Chat`): The tokenizer's chat.
        messages (`Sequence[Message]`): The messages, each with `"role"` and `"content"`.
        window_tokens (`int`): The most tokens.

    Raises:
        ValueError: If there are none, they are no messages, or they are too many tokens.
    """
    is_chat = all(
        isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("role", "content"))
        for each in messages
    )
    if not messages or not is_chat or not any(each["content"].strip() for each in messages):
        raise ValueError(
            f"`messages` must be dicts with the strings 'role' and 'content', one of them not empty; got {messages!r}."
        )
    window = chat.window(messages, "", "\n\n".join(each["content"] for each in messages))
    if len(window.token_ids) > window_tokens:
        raise ValueError(
            f"The messages have {len(window.token_ids)} tokens, and a context holds {window_tokens}. A text is taken in windows; "
            "messages are not: give fewer, or the long one as `text`."
        )
    return [window]
