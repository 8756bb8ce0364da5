"""The command `prefix-plus distill`, from a file to an adapter that answers without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_models import DOCUMENT, chat_model, chat_tokenizer
from command import failure, run, write_lines
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    chat_model().save_pretrained(directory)
    chat_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT, encoding="utf-8")
    return path


def distilling(base: Path, document: object, output: Path, *more: object) -> list[object]:
    options = [
        "--num-virtual-tokens",
        4,
        "--conversations",
        6,
        "--max-answer-tokens",
        5,
        "--max-steps",
        2,
        "--no-progress",
    ]
    return ["distill", "--model", base, "--document", document, "--output", output, *options, *more]


def test_a_document_becomes_an_adapter_that_peft_loads_and_a_run_goes_on_where_it_ended(
    base: Path, document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "adapter"
    run(*distilling(base, document, output))
    assert f"The adapter is in {output}." in capsys.readouterr().out
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenizer.json",
        "conversations.jsonl",
    ):
        assert (output / name).is_file()
    config = PeftConfig.from_pretrained(str(output))
    assert (config.num_virtual_tokens, config.position_free, config.decoupled) == (4, False, False)
    assert type(config).__name__ == "PrefixPlusConfig" and config.task_type == "CAUSAL_LM"
    assert len((output / "conversations.jsonl").read_text(encoding="utf-8").splitlines()) == 6

    model = AutoPeftModelForCausalLM.from_pretrained(str(output)).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is red"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, chat_model()(input_ids=ids).logits)

    assert "is not empty. Use --resume" in failure(*distilling(base, document, output))
    weights = load_file(output / "adapter_model.safetensors")
    run(*distilling(base, document, output, "--resume"))
    again = load_file(output / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert "another run's: document differ" in failure(*distilling(base, f"{document},{document}", output, "--resume"))
    assert "num_virtual_tokens is 4 there and 3 here" in failure(
        *distilling(base, document, output, "--resume", "--num-virtual-tokens", 3)
    )
    run(
        *distilling(
            base, document, output, "--overwrite", "--conversations", 2, "--top-k", 0, "--num-virtual-tokens", 3
        )
    )
    assert len((output / "conversations.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_prompts_templates_and_distractors_are_files(base: Path, document: Path, tmp_path: Path) -> None:
    run(*distilling(base, document, tmp_path / "one"))
    rows = [{"prompt": "what is red"}, {"prompt": "where is the box", "completion": "on the table"}]
    data = write_lines(tmp_path / "data.jsonl", rows)
    run(*distilling(base, document, tmp_path / "two", "--data", data, "--distractors", tmp_path / "one"))
    assert not list((tmp_path / "two").glob("distractor*"))
    assert not [name for name in load_file(tmp_path / "two" / "adapter_model.safetensors") if "distractor" in name]

    templates = tmp_path / "templates.jsonl"
    templates.write_text('{"kind": "own", "prompt": "text {start}", "recites": true}\n', encoding="utf-8")
    run(*distilling(base, document, tmp_path / "three", "--templates", templates))
    lines = (tmp_path / "three" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["kind"] for line in lines} == {"own"}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_bad_input_is_refused_before_anything_is_written(base: Path, document: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    empty = write(tmp_path / "empty.txt", " \n")
    broken = write(tmp_path / "broken.jsonl", '{"prompt": "what"}\n{"prompt": ')
    lacking = write(tmp_path / "lacking.jsonl", '{"prompt": "what"}\n{"text": "a"}\n')
    blank = write(tmp_path / "blank.jsonl", '{"prompt": "what", "completion": ""}\n')
    template = write(tmp_path / "template.jsonl", '{"kind": "a", "prompt": "nothing"}\n')
    no_chat = tmp_path / "no_chat"
    chat_model().save_pretrained(no_chat)
    chat_tokenizer(None).save_pretrained(no_chat)
    for arguments, message in (
        (distilling(base, empty, output), f"{empty} is empty"),
        (distilling(base, tmp_path / "absent.txt", output), "Cannot read"),
        (distilling(base, document, output, "--data", broken), f"{broken}, line 2: expected one JSON object"),
        (distilling(base, document, output, "--data", lacking), f"{lacking}, line 2: expected the key 'prompt'"),
        (distilling(base, document, output, "--data", blank), f"{blank}, line 1: the completion is empty"),
        (distilling(base, document, output, "--templates", template), f"{template}, line 1: `prompt` of a template"),
        (distilling(no_chat, document, output), "has no chat template"),
        (distilling(base, document, output, "--window-tokens", 100_000), "room for conversations"),
        (distilling(base, document, output, "--num-virtual-tokens", 100), "num_virtual_tokens=100"),
        (distilling(base, document, output, "--temperature", -1), "`temperature` must be at least 0"),
        (
            distilling(base, document, output, "--start", "middle"),
            "`start` must be one of attention, first, config, got 'middle'",
        ),
        (distilling(base, document, output, "--distractors", tmp_path / "absent"), "Cannot load the adapter"),
    ):
        assert message in failure(*arguments)
        assert not output.exists()
