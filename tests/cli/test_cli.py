"""The command `prefix-plus`: its options, what it refuses, training, going on, generating, looking and counting."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command import EXAMPLES, WORDS, failure, run, training, word_tokenizer, write_lines
from models import SCALING_SIZE, joint_config
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
)

from peft_prefix_plus import PrefixPlusConfig, prefix_contribution, prefix_key_values, to_key_values
from peft_prefix_plus.cli import main
from peft_prefix_plus.cli.options import value_parser
from peft_prefix_plus.cli.records import Collator, Record, encode
from peft_prefix_plus.training.checkpoints import checkpoints


ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------- train, generate


def test_training_leaves_an_adapter_that_peft_loads_and_generate_uses(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "adapter"
    run(*training(base, data, output, "--max-steps", 3, "--reparameterization", "mlp", "--layers-to-transform", "-1"))
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"):
        assert (output / name).is_file()
    assert not list(output.glob(".*"))
    config = PeftConfig.from_pretrained(str(output))
    assert (config.reparameterization, config.layers_to_transform, config.num_virtual_tokens) == ("mlp", -1, 4)
    assert config.task_type == "CAUSAL_LM"
    assert f'"{output.name}"' in (output / "README.md").read_text(encoding="utf-8")

    model = AutoPeftModelForCausalLM.from_pretrained(str(output)).eval()
    tokenizer = word_tokenizer()
    prompts = [example["prompt"] for example in EXAMPLES]
    expected = []
    for prompt in prompts:
        inputs = torch.tensor([tokenizer(prompt)["input_ids"]])
        tokens = model.generate(input_ids=inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(tokens[0, inputs.shape[1] :], skip_special_tokens=True))
    capsys.readouterr()
    run("generate", "--adapter", output, "--data", data, "--max-new-tokens", 5, "--json-lines", "--batch-size", 3)
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert written == [{"prompt": p, "completion": c} for p, c in zip(prompts, expected, strict=True)]
    run("generate", "--adapter", output, "--model", base, "--prompt", prompts[0], "--max-new-tokens", 5)
    assert capsys.readouterr().out == expected[0] + "\n"


def test_generate_reads_standard_input_and_samples_the_same_with_the_same_seed(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "adapter"
    run(*training(base, data, output, "--max-steps", 1))
    capsys.readouterr()
    texts = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("red table\n"))
        run("generate", "--adapter", output, "--sample", "--temperature", 2.0, "--seed", seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "no prompt" in failure("generate", "--adapter", output)


def test_resumed_training_ends_where_uninterrupted_training_does(base: Path, data: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    constant = ("--schedule", "constant", "--save-steps", 2)
    run(*training(base, data, whole, *constant, "--max-steps", 6, "--resume"))  # nothing there yet: from the start
    run(*training(base, data, resumed, *constant, "--max-steps", 2))
    (resumed / "checkpoint-3").mkdir()  # what a crash leaves while the Trainer writes a checkpoint
    (resumed / "checkpoint-3" / "adapter_config.json").write_text("{}", encoding="utf-8")
    run(*training(base, data, resumed, *constant, "--max-steps", 6, "--resume"))
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (whole, resumed))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_text_records_and_gradient_checkpointing_and_evaluation(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "texts.jsonl", [{"text": "the big red table is on the box"}, {"text": "a cup"}])
    output = tmp_path / "adapter"
    options = (
        "--epochs",
        1,
        "--gradient-checkpointing",
        "--eval-data",
        data,
        "--dtype",
        "bfloat16",
        "--max-length",
        5,
    )
    run(*training(base, data, output, *options, "--save-steps", 1))
    printed = capsys.readouterr()
    assert "eval_loss" in printed.out
    assert "1 of 2 records have more than 5 tokens" in printed.err
    assert checkpoints(output) == [output / "checkpoint-1"]


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2: expected one JSON object per line, found {"),
        ('\n["a"]\n', 'line 2: expected a JSON object, found ["a"]'),
        (
            '{"instruction": "a", "output": "b"}',
            "expected the keys 'prompt' and 'completion', or the key 'text', or the key 'messages'; found",
        ),
        ('{"text": "a", "prompt": "b", "completion": "c"}', "line 1: expected the keys"),
        ('{"prompt": "a", "completion": 3}', "line 1: 'completion' must be a string, found 3"),
        ('{"prompt": "a", "completion": ""}', "line 1: 'completion' is empty"),
        ("\n\n", "is empty: expected one JSON object per line"),
        (None, "Cannot read"),
    ],
)
def test_bad_data_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    data = tmp_path / "bad.jsonl"
    if content is not None:
        data.write_text(content, encoding="utf-8")
    found = failure(*training(base, data, tmp_path / "adapter"))
    assert message in found and str(data) in found
    assert not (tmp_path / "adapter").exists()


def test_a_used_output_directory_needs_a_word(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    output.mkdir()
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    assert "not empty" in failure(*training(base, data, output))
    assert "no complete checkpoint" in failure(*training(base, data, output, "--resume"))
    assert "contradict" in failure(*training(base, data, output, "--resume", "--overwrite"))
    assert "is a file" in failure(*training(base, data, output / "notes.txt"))
    run(*training(base, data, output, "--max-steps", 1, "--save-steps", 1, "--overwrite"))
    assert (output / "notes.txt").read_text(encoding="utf-8") == "mine"
    other = shutil.copytree(base, tmp_path / "another-base")
    found = failure(*training(other, data, output, "--max-steps", 2, "--resume"))
    assert f"the base model is {str(base)!r} there and {str(other)!r} here" in found
    message = failure(*training(base, data, output, "--resume", "--encoder-dim", 8))
    assert "encoder_dim is 64 there and 8 here" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder-hidden-size", 8], "`encoder_hidden_size` is 8"),
        (["--layers-to-transform", 7], "names layer 7"),
        (["--batch-size", 0], "`batch_size` must be at least 1"),
        (["--dtype", "float8"], "`dtype` must be one of"),
        (["--schedule", "downhill"], "downhill"),
        (["--model", "no/such/model"], "Cannot load the tokenizer of 'no/such/model'"),
    ],
)
def test_bad_options_are_refused_in_words(
    base: Path, data: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    assert message in failure(*training(base, data, tmp_path / "adapter", *options))


def test_generate_refuses_what_is_no_prefix_plus_adapter(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    assert "is a LORA adapter" in failure("generate", "--adapter", tmp_path, "--prompt", "a")
    assert "Cannot load the adapter" in failure("generate", "--adapter", tmp_path / "none", "--prompt", "a")


# ---------------------------------------------------------------------------------------------------- inspect


def table_of(printed: str) -> dict[str, list[str]]:
    """The cells of a printed table by the first of each row."""
    lines = [line.strip("│┃ ") for line in printed.splitlines() if line.strip().startswith(("│", "┃"))]
    rows = [[cell.strip() for cell in re.split("[│┃]", line)] for line in lines]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("gating", [False, True])
def test_inspect_shows_each_layers_prefix_without_the_base_models_weights(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gating: bool
) -> None:
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        PrefixPlusConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, reparameterization="mlp", init_weights=False, gating=gating
        ),
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((base / "config.json").read_text("utf-8"), "utf-8")
    run("inspect", tmp_path / "adapter", "--base", tmp_path / "config")
    printed = capsys.readouterr().out
    table = table_of(printed)
    header = ["heads × tokens × dim", "key rms", "value rms", *(["gate"] if gating else []), "parameters"]
    assert table.pop("module") == header
    prefixes = prefix_key_values(model)
    assert list(table) == list(prefixes)
    for name, (key, value) in prefixes.items():
        shape, key_rms, value_rms, *rest = table[name]
        assert shape == "2 × 4 × 8"
        assert float(key_rms) == pytest.approx(key.square().mean().sqrt().item(), rel=1e-3)
        assert float(value_rms) == pytest.approx(value.square().mean().sqrt().item(), rel=1e-3)
        assert rest[:-1] == ([f"{math.tanh(1.0):.4g}"] if gating else [])
    total = model.get_nb_trainable_parameters()[0] - len(prefixes) * SCALING_SIZE
    assert sum(int(cells[-1].replace(",", "")) for cells in table.values()) == total
    assert f"{total:,} parameters in all" in printed


def test_inspect_measures_contributions_on_data_and_draws(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, figures = tmp_path / "adapter", tmp_path / "figures" / "new"
    run(*training(base, data, output, "--max-steps", 2, "--save-steps", 1, "--logging-steps", 1))
    capsys.readouterr()
    run("inspect", output, "--data", data, "--batch-size", 3, "--plot", figures)
    printed = capsys.readouterr().out
    names = ["prefix_norms.png", "prefix_contribution.png", "training_curve.png"]
    assert printed.splitlines()[-3:] == [str(figures / name) for name in names]
    assert all((figures / name).read_bytes().startswith(b"\x89PNG") for name in names)
    tokenizer = word_tokenizer()
    encoded = [encode(Record(**example), tokenizer) for example in EXAMPLES]
    batch = Collator(0)(encoded)  # all at once: the mean must not depend on the batches
    model = AutoPeftModelForCausalLM.from_pretrained(str(output)).eval()
    found = prefix_contribution(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    table = table_of(printed)
    assert table.pop("module")[-2:] == ["contribution", "largest"]
    for name, of_heads in found.items():
        assert of_heads.min() > 0.0
        assert [float(cell.rstrip("%")) / 100 for cell in table[name][-2:]] == pytest.approx(
            [of_heads.mean().item(), of_heads.max().item()], abs=6e-4
        )


def test_inspect_refuses_what_it_cannot_show(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Cannot load the adapter" in failure("inspect", tmp_path / "none")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), PrefixPlusConfig(num_virtual_tokens=4))
    adapter = tmp_path / "adapter"
    model.save_pretrained(str(adapter))
    assert f"--plot must be a directory, {data} is a file" in failure("inspect", adapter, "--plot", data)
    assert "`batch_size` must be at least 1" in failure("inspect", adapter, "--batch-size", 0)
    assert "Cannot read" in failure("inspect", adapter, "--data", tmp_path / "none.jsonl")
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "num_virtual_tokens": 5}), "utf-8")
    assert "The checkpoint does not fit adapter 'default'" in failure("inspect", adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}), "utf-8")
    assert "names no base model. Give one with --base" in failure("inspect", adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}), "utf-8")
    assert "is an adapter for SEQ_CLS" in failure("inspect", adapter)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "peft-prefix-plus[plot]"' in failure("inspect", adapter, "--plot", tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


# ---------------------------------------------------------------------------------------------------- parameters


def test_convert_goes_to_prefix_plus_and_back(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    old.save_pretrained(str(tmp_path / "old"))
    run("convert", "--adapter", tmp_path / "old", "--output", tmp_path / "new")
    run("convert", "--adapter", tmp_path / "new", "--output", tmp_path / "back", "--model", base)
    printed = capsys.readouterr().out
    assert f"The PREFIX_PLUS adapter is in {tmp_path / 'new'}" in printed
    assert f"The PREFIX_TUNING adapter is in {tmp_path / 'back'}" in printed

    tokens = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        expected = old.eval()(input_ids=tokens).logits
        for name in ("new", "back"):
            found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name).eval()(input_ids=tokens).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


FORMATS = ["prefix-tuning", "cartridge", "adapterhub", "key-values"]


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_convert_takes_every_format_to_every_other(base: Path, tmp_path: Path, source: str, target: str) -> None:
    torch.manual_seed(0)
    fields = dict(
        task_type="CAUSAL_LM", num_virtual_tokens=3, decoupled=False, position_free=False, init_weights=False
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), PrefixPlusConfig(**fields)).eval()
    model.save_pretrained(str(tmp_path / "first"))
    tokens = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    run("convert", "--adapter", tmp_path / "first", "--output", tmp_path / "second", "--to", source)
    arguments = ["--adapter", tmp_path / "second", "--output", tmp_path / "third", "--to", target, "--model", base]
    if source == target:
        assert f"is in the format {source} already" in failure("convert", *arguments)
        return
    run("convert", *arguments)
    run("convert", "--adapter", tmp_path / "third", "--output", tmp_path / "last", "--model", base)
    with torch.no_grad():
        found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "last").eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_convert_reads_a_file_of_keys_and_values_and_unpickles_only_if_told(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), PrefixPlusConfig(num_virtual_tokens=3, gating=True))
    to_key_values(model, path=tmp_path / "one.safetensors")
    run("convert", "--adapter", tmp_path / "one.safetensors", "--output", tmp_path / "new", "--model", base)
    assert json.loads((tmp_path / "new/adapter_config.json").read_text())["gating"] is True
    assert "gating=True" in failure(
        "convert", "--adapter", tmp_path / "one.safetensors", "--output", tmp_path / "pt", "--to", "prefix-tuning"
    )
    assert "cannot be read as an adapter" in failure("convert", "--adapter", __file__, "--output", tmp_path / "x")

    old = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    old.save_pretrained(str(tmp_path / "old"), safe_serialization=False)
    assert "allow_pickle=True" in failure("convert", "--adapter", tmp_path / "old", "--output", tmp_path / "y")
    run("convert", "--adapter", tmp_path / "old", "--output", tmp_path / "y", "--allow-pickle")
    assert not (tmp_path / "pt").exists() and not (tmp_path / "x").exists()


def test_convert_refuses_other_adapters_used_directories_and_other_layers(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(str(tmp_path / "lora"))
    model = get_peft_model(
        lora.unload(), joint_config(task_type="CAUSAL_LM", layers_to_transform=0, position_free=False)
    )
    model.save_pretrained(str(tmp_path / "top"))
    for adapter, output, message in (
        (
            "lora",
            "new",
            "is a LORA adapter; prefix-plus converts PREFIX_PLUS, PREFIX_TUNING, CARTRIDGE and AdapterHub's",
        ),
        ("top", "new", "Cannot convert the adapter .*A choice of layers cannot be expressed"),
        ("top", "lora", "must be a new or empty directory"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["convert", "--adapter", str(tmp_path / adapter), "--output", str(tmp_path / output)])
    assert not (tmp_path / "new").exists()


def test_params_counts_what_the_formulas_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    num_layers, size, length, width, hidden = 32, 2 * 32 * 128, 20, 64, 64
    virtual_tokens, output = length * width, width * size
    inner, bias = width * hidden + hidden, size
    scales, offsets = num_layers * SCALING_SIZE, num_layers * size // 2
    learned = {
        ("none", ""): num_layers * length * size,
        ("log", ""): num_layers * (length * size + size + 1),
        ("linear", "none"): num_layers * (virtual_tokens + output),
        ("linear", "input"): virtual_tokens + num_layers * output,
        ("linear", "projection"): num_layers * virtual_tokens + output,
        ("linear", "all"): virtual_tokens + output,
        ("mlp", "none"): num_layers * (virtual_tokens + inner + output + bias),
        ("mlp", "input"): virtual_tokens + inner + num_layers * (output + bias),
        ("mlp", "projection"): num_layers * virtual_tokens + inner + output + bias,
        ("mlp", "all"): virtual_tokens + inner + output + bias,
    }
    expected = {key: count + scales + (offsets if key[1] else 0) for key, count in learned.items()}
    assert expected["none", ""] == 5_242_880 + scales
    run("params", "--markdown")
    printed = capsys.readouterr().out
    rows = [[cell.strip(' `"') for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    assert {(row[0], row[1]): int(row[2].replace(",", "")) for row in rows} == expected
    assert printed in (ROOT / "README.md").read_text(encoding="utf-8")


def test_params_reads_a_models_configuration(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("params", "--model", base, "--layers-to-transform", "0", "--num-virtual-tokens", 3)
    assert f" {3 * 2 * 2 * 8 + SCALING_SIZE} " in capsys.readouterr().out
    assert "Cannot load the configuration" in failure("params", "--model", "no/such/model")


# ---------------------------------------------------------------------------------------------------- options, records


def test_every_field_of_the_configuration_is_an_option_of_train(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {field.name for field in dataclasses.fields(PrefixPlusConfig)}
    own -= {field.name for field in dataclasses.fields(PeftConfig)}
    monkeypatch.setenv("COLUMNS", "300")
    run("train", "--help")
    printed = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in printed for name in own)


def test_option_values_become_what_the_field_allows() -> None:
    layers = value_parser({int, list[int]})
    assert (layers("3"), layers("0,-1")) == (3, [0, -1])
    names = value_parser({str, list[str]})
    assert names("self_attn") == ["self_attn"]
    assert names("0.self_attn,1.self_attn") == ["0.self_attn", "1.self_attn"]
    assert names(r".*\.[01]\.self_attn") == r".*\.[01]\.self_attn"
    start = value_parser({bool, str})
    assert (start("true"), start("False"), start("zero")) == (True, False, "zero")


@pytest.mark.parametrize("adds_start", [False, True])
def test_the_loss_is_on_the_completion_and_the_end(adds_start: bool) -> None:
    tokenizer = word_tokenizer(adds_start)
    records = [Record("red table", "the table is red"), Record("", "a cup")]
    batch = Collator(0)([encode(record, tokenizer) for record in records])
    with_loss = [row[row != -100] for row in batch["labels"]]
    assert [tokenizer.decode(row) for row in with_loss] == ["the table is red <end>", "a cup <end>"]
    first = ["<start>"] if adds_start else []
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0])[: len(first) + 2] == [*first, "red", "table"]
    assert batch["attention_mask"].sum(dim=1).tolist() == [7 + adds_start, 3 + adds_start]


def test_a_long_record_loses_its_prompts_start_first() -> None:
    tokenizer = word_tokenizer()
    encoded = encode(Record("a big red table", "the table is red"), tokenizer, max_length=7)
    assert tokenizer.decode(encoded.token_ids) == "red table the table is red <end>"
    assert encoded.num_prompt_tokens == 2
    encoded = encode(Record("a big red table", "the table is red"), tokenizer, max_length=3)
    assert (tokenizer.decode(encoded.token_ids), encoded.num_prompt_tokens) == ("the table is", 0)


def test_the_package_needs_nothing_of_its_extras_and_the_command_says_what_it_lacks() -> None:
    program = """
