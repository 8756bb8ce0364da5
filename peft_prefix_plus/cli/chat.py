"""Turning conversations into tokens with the tokenizer's chat template, with the loss on the assistant's messages."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..training.padding import IGNORED_LABEL
from .errors import CommandError, shown_as_command_error
from .records import Chat, EncodedRecord


MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")
"""Matches a template that marks the assistant's messages itself."""


def encode_chat(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, assistant_only_loss: bool = True
) -> EncodedRecord:
    """
    Turn a conversation into token ids.

    Args:
        chat (`Chat`): The conversation.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, with a chat template.
        max_length (`int`, *optional*):
            The most tokens. A longer conversation loses its end; if no answer would be left, its start.
        assistant_only_loss (`bool`, defaults to `True`): Whether the loss is on the assistant's messages only. `False`: on all tokens.

    Returns:
        `EncodedRecord`: The tokens and labels.

    Raises:
        CommandError: If there is no chat template, it refuses the conversation, or the assistant's messages cannot be found.
    """
    if tokenizer.chat_template is None:
        raise CommandError(
            f"{chat.place} is a conversation, but the tokenizer has no chat template. Use the model's instruction-tuned "
            "version, or give a template with --chat-template-path."
        )
    with shown_as_command_error(Exception, while_doing=f"{chat.place}: the chat template does not take it"):
        if assistant_only_loss:
            token_ids, has_loss = _encode(chat, tokenizer)
        else:
            token_ids = _token_ids(_text(chat, tokenizer, chat.messages), tokenizer)
            has_loss = [True] * len(token_ids)
    if not any(has_loss):
        raise CommandError(
            f"{chat.place}: the chat template leaves out the assistant's messages. Give another with --chat-template-path."
        )
    labels = [token if counts else IGNORED_LABEL for token, counts in zip(token_ids, has_loss, strict=True)]
    if max_length is not None and len(token_ids) > max_length:
        end = max_length if any(has_loss[:max_length]) else min(len(token_ids), has_loss.index(True) + max_length // 2)
        start = max(0, end - max_length)
        token_ids, labels = token_ids[start:end], labels[start:end]
    return EncodedRecord(token_ids, labels)


def _encode(chat: Chat, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return the tokens, and for each whether it is the assistant's."""
    template = tokenizer.get_chat_template(tools=chat.tools)
    if MARKS_ANSWERS.search(template):
        encoded = tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(counts) for counts in encoded["assistant_masks"]]
    pieces = _pieces(chat, tokenizer)
    whole = _token_ids("".join(text for text, _ in pieces), tokenizer)
    tokens = _cut(whole, [text for text, _ in pieces], tokenizer)
    if tokens is None:  # in generation, too, no token spans the border between a prompt and its answer
        tokens = [_token_ids(text, tokenizer) for text, _ in pieces]
    has_loss = [speaks for (_, speaks), piece in zip(pieces, tokens, strict=True) for _ in piece]
    return list(chain.from_iterable(tokens)), has_loss


def _pieces(chat: Chat, tokenizer: Any) -> list[tuple[str, bool]]:
    """
    Cut the conversation's text at the borders of the assistant's messages. Return each piece, and whether it is the assistant's.

    An answer begins after the generation prompt.
    """
    pieces: list[tuple[str, bool]] = []
    so_far, whole = "", _text(chat, tokenizer, chat.messages)
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = _text(chat, tokenizer, chat.messages[:number], add_generation_prompt=True) if number else ""
        after = _text(chat, tokenizer, chat.messages[: number + 1])
        if not (before.startswith(so_far) and after.startswith(before) and whole.startswith(after)):
            raise CommandError(
                f"{chat.place}: the assistant's messages cannot be found: the chat template writes message {number + 1} differently when "
                "more follows, or does not begin it with its generation prompt. Give a template with {% generation %} marks with "
                "--chat-template-path, or train on all tokens with --no-assistant-only-loss."
            )
        pieces += [(before[len(so_far) :], False), (after[len(before) :], True)]
        so_far = after
    return [*pieces, (whole[len(so_far) :], False)]


def _text(chat: Chat, tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False, **options))


def _token_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text of the template. Its special tokens are in the text already."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _cut(whole: list[int], texts: list[str], tokenizer: Any) -> list[list[int]] | None:
    """Cut the tokens of the whole text at the ends of the pieces. Return `None` if a token spans a border."""
    pieces, text, start = [], "", 0
    for piece in texts[:-1]:
        text += piece
        head = _token_ids(text, tokenizer)
        if whole[: len(head)] != head:
            return None
        pieces.append(whole[start : len(head)])
        start = len(head)
    return [*pieces, whole[start:]]
