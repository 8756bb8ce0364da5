"""Records of training and evaluation data: from rows of a file to token ids and batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..config import shortened
from ..training.padding import IGNORED_LABEL, padded, padding_id
from ..training.self_study import Template
from .errors import CommandError, shown_as_command_error
from .rows import Row, read_rows


@dataclass(frozen=True)
class Record:
    """
    A prompt and its completion, or a text. The loss is on the completion.

    Attributes:
        prompt (`str`): The prompt; empty if the record is a text.
        completion (`str`): The completion to learn, or the text.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """
    A conversation. The loss is on the assistant's messages.

    Attributes:
        messages (`list[dict]`): The messages, each with a "role" and further keys for the chat template.
        tools (`list[dict]`, *optional*): The tools, for the chat template.
        place (`str`): Where the conversation is, for errors.
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
"""The keys that a row must have, by task."""


def read_records(
    source: str | Path, task_type: str = "CAUSAL_LM", split: str = "train", name: str | None = None
) -> list[Any]:
    """
    Read the records in a file, a folder or a data set on the Hub.

    Args:
        source (`str` or `Path`): A source of [`read_rows`].
        task_type (`str`, defaults to `"CAUSAL_LM"`): The task, a key of `FORMS`, which determines the keys of a row.
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

    Returns:
        `list[str]`: The prompts.

    Raises:
        CommandError: If the file cannot be read, is empty, or has a row of another form.
    """
    return [_string(row, "prompt") for row in read_rows(path)]


def read_conversations(path: Path) -> list[str | tuple[str, str]]:
    """
    Read the string "prompt" of every row of a file, and the string "completion" if the row has one.

    Args:
        path (`Path`): The file.

    Returns:
        `list[str | tuple[str, str]]`: Prompts, and pairs of prompt and completion.

    Raises:
        CommandError: If the file cannot be read, is empty, or has a row of another form.
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
    Read templates of self-study from a file. A row has the strings "kind" and "prompt", and optionally the booleans "asks" and "recites".

    Args:
        path (`Path`): The file.

    Returns:
        `list[Template]`: The templates.

    Raises:
        CommandError: If the file cannot be read, is empty, or has a row of another form.
    """
    templates = []
    for row in read_rows(path):
        with shown_as_command_error(ValueError, TypeError, while_doing=row.place):
            templates.append(Template(**row.fields))
    return templates


def as_record(row: Row, task_type: str = "CAUSAL_LM") -> Record | Chat | LabelledText:
    """
    Turn a row into a record of a task.

    Args:
        row (`Row`): The row.
        task_type (`str`, defaults to `"CAUSAL_LM"`): The task, a key of `FORMS`.

    Returns:
        `Record`, `Chat` or `LabelledText`: The record.

    Raises:
        CommandError: If the row does not have the keys that the task needs, or a value is wrong.
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
        raise CommandError(
            f"{row.place}: {key!r} is empty, so there is nothing to learn. Fill it in, or remove the row."
        )
    return text


def _label(row: Row) -> str:
    label = row.fields["label"]
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise CommandError(
            f"{row.place}: 'label' must be the name or the number of a class, found {shortened(repr(label))}."
        )
    return str(label)


def _chat(row: Row) -> Chat:
    messages, tools = row.fields["messages"], row.fields.get("tools")
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise CommandError(
            f"{row.place}: 'messages' must be a list of objects with a 'role', found {shortened(repr(messages))}."
        )
    # a table gives all messages the same keys, and fills in None
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in messages:
        if isinstance(message.get("content"), str):
            check_text(f"{row.place}: 'content'", message["content"])
        elif message["role"] != "assistant" and "content" not in message:
            raise CommandError(f"{row.place}: a message with the role {message['role']!r} has no 'content'. Add it.")
    if not any(message["role"] == "assistant" for message in messages):
        raise CommandError(
            f"{row.place}: no message has the role 'assistant', so there is nothing to learn. Add one, or remove the row."
        )
    return Chat(messages, tools or None, row.place)