import sys
import peft_prefix_plus
assert not {"typer", "matplotlib", "peft_prefix_plus.cli"} & set(sys.modules)
sys.modules["typer"] = None
from peft_prefix_plus.cli import main
main(["params"])
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'pip install "peft-prefix-plus[cli]"' in result.stderr and "typer" in result.stderr


# ---------------------------------------------------------------------------------------------------- broken files and values


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an adapter, with a tokenizer."""
    directory = tmp_path_factory.mktemp("adapter")
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(str(directory))
    word_tokenizer().save_pretrained(directory)
    return directory


def copied(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", -1], "`seed` must be at least 0, got -1"),
        (["--seed", 2**32], "`seed` must be at most 4294967295"),
        (["--max-length", 1], "`max_length` must be at least 2, got 1"),
        (["--weight-decay", -1], "`weight_decay` must be at least 0"),
        (["--weight-decay", "nan"], "`weight_decay` must be at least 0, got nan"),
        (["--learning-rate", "nan"], "`learning_rate` must be positive and finite, got nan"),
        (["--epochs", "inf"], "`epochs` must be positive and finite, got inf"),
        (["--warmup-steps", -1], "`warmup_steps` must be at least 0"),
        (["--logging-steps", 0], "`logging_steps` must be at least 1"),
        (["--batch-size", 10**30], "`batch_size` must be at most 2147483647"),
        (["--num-virtual-tokens", 10**30], "`num_virtual_tokens` must be at most 2147483647"),
        (["--target-modules", "a{99999999999999999999}"], "no valid regular expression"),
        (["--target-modules", "(" * 5000 + ")" * 5000], "no valid regular expression"),
        (["--layers-to-transform", 0, "--layers-pattern", "(?x)layers#"], "no valid regular expression"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_numbers_and_patterns_out_of_range_are_refused_in_words(
    base: Path, data: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    assert message in failure(*training(base, data, tmp_path / "adapter", *options))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "--top-k", -1], "`top_k` must be at least 0, got -1"),
        (["--sample", "--top-p", 5], "`top_p` must be in (0, 1], got 5.0"),
        (["--sample", "--top-p", "nan"], "`top_p` must be in (0, 1], got nan"),
        (["--sample", "--temperature", "nan"], "`temperature` must be positive and finite, got nan"),
        (["--sample", "--seed", -1], "`seed` must be at least 0"),
        (["--temperature", 0.5], "`temperature` is 0.5, but it has no effect without --sample"),
        (["--top-p", 0.5], "`top_p` is 0.5, but it has no effect without --sample"),
        (["--top-k", 5], "`top_k` is 5, but it has no effect without --sample"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_generate_refuses_values_that_mean_nothing(options: list[object], message: str) -> None:
    assert message in failure("generate", "--adapter", "none", "--prompt", "red", *options)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", b"not a file of tensors"),
        ("adapter_model.safetensors", b""),
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b'{"peft_type": "NOT_A_METHOD"}'),
        ("adapter_config.json", b"[" * 100_000),
        ("adapter_config.json", b'{"peft_type": "PREFIX_PLUS", "num_virtual_tokens": [3]}'),
        ("adapter_config.json", b'{"peft_type": "PREFIX_PLUS", "encoder_dropout": 1' + b"0" * 400 + b"}"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("command", ["generate", "inspect", "convert"])
def test_a_broken_file_is_one_line_of_words(
    adapter: Path, tmp_path: Path, command: str, name: str, content: bytes
) -> None:
    broken = copied(adapter, tmp_path / "broken")
    (broken / name).write_bytes(content)
    arguments = {
        "generate": ["generate", "--adapter", broken, "--prompt", "red"],
        "inspect": ["inspect", broken],
        "convert": ["convert", "--adapter", broken, "--output", tmp_path / "new"],
    }
    message = failure(*arguments[command])
    assert re.match(r"Error: Cannot (load|convert) the adapter ", message)
    assert "\n" not in message.strip()


def test_weights_that_were_pickled_with_code_are_refused_in_words(adapter: Path, tmp_path: Path) -> None:
    broken = copied(adapter, tmp_path / "broken")
    (broken / "adapter_model.safetensors").unlink()
    (broken / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "Cannot load the adapter" in failure("inspect", broken)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "\\ud800"}', "'text' has a lone surrogate, '\\ud800' at character 0"),
        ("[" * 100_000, "line 1: cannot read [["),
        ('{"text": ' + "1" * 5000 + "}", "line 1: cannot read"),
    ],
    ids=["lone surrogate", "nested too deep", "number of 5000 digits"],
)
def test_a_line_that_json_or_utf8_cannot_take_is_refused_in_words(
    base: Path, tmp_path: Path, line: str, message: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(line + "\n", encoding="utf-8")
    assert message in failure(*training(base, data, tmp_path / "adapter"))


def test_a_prompt_with_a_lone_surrogate_is_refused_in_words(adapter: Path) -> None:
    assert "The prompt has a lone surrogate" in failure("generate", "--adapter", adapter, "--prompt", "red \udcff")


def test_a_tokenizer_of_another_model_is_refused_in_words(
    base: Path, data: Path, adapter: Path, tmp_path: Path
) -> None:
    other = copied(base, tmp_path / "other")
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(5)
    model.save_pretrained(other)
    for arguments in (
        training(other, data, tmp_path / "output"),
        ["generate", "--adapter", adapter, "--model", other, "--prompt", "red table"],
        ["inspect", adapter, "--base", other, "--data", data],
    ):
        message = failure(*arguments)
        assert "vocabulary has 5 tokens" in message and "The tokenizer gives the token" in message
    assert not (tmp_path / "output").exists()


@pytest.fixture(scope="module")
def few_positions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model that has learned 8 positions."""
    directory = tmp_path_factory.mktemp("gpt2")
    sizes = dict(n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **sizes)).save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


