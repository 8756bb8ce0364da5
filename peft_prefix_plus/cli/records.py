"""Records of training and evaluation data: what a row means, and what becomes of it before the model sees it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..training.self_study import Template
from .errors import CommandError, shown_as_command_error
from .rows import Row, read_rows, shorten


IGNORED_LABEL = -100


@dataclass(frozen=True)
class Record:
    """
    A prompt and its completion, or a text. The loss is on the completion.

    Attributes:
        prompt (`str`): What the model is given; empty for a text record.
        completion (`str`): What it is to write; a text record's text.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """
    A conversation. The loss is on what the assistant says.

    Attributes:
        messages (`list[dict]`): The messages, each with "role" and what else the chat template knows.
        tools (`list[dict]`, *optional*): The tools that the assistant is told of.
        place (`str`): Where it is, for errors.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    place: str = field(default="The conversation", compare=False)


@dataclass(frozen=True)
class LabelledText:
    """A text and the name of its class."""

    text: str
    label: str


FORMS = {
    "CAUSAL_LM": "the keys 'prompt' and 'completion', or the key 'text', or the key 'messages'",
    "SEQ_2_SEQ_LM": "the keys 'prompt' and 'completion'",
    "SEQ_CLS": "the keys 'text' and 'label'",
}
"""What a row must have, by the task."""


def read_records(
    source: str | Path, task_type: str = "CAUSAL_LM", split: str = "train", name: str | None = None
) -> list[Any]:
    """
    Read the records in a file, a folder or a data set on the Hub.

    Args:
        source (`str` or `Path`): What [`read_rows`] takes.
        task_type (`str`, defaults to `"CAUSAL_LM"`): The task, one of `FORMS`, which says what a row must have.
        split (`str`, defaults to `"train"`): The split, if the source has several.
        name (`str`, *optional*): The configuration of a data set that has several.

    Returns:
        `list`: A [`Record`], [`Chat`] or [`LabelledText`] for each row.

    Raises:
        CommandError: If the source cannot be read, is empty, or has a row of another form.
    """
    return [as_record(row, task_type) for row in read_rows(source, split, name)]


def read_prompts(path: Path) -> list[str]:
    """
    Read the string "prompt" of every row of a file.

    Args:
        path (`Path`): The file.

    Raises:
        CommandError: If the file cannot be read, is empty, or has a row of another form.
    """
    return [_string(row, "prompt") for row in read_rows(path)]


def read_conversations(path: Path) -> list[str | tuple[str, str]]:
    """
    Read the string "prompt" of every line of a JSON-lines file, with the string "completion" of those that have one.

    Args:
        path (`Path`): The file.

    Raises:
        CommandError: If the file cannot be read, is empty, or has a line of another form.
    """
    return [_as_conversation(row) for row in read_rows(path)]