def _string(row: Row, key: str) -> str:
    if key not in row.fields:
        raise CommandError(
            f"{row.place}: expected the key {key!r}; found {', '.join(map(repr, row.fields)) or 'none'}."
        )
    value = row.fields[key]
    if not isinstance(value, str):
        raise CommandError(
            f"{row.place}: {key!r} must be a string, found {shortened(json.dumps(value, default=str))}."
        )
    return check_text(f"{row.place}: {key!r}", value)


def check_text(name: str, text: str) -> str:
    """
    Return a text unchanged if a tokenizer can read it.

    Args:
        name (`str`): Its name in an error.
        text (`str`): The text.

    Raises:
        CommandError: If it has half of a surrogate pair, which is not a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CommandError(
            f"{name} has a lone surrogate, {text[error.start]!a} at character {error.start}, which is not a character. "
            "Write the text in UTF-8, or write both halves of the pair."
        ) from error
    return text


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[Sequence[int]]) -> None:
    """
    Raise unless all tokens of some texts are in a model's vocabulary.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        token_ids (`Sequence[Sequence[int]]`): The tokens of each text.

    Raises:
        CommandError: If one is not.
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
    A record as token ids.

    Attributes:
        token_ids (`list[int]`): The model's input.
        labels (`list[int]`):
            For a causal language model, the same tokens, with `IGNORED_LABEL` where there is no loss. For an encoder-decoder, the tokens
            that the decoder learns. For a classifier, the number of the class.
    """

    token_ids: list[int]
    labels: list[int]

    @classmethod
    def after_prompt(cls, prompt: list[int], completion: list[int]) -> EncodedRecord:
        """Return a record for a causal language model with the loss on the completion."""
        return cls(prompt + completion, [IGNORED_LABEL] * len(prompt) + completion)

    @property
    def num_prompt_tokens(self) -> int:
        """The number of tokens before the first one with a loss."""
        has_loss = (index for index, label in enumerate(self.labels) if label != IGNORED_LABEL)
        return next(has_loss, len(self.labels))


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> EncodedRecord:
    """
    Turn a record into token ids: the prompt exactly as in generation, the completion, and the end-of-text token.

    Args:
        record (`Record`): The record.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        max_length (`int`, *optional*): The most tokens. A longer prompt loses its start, a longer completion its end.

    Returns:
        `EncodedRecord`: The token ids.
    """
    prompt = prompt_ids(record.prompt, tokenizer)
    together = list(tokenizer(record.prompt + record.completion)["input_ids"])
    end = tokenizer.eos_token_id
    if together[-1:] == [end]:
        together.pop()
    # If a token spans the border, the prompt keeps the tokens that it has in generation.
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
    Turn a record into the encoder's input and the decoder's labels, each with the tokenizer's special tokens.

    Args:
        record (`Record`): The record.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        max_length (`int`, *optional*): The most tokens of each. Longer ones lose their end, but keep the end-of-text token.

    Returns:
        `EncodedRecord`: The token ids.
    """
    options = {} if max_length is None else {"truncation": True, "max_length": max_length}
    labels = list(tokenizer(text_target=record.completion, **options)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and labels[-1:] != [end]:
        labels = [*labels[: None if max_length is None else max_length - 1], end]
    return EncodedRecord(list(tokenizer(record.prompt, **options)["input_ids"]), labels)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a prompt's token ids, without the end-of-text token that some tokenizers add."""
    token_ids = list(tokenizer(prompt)["input_ids"])
    is_start = len(token_ids) == 1 and tokenizer.bos_token_id == tokenizer.eos_token_id
    return token_ids[:-1] if token_ids[-1:] == [tokenizer.eos_token_id] and not is_start else token_ids


@dataclass(frozen=True)
class Collator:
    """
    Makes a batch of encoded records, padded on the right.

    Args:
        padding (`int`): The token to pad with.
    """

    padding: int

    def __call__(self, records: Sequence[EncodedRecord]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` of shape (batch, tokens), and `labels` of shape (batch, labels)."""
        tokens = [record.token_ids for record in records]
        return {
            "input_ids": padded(tokens, self.padding),
            "attention_mask": padded([[1] * len(row) for row in tokens], 0),
            "labels": padded([record.labels for record in records], IGNORED_LABEL),
        }
