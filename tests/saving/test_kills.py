"""A save that is killed, fails or is interrupted loses nothing: the old adapter is there, or the new one, or both can be told apart."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from models import output_of, prefixed, tiny_model, token_ids
from peft import PeftModel

from peft_prefix_plus.saving.together import STALE_SECONDS, saving_together
from peft_prefix_plus.saving.weights import UNFINISHED


OWN_WORDS = "What I found out about this adapter, in my own words."
INPUTS = {"input_ids": token_ids()}


def two_models() -> list[Any]:
    """Two adapters of the same shapes: a pair of one's weights and the other's configuration loads, and is wrong."""
    return [
        prefixed(tiny_model(), task_type="CAUSAL_LM", position_free=position_free).eval()
        for position_free in (True, False)
    ]


def save_with_own_words(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    card = directory / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + f"\n{OWN_WORDS}\n", encoding="utf-8")


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def loaded_output(directory: Path) -> torch.Tensor:
    return output_of(PeftModel.from_pretrained(tiny_model(), directory), **INPUTS)


def save_again_and_again(models: list[Any], directory: Path, started: Any) -> None:
    started.set()
    while True:
        for model in models:
            model.save_pretrained(directory)


def kill_saves(directory: Path, times: int, seed: int = 0) -> None:
    models = two_models()
    expected = [output_of(model, **INPUTS) for model in models]
    save_with_own_words(models[0], directory)
    start = time.perf_counter()
    models[0].save_pretrained(directory)
    duration = time.perf_counter() - start
    processes, numbers = multiprocessing.get_context("fork"), random.Random(seed)
    for _ in range(times):
        started = processes.Event()
        process = processes.Process(target=save_again_and_again, args=(models[::-1], directory, started), daemon=True)
        process.start()
        started.wait()
        time.sleep(numbers.uniform(0.0, 3.0 * duration))
        process.kill()
        process.join()
        try:
            output = loaded_output(directory)
        except ValueError as error:
            rest = re.search(
                r"not saved together: `position_free`.*The configuration of these weights is (.*): move it", str(error)
            )
            assert rest is not None, error
            shutil.move(rest[1], directory / "adapter_config.json")
            output = loaded_output(directory)
        assert any(torch.equal(output, each) for each in expected)
        assert OWN_WORDS in (directory / "README.md").read_text(encoding="utf-8")


def test_killed_saves_leave_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    kill_saves(tmp_path, 5)


@pytest.mark.soak
def test_many_killed_saves_leave_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    kill_saves(tmp_path, 200, seed=1)


class _Killed(BaseException):
    """What ends a save between two files here: nothing of Python can run where a process is killed."""


@pytest.mark.parametrize("name", ["default", "titles"])
def test_a_save_killed_between_weights_and_configuration_is_told_and_can_be_completed(
    name, tmp_path, monkeypatch
) -> None:
    old, new = (prefixed(tiny_model(), position_free=position_free).eval() for position_free in (True, False))
    for model in (old, new):
        if name != "default":
            model.add_adapter(name, model.peft_config["default"])
            model.set_adapter(name)
    old.save_pretrained(tmp_path, selected_adapters=[name])
    directory = tmp_path if name == "default" else tmp_path / name
    replace = os.replace

    def stop_at_configuration(source: Any, target: Any) -> None:
        if UNFINISHED not in str(target) and str(target).endswith("adapter_config.json"):
            raise _Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(os, "replace", stop_at_configuration)
        new.save_pretrained(tmp_path, selected_adapters=[name])
    with pytest.raises(ValueError, match="not saved together") as error:
        loaded_output(directory)
    rest = re.search(r"The configuration of these weights is (.*): move it here", str(error.value))
    assert rest is not None
    shutil.move(rest[1], directory / "adapter_config.json")
    assert torch.equal(loaded_output(directory), output_of(new, **INPUTS))


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("written", ["weights", "configuration", "card"])
def test_a_save_that_fails_leaves_all_files_and_the_model(
    written: str, error: BaseException, tmp_path, monkeypatch
) -> None:
    models = two_models()
    save_with_own_words(models[0], tmp_path)
    before, config = files_of(tmp_path), models[1].peft_config["default"].to_dict()

    def fail(self: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        raise error

    def write_half(self: Any, path: Any) -> None:
        Path(path).write_text(str(self)[: len(str(self)) // 2], encoding="utf-8")
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        if written == "weights":
            patch.setattr("peft.peft_model.safe_save_file", lambda tensors, path, metadata: fail(None, path))
        elif written == "configuration":
            patch.setattr("peft_prefix_plus.config.write_atomically", lambda path, text: fail(None, path))
        else:
            patch.setattr(ModelCard, "save", write_half)
        models[1].save_pretrained(tmp_path)
    assert files_of(tmp_path) == before
    assert models[1].peft_config["default"].to_dict() == config
    assert torch.equal(loaded_output(tmp_path), output_of(models[0], **INPUTS))


def test_a_card_that_cannot_be_written_is_kept(tmp_path, monkeypatch) -> None:
    model = two_models()[0]
    save_with_own_words(model, tmp_path)
    before = (tmp_path / "README.md").read_bytes()

    def write_half(self: Any, path: Any) -> None:
        Path(path).write_text(str(self)[:10], encoding="utf-8")
        raise OSError("No space left on device")

    monkeypatch.setattr(ModelCard, "save", write_half)
    with pytest.raises(OSError, match="No space"):
        model.create_or_update_model_card(str(tmp_path))
    assert (tmp_path / "README.md").read_bytes() == before


def test_an_interrupt_while_files_are_put_in_place_comes_when_all_are(tmp_path, monkeypatch) -> None:
    models = two_models()
    models[0].save_pretrained(tmp_path)
    replace, calls = os.replace, []

    def interrupt_once(source: Any, target: Any) -> None:
        replace(source, target)
        if UNFINISHED not in str(target) and not calls:
            calls.append(target)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupt_once)
        models[1].save_pretrained(tmp_path)
    assert torch.equal(loaded_output(tmp_path), output_of(models[1], **INPUTS))


def test_what_a_killed_save_left_is_removed_by_a_later_one(tmp_path) -> None:
    (tmp_path / f"{UNFINISHED}old").mkdir(parents=True)
    (tmp_path / f"{UNFINISHED}new").mkdir()
    os.utime(tmp_path / f"{UNFINISHED}old", (time.time() - 2 * STALE_SECONDS,) * 2)
    with saving_together(tmp_path) as folder:
        (Path(folder) / "file").write_text("text", encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{UNFINISHED}new", "file"]


def test_saved_files_can_be_read_by_whom_the_umask_says(tmp_path) -> None:
    two_models()[0].save_pretrained(tmp_path / "adapter")
    plain = tmp_path / "plain"
    plain.write_text("text", encoding="utf-8")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "adapter" / name).stat().st_mode == plain.stat().st_mode
