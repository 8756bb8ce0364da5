"""Training and evaluation data: JSON-lines files, and what becomes of a record before the model sees it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..training.self_study import Template
from .errors import CommandError, shown_as_command_error


IGNORED_LABEL = -100


@dataclass(frozen=True)
class Record:
    """
    One line of a data file. The loss is on the completion.

    Attributes:
        prompt (`str`): What the model is given; empty for a text record.
        completion (`str`): What it is to write; a text record's text.
    """

    prompt: str
    completion: str


def read_records(path: Path) -> list[Record]:
    """
    Read a JSON-lines file whose lines have the strings "prompt" and "completion", or the string "text".

    Args:
        path (`Path`): The file.

    Raises:
        CommandError: If the file cannot be read, is empty, or has a line of another form.
    """
    return [_as_record(place, fields) for place, fields in _read_lines(path)]


def read_prompts(path: Path) -> list[str]:
    """
    Read the string "prompt" of every line of a JSON-lines file.

    Args:
        path (`Path`): The file.

    Raises:
        CommandError: If the file cannot be read, is empty, or has a line of another form.
    """
    return [_string(place, fields, "prompt") for place, fields in _read_lines(path)]


def read_conversations(path: Path) -> list[str | tuple[str, str]]:
    """
    Read the string "prompt" of every line of a JSON-lines file, with the string "completion" of those that have one.

    Args:
        path (`Path`): The file.

    Raises:
        CommandError: If the file cannot be read, is empty, or has a line of another form.
    """
    return [_as_conversation(place, fields) for place, fields in _read_lines(path)]


def _as_conversation(place: str, fields: dict[str, Any]) -> str | tuple[str, str]:
    names = ("prompt", "completion") if "completion" in fields else ("prompt",)
    texts = [_string(place, fields, name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not text.strip():
            raise CommandError(f"{place}: the {name} is empty.")
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
    for place, fields in _read_lines(path):
        with shown_as_command_error(ValueError, TypeError, while_doing=place):
            templates.append(Template(**fields))
    return templates


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects in a JSON-lines file, each with the words that say where it is."""
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
                f"{place}: expected one JSON object per line, found {_shorten(line)} ({error.msg}, column {error.colno})."
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deep, or numbers of thousands of digits
            raise CommandError(f"{place}: cannot read {_shorten(line)}: {error}.") from error
        if not isinstance(fields, dict):
            raise CommandError(f"{place}: expected a JSON object, found {_shorten(line)}.")
        found.append((place, fields))
    if not found:
        raise CommandError(f"{path} is empty: expected one JSON object per line.")
    return found


def _as_record(place: str, fields: dict[str, Any]) -> Record:
    has_pair = "prompt" in fields and "completion" in fields
    if has_pair == ("text" in fields):
        found = ", ".join(map(repr, fields)) or "none"
        raise CommandError(f"{place}: expected the keys 'prompt' and 'completion', or the key 'text'; found {found}.")
    record = (
        Record(_string(place, fields, "prompt"), _string(place, fields, "completion"))
        if has_pair
        else Record("", _string(place, fields, "text"))
    )
    if not record.completion:
        raise CommandError(
            f"{place}: the {'completion' if has_pair else 'text'} is empty, so there is nothing to learn."
        )
    return record


def _string(place: str, fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        raise CommandError(f"{place}: expected the key {key!r}; found {', '.join(map(repr, fields)) or 'none'}.")
    if not isinstance(fields[key], str):
        raise CommandError(f"{place}: {key!r} must be a string, found {_shorten(json.dumps(fields[key]))}.")
    return check_text(f"{place}: {key!r}", fields[key])


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


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


@dataclass(frozen=True)
class EncodedRecord:
    """A record as token ids; the first `num_prompt_tokens` of them carry no loss."""

    token_ids: list[int]
    num_prompt_tokens: int


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
    return EncodedRecord(prompt + completion, len(prompt))


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
        """Return `input_ids`, `attention_mask` and `labels`, each of shape (batch, tokens)."""
        shape = len(records), max(len(record.token_ids) for record in records)
        input_ids = torch.full(shape, self.padding)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED_LABEL)
        for row, record in enumerate(records):
            end = len(record.token_ids)
            input_ids[row, :end] = torch.tensor(record.token_ids)
            attention_mask[row, :end] = 1
            labels[row, record.num_prompt_tokens : end] = input_ids[row, record.num_prompt_tokens : end]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
