"""The demo: its text is what it says it is, and it goes from end to end."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from peft_prefix_plus.cli import main
from peft_prefix_plus.demo_text import document, examples


def test_the_base_models_text_has_no_sentence_of_the_taught_form() -> None:
    generator = random.Random(0)
    taught = re.compile(r"is a( \w+)? place (for|in|near) ")
    assert all(taught.search(example["completion"]) for example in examples(300, generator))
    assert not any(taught.search(document(generator)) for _ in range(3000))


def test_held_out_tables_have_unseen_values_and_the_text_is_the_same_every_time() -> None:
    drawn = examples(300, random.Random(1))
    assert len({example["completion"] for example in drawn}) == len(drawn)
    assert drawn == examples(300, random.Random(1))


def test_a_short_demo_goes_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"pretraining-steps": 30, "prefix-steps": 10, "training-tables": 32, "held-out-tables": 6}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--output", str(tmp_path), *options])
    assert stop.value.code == 0, stop.value.code
    printed = capsys.readouterr().out
    assert "It writes the same 6 sentences." in printed
    assert all(words in printed for words in ("exact match", "trainable parameters", "adapter's file", "KiB"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    held_out = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text(encoding="utf-8").splitlines()]
    training = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (len(held_out), len(training)) == (6, 32)
    assert not {item["completion"] for item in held_out} & {item["completion"] for item in training}