def test_records_are_cut_to_a_models_positions(
    few_positions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [{"text": "the big red table is on the box a cup"}, {"text": "a cup"}])
    output = tmp_path / "adapter"
    run(*training(few_positions, data, output, "--max-steps", 1))
    assert "1 of 2 records have more than 8 tokens and are cut" in capsys.readouterr().err
    run("inspect", output, "--data", data)
    run("generate", "--adapter", output, "--prompt", "red table", "--max-new-tokens", 6)
    message = failure("generate", "--adapter", output, "--prompt", "red table")
    assert "The model has 8 positions; the longest prompt has 2 tokens" in message
    assert "--max-new-tokens is 128" in message


def test_a_model_that_is_no_causal_language_model_is_refused_without_a_list_of_classes(
    data: Path, adapter: Path, tmp_path: Path
) -> None:
    T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    word_tokenizer().save_pretrained(tmp_path / "t5")
    for arguments in (
        ["params", "--model", tmp_path / "t5"],
        ["inspect", adapter, "--base", tmp_path / "t5"],
        training(tmp_path / "t5", data, tmp_path / "output"),
    ):
        message = failure(*arguments)
        assert "is a model of the type 't5', which is no causal language model" in message
        assert len(message) < 400 + len(str(tmp_path))


def test_inspect_without_data_warns_of_nothing(adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # a warning goes to stderr, as in a process of its own
        run("inspect", adapter)
    assert capfd.readouterr().err == ""


def test_an_output_that_cannot_be_made_is_refused_in_words(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    message = failure(*training(base, data, tmp_path / "file" / "adapter"))
    assert "Cannot write to --output" in message


# ---------------------------------------------------------------------------------------------------------- serve


def test_training_says_whether_vllm_can_serve_the_adapter(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*training(base, data, tmp_path / "free", "--max-steps", 1, "--position-free", "--no-decoupled"))
    assert "vLLM cannot serve this adapter: it is position-free" in capsys.readouterr().out
    run(*training(base, data, tmp_path / "served", "--max-steps", 1, "--servable", "--decoupled"))
    assert "vLLM can serve this adapter." in capsys.readouterr().out
    config = PeftConfig.from_pretrained(str(tmp_path / "served"))
    assert (config.decoupled, config.position_free) == (False, False)
    run(*training(base, data, tmp_path / "added", "--max-steps", 1, "--decoupled"))
    assert "vLLM can serve this adapter." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "path"], "NAME=PATH"),
        (["--adapter", "=path"], "NAME=PATH"),
        (["--adapter", "a=b", "--adapter", "a=c"], "twice"),
        (["--engine", "unknown"], "unknown"),
        (["--port", "0"], "port"),
    ],
)
def test_serve_refuses_options_that_say_nothing(base: Path, options: list[str], message: str) -> None:
    assert message in failure("serve", "--model", base, *options)


