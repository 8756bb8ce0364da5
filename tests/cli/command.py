"""What the tests of the command share: a tokenizer of words, data, and the call of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peft_prefix_plus.cli import main


WORDS = ["<end>", "<start>", "the", "a", "table", "is", "red", "blue", "chair", "green", "big", "cup", "box", "on"]
EXAMPLES = [
    {"prompt": "red table", "completion": "the table is red"},
    {"prompt": "blue chair", "completion": "the chair is blue"},
    {"prompt": "green cup", "completion": "the cup is green"},
    {"prompt": "big box", "completion": "the box is big"},
]


def word_tokenizer(adds_start: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<start>")


def write_lines(path: Path, objects: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in objects), encoding="utf-8")
    return path


def run(*arguments: object) -> None:
    """Run the command, which must succeed."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 0, stop.value.code


def failure(*arguments: object) -> str:
    """Run the command, which must stop with a message, and return it."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("Error: "), stop.value.code
    return stop.value.code


def training(base: Path, data: Path, output: Path, *more: object) -> list[object]:
    options = ["--num-virtual-tokens", 4, "--batch-size", 2, "--no-progress", "--learning-rate", 0.05]
    return ["train", "--model", base, "--data", data, "--output", output, *options, *more]
