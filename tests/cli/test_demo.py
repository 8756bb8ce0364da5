"""The demo: its text is what it says it is, and it goes from end to end."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from peft_prefix_plus.cli import demo, main
from peft_prefix_plus.cli.demo_base import make_base_model
from peft_prefix_plus.cli.demo_text import document, examples, in_ordinary_text


SIZES = ("--prefix-steps", "10", "--training-tables", "32", "--held-out-tables", "6")


def test_the_base_models_text_has_no_sentence_of_the_taught_form() -> None:
    generator = random.Random(0)
    taught = re.compile(r"is a( \w+)? place (for|in|near) ")
    assert all(taught.search(example["completion"]) for example in examples(300, generator))
    assert not any(taught.search(document(generator)) for _ in range(3000))


def test_held_out_tables_have_unseen_values_and_the_text_is_the_same_every_time() -> None:
    drawn = examples(300, random.Random(1))
    assert len({example["completion"] for example in drawn}) == len(drawn)
    assert drawn == examples(300, random.Random(1))


def test_examples_for_a_pretrained_model_are_punctuated_as_text_is() -> None:
    example = {"prompt": "name : Blue Spice | food : Thai =>", "completion": " Blue Spice is a place for Thai food ."}
    assert in_ordinary_text(example) == {
        "prompt": "name: Blue Spice, food: Thai =>",
        "completion": " Blue Spice is a place for Thai food.",
    }
    drawn = [in_ordinary_text(example) for example in examples(300, random.Random(2))]
    assert not any(re.search(r" [.,:|]", text) for example in drawn for text in example.values())


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 0, stop.value.code


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SHOWN = (
    "base model",
    "untrained prefix",
    "trained prefix",
    "exact match",
    "trainable parameters",
    "adapter's file",
    "KiB",
)


def test_a_short_demo_goes_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--output", str(tmp_path), "--pretraining-steps", "30", *SIZES)
    printed = capsys.readouterr().out
    assert "It writes the same 6 sentences." in printed
    assert all(words in printed for words in SHOWN)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    held_out, training = records(tmp_path / "held-out.jsonl"), records(tmp_path / "training.jsonl")
    assert (len(held_out), len(training)) == (6, 32)
    assert not {item["completion"] for item in held_out} & {item["completion"] for item in training}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved model, in place of a pretrained one."""
    directory = tmp_path / "some model"
    make_base_model(directory, 3, random.Random(0), seed=0, console=Console(quiet=True))
    return directory


def test_a_short_demo_on_a_given_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_file(model / "model.safetensors")
    output = tmp_path / "output"
    run("--model", str(model), "--output", str(output), *SIZES)
    printed = capsys.readouterr().out
    assert "It writes the same 6 sentences." in printed
    assert all(words in printed for words in (*SHOWN, str(model), demo.fast_dtype()))
    assert all(" :" not in item["prompt"] for item in records(output / "held-out.jsonl"))
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        model
    )
    after = load_file(model / "model.safetensors")
    assert not (output / "base").exists() and all(before[name].equal(after[name]) for name in before)


def test_the_loss_before_the_first_step_is_that_of_the_training(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PLAN_OF_REAL_MODEL", demo.PLAN_OF_REAL_MODEL._replace(learning_rate=1e-12))
    sizes = {"held_out_tables": 6, "training_tables": 8, "prefix_steps": 1}
    outcome = demo.run_demo(demo.DemoSettings(model=str(model), output=tmp_path / "output", **sizes))
    assert outcome.untrained_loss == pytest.approx(outcome.after.loss, abs=1e-6)
    assert outcome.untrained_loss == pytest.approx(outcome.before.loss, rel=0.02)  # the quiet start


def test_a_given_model_is_not_pretrained() -> None:
    with pytest.raises(ValueError, match=r"`pretraining_steps` is 5, but `model` is 'mine'"):
        demo.DemoSettings(model="mine", pretraining_steps=5)


def test_a_model_that_cannot_be_loaded_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--model", str(tmp_path / "none"), "--output", str(tmp_path / "output")])
    assert "Error: Cannot load" in str(stop.value.code) and str(tmp_path / "none") in str(stop.value.code)
    assert not (tmp_path / "output").exists()


def test_make_hands_the_model_on() -> None:
    root = Path(__file__).parents[2]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MODEL", "MAKEFLAGS", "MAKELEVEL")
    }
    for arguments, expected in (([], "prefix-plus demo"), (["MODEL=my model"], 'prefix-plus demo --model "my model"')):
        command = ["make", "--dry-run", "demo", *arguments]
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1].strip().endswith(expected)