def test_serve_hands_its_options_to_the_engine(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without vLLM: what stands for it here is a module that prints what it was started with."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    shown = tmp_path / "shown.json"
    (package / "api_server.py").write_text(
        f"import json, os, sys\njson.dump([sys.argv[1:], os.environ['VLLM_PLUGINS']], open({str(shown)!r}, 'w'))\n"
        "config = json.loads(sys.argv[sys.argv.index('--kv-transfer-config') + 1])\n"
        "print(open(config['kv_connector_extra_config']['store'] + '/adapters.json').read(), file=open('adapters', 'w'))\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), PrefixPlusConfig.servable(num_virtual_tokens=3))
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--model", str(base), "--adapter", "a=adapter", "--port", "7", "--", "--max-model-len", "64"])
    assert stop.value.code == 3  # the server's
    arguments, plugins = json.loads(shown.read_text())
    config = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    assert arguments[:6] == ["--model", str(base), "--host", "127.0.0.1", "--port", "7"]
    assert arguments[-2:] == ["--max-model-len", "64"] and plugins == "other,prefix_plus"
    assert config["kv_connector_extra_config"] | {"store": ""} == {"store": "", "may_load": False, "may_add": False}
    assert json.loads((tmp_path / "adapters").read_text())["a"]["num_cached_tokens"] == 3
    assert not Path(config["kv_connector_extra_config"]["store"]).exists()  # nothing is left behind
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    shown.unlink()
    assert "adapter_model.safetensors" in failure("serve", "--model", base, "--adapter", "a=adapter")
    assert not shown.exists()


def test_serve_says_how_to_install_what_is_missing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_prefix_plus.serving import vllm_server

    monkeypatch.setattr(vllm_server, "find_spec", lambda name: None)
    assert "peft-prefix-plus[vllm]" in failure("serve", "--model", base)