def _as_conversation(row: Row) -> str | tuple[str, str]:
    names = ("prompt", "completion") if "completion" in row.fields else ("prompt",)
    texts = [_string(row, name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not text.strip():
            raise CommandError(f"{row.place}: the {name} is empty.")
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def read_templates(path: Path) -> list[Template]:
    """
    Read the templates of self-study from a JSON-lines file: the strings "kind" and "prompt", and true or false as "asks" and "recites".

    Args:
        path (`Path`): The file.

    Raises:
        CommandError: If the file cannot be read, is empty, or has a line of another form.
    """
    templates = []
    for row in read_rows(path):
        with shown_as_command_error(ValueError, TypeError, while_doing=row.place):
            templates.append(Template(**row.fields))
    return templates


def as_record(row: Row, task_type: str = "CAUSAL_LM") -> Record | Chat | LabelledText:
    """
    Return what a row means for a task.

    Raises:
        CommandError: If the row is not of a form that the task takes.
    """
    has_pair = "prompt" in row.fields and "completion" in row.fields
    if task_type == "SEQ_CLS":
        if "text" in row.fields and "label" in row.fields:
            return LabelledText(_filled(row, "text"), _label(row))
    elif task_type == "SEQ_2_SEQ_LM":
        if has_pair:
            return Record(_filled(row, "prompt"), _filled(row, "completion"))
    elif has_pair + ("text" in row.fields) + ("messages" in row.fields) == 1:
        if "messages" in row.fields:
            return _chat(row)
        return (
            Record(_string(row, "prompt"), _filled(row, "completion"))
            if has_pair
            else Record("", _filled(row, "text"))
        )
    found = ", ".join(map(repr, row.fields)) or "none"
    raise CommandError(f"{row.place}: expected {FORMS[task_type]}; found {found}.")


def _filled(row: Row, key: str) -> str:
    text = _string(row, key)
    if not text:
        raise CommandError(f"{row.place}: the {key} is empty, so there is nothing to learn.")
    return text


def _label(row: Row) -> str:
    label = row.fields["label"]
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise CommandError(
            f"{row.place}: 'label' must be the name or the number of a class, found {shorten(repr(label))}."
        )
    return str(label)


def _chat(row: Row) -> Chat:
    messages, tools = row.fields["messages"], row.fields.get("tools")
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise CommandError(
            f"{row.place}: 'messages' must be a list of objects with a 'role', found {shorten(repr(messages))}."
        )
    # a table gives every message all keys that any has
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in messages:
        if isinstance(message.get("content"), str):
            check_text(f"{row.place}: 'content'", message["content"])
        elif message["role"] != "assistant" and "content" not in message:
            raise CommandError(f"{row.place}: a message of the role {message['role']!r} has no 'content'.")
    if not any(message["role"] == "assistant" for message in messages):
        raise CommandError(f"{row.place}: no message is of the role 'assistant', so there is nothing to learn.")
    return Chat(messages, tools or None, row.place)


def _string(row: Row, key: str) -> str:
    if key not in row.fields:
        raise CommandError(
            f"{row.place}: expected the key {key!r}; found {', '.join(map(repr, row.fields)) or 'none'}."
        )
    value = row.fields[key]
    if not isinstance(value, str):
        raise CommandError(f"{row.place}: {key!r} must be a string, found {shorten(json.dumps(value, default=str))}.")
    return check_text(f"{row.place}: {key!r}", value)


def check_text(name: str, text: str) -> str:
    """
    Return a text that a tokenizer can read.

    Args:
        name (`str`): What to call it in an error.
        text (`str`): The text.

    Raises:
        CommandError: If it has half of a surrogate pair, which stands for no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CommandError(
            f"{name} has a lone surrogate, {text[error.start]!a} at character {error.start}, which is no character. "
            "Write the text in UTF-8, or both halves of the pair."
        ) from error
    return text


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[Sequence[int]]) -> None:
    """
    Check that a model has all tokens that a tokenizer gives.

    Args:
        model: The model.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        token_ids (`Sequence[Sequence[int]]`): What it made of the texts.

    Raises:
        CommandError: If the tokenizer is another model's.
    """
    size = model.get_input_embeddings().num_embeddings
    largest = max([padding_id(tokenizer), *(token for tokens in token_ids for token in tokens)])
    if largest >= size:
        raise CommandError(
            f"The tokenizer gives the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model's "
            f"vocabulary has {size} tokens. Use the tokenizer that belongs to the model, or resize the model's embeddings."
        )


# ---------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class EncodedRecord:
    """
    A record as numbers.

    Attributes:
        token_ids (`list[int]`): What the model reads.
        labels (`list[int]`):
            For a causal language model the same tokens, with `IGNORED_LABEL` where there is no loss; for an encoder-decoder what the
            decoder is to write; for a classifier the number of the class.
    """

    token_ids: list[int]
    labels: list[int]

    @classmethod
    def after_prompt(cls, prompt: list[int], completion: list[int]) -> EncodedRecord:
        """Return the record in which a causal language model has the loss on the completion."""
        return cls(prompt + completion, [IGNORED_LABEL] * len(prompt) + completion)

    @property
    def num_prompt_tokens(self) -> int:
        """The number of tokens before the first with a loss."""
        has_loss = (index for index, label in enumerate(self.labels) if label != IGNORED_LABEL)
        return next(has_loss, len(self.labels))


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> EncodedRecord:
    """
    Turn a record into token ids: the prompt exactly as in generation, the completion, and the end-of-text token.

    Args:
        record (`Record`): The record.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        max_length (`int`, *optional*): The most tokens. A longer prompt loses its start, a longer completion its end.
    """
    prompt = prompt_ids(record.prompt, tokenizer)
    together = list(tokenizer(record.prompt + record.completion)["input_ids"])
    end = tokenizer.eos_token_id
    if together[-1:] == [end]:
        together.pop()
    # Where a token spans the border, the prompt alone must stay what it is when there is only the prompt.
    separate = list(tokenizer(record.completion, add_special_tokens=False)["input_ids"])
    completion = together[len(prompt) :] if together[: len(prompt)] == prompt else separate
    completion += [] if end is None else [end]
    if max_length is not None:
        completion = completion[:max_length]
        prompt = prompt[max(0, len(prompt) + len(completion) - max_length) :]
    return EncodedRecord.after_prompt(prompt, completion)


def encode_for_decoder(
    record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> EncodedRecord:
    """
    Turn a record into what an encoder reads and what the decoder is to write, each with the tokenizer's special tokens.

    Args:
        record (`Record`): The record.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        max_length (`int`, *optional*): The most tokens of each. Both lose their end, but for the end-of-text token.
    """
    options = {} if max_length is None else {"truncation": True, "max_length": max_length}
    labels = list(tokenizer(text_target=record.completion, **options)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and labels[-1:] != [end]:
        labels = [*labels[: None if max_length is None else max_length - 1], end]
    return EncodedRecord(list(tokenizer(record.prompt, **options)["input_ids"]), labels)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a prompt's token ids, without an end-of-text token that the tokenizer may add."""
    token_ids = list(tokenizer(prompt)["input_ids"])
    is_start = len(token_ids) == 1 and tokenizer.bos_token_id == tokenizer.eos_token_id
    return token_ids[:-1] if token_ids[-1:] == [tokenizer.eos_token_id] and not is_start else token_ids


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with. What it is does not matter: no real token sees it and it has no loss."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


@dataclass(frozen=True)
class Collator:
    """Makes a batch of encoded records, padded on the right."""

    padding: int

    def __call__(self, records: Sequence[EncodedRecord]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` of shape (batch, tokens), and `labels` of shape (batch, labels)."""
        tokens = [record.token_ids for record in records]
        return {
            "input_ids": _padded(tokens, self.padding),
            "attention_mask": _padded([[1] * len(row) for row in tokens], 0),
            "labels": _padded([record.labels for record in records], IGNORED_LABEL),
        }


def _padded(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows], dtype=torch.long)
