"""benchmarks/quality.py: its tasks ask what they say, its methods are of one size, and a run on a real model goes from end to end."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import math
import re
import textwrap
from pathlib import Path

import pytest
import quality
import quality_data
import quality_real
import quality_small
from models import save_base
from peft import get_peft_model
from quality_data import LIBRARY, SCALES, make_tokenizer
from quality_methods import equal_sizes, lora_config, num_parameters, prefix_plus_config, prompt_tuning_config
from quality_real_report import report, section
from quality_real_tasks import TASKS, bleu, chrf, exact_match
from quality_runs import Results, lowest, progress_bar
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.cli.records import Record


FOODS, AREAS = ("French", "Indian", "Italian", "Chinese"), ("riverside", "city centre")
ROWS = [
    {"mr": f"name[Place {i}], eatType[pub], food[{food}], area[{area}]", "ref": f"Place {i} is a {text} pub, {area}."}
    for i, (food, area) in enumerate([(food, area) for food in FOODS for area in AREAS])
    for text in (food, f"nice {food}")
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few rows in the form of the E2E NLG files."""
    directory = tmp_path_factory.mktemp("e2e")
    for name, rows in (("devset.csv", ROWS), ("testset_w_refs.csv", ROWS[:6])):
        with (directory / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["mr", "ref"])
            writer.writeheader()
            writer.writerows(rows)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random Llama and a tokenizer."""
    tokenizer = make_tokenizer([row["mr"] + row["ref"] for row in ROWS], 400)
    return save_base(tmp_path_factory.mktemp("model"), tokenizer)


def options(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    base = ["--model", str(model), "--data", str(data), "--output", str(output), "--workers", "1"]
    return [*base, "--steps", "2", "--tokens", "4", *more]


def markdown_table(page: Path) -> dict[str, list[str]]:
    """The rows of the table in a page, by their first cells."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] for line in lines]
    return {cells[0]: cells for cells in rows}


def test_every_method_is_trained_and_measured_and_what_is_done_is_not_done_again(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(model, data, tmp_path, "--task", "labels", "--rates", "0.01", "--seeds", "1")
    quality.main(arguments)
    table = markdown_table(tmp_path / "quality.md")
    assert table.keys() == {"method", "base model", *quality_real.METHODS}
    assert len({len(cells) for cells in table.values()}) == 1
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(method in printed for method in quality_real.METHODS)
    for method in ("LoRA", "PREFIX_PLUS, gating", "PREFIX_PLUS (default)"):
        assert table[method][3].endswith("(1.000)"), f"{method} starts as the base model"

    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(runs) == 1 + len(quality_real.METHODS)
    for path in runs:
        result = json.loads(path.read_text())
        trained = {"seconds_per_step", "peak_bytes"} if result["parameters"] else set()
        assert result.keys() == {"parameters", "first_loss", "loss", "unrelated_loss", "score", *trained}
    quality.main(arguments)
    assert runs == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}


def place(model: Path, data: Path) -> quality_real.Place:
    return quality_real.Place(data, equal_sizes(AutoConfig.from_pretrained(model), 4), "float32", "cpu")


def test_a_run_gives_the_same_every_time_and_learns(model: Path, data: Path) -> None:
    for method in ("LoRA", "PREFIX_TUNING, start: text"):
        run = quality_real.Run(str(model), "e2e", 4, 8, method, 0.1, seed=1)
        first, again = (quality_real.perform(run, place(model, data)) for _ in range(2))
        for name in ("first_loss", "loss", "unrelated_loss", "score"):
            assert first[name] == again[name]
        assert first["loss"] < first["first_loss"] and 0 <= first["score"] <= 100


def test_answers_do_not_depend_on_the_other_prompts_of_the_batch(model: Path, data: Path) -> None:
    task = TASKS["e2e"](data)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights="random")
    adapted = get_peft_model(base, config)
    short = dataclasses.replace(task, prompts=[*task.prompts, ("name[A]\n", ["A."])], max_new_tokens=8)
    together = quality_real.answers(adapted, tokenizer, short, "cpu")
    for prompt, answer in zip(short.prompts, together, strict=True):
        assert quality_real.answers(adapted, tokenizer, dataclasses.replace(short, prompts=[prompt]), "cpu") == [
            answer
        ]


def test_the_best_rate_is_repeated_and_a_loss_that_is_not_a_number_is_the_worst(
    model: Path, data: Path, tmp_path: Path
) -> None:
    more = ("--task", "labels", "--methods", "default", "lora", "--rates", "0.1", "0.2", "0.3")
    grid = quality_real.Grid(quality.parse(options(model, data, tmp_path, *more)), Results(tmp_path / "runs"))
    losses = {0.1: math.nan, 0.2: 1.5, 0.3: 2.0}
    measured = {"parameters": 10, "first_loss": 3.0, "score": 50.0, "unrelated_loss": 4.0}
    trained = {**measured, "seconds_per_step": 0.5, "peak_bytes": 2**21}
    for run in grid.every_rate():
        grid.results.add(run, {**trained, "loss": losses.get(run.rate, 2.5)})
    assert lowest(losses) == 0.2
    for seed, run in enumerate(grid.best_rate("labels", "LoRA")):
        assert (run.rate, run.seed) == (0.2, seed)
    for method, loss in {"PREFIX_PLUS (default)": math.nan, "LoRA": 1.5}.items():
        for run in grid.best_rate("labels", method)[1:]:
            again = {"first_loss": 6.0, "loss": loss + run.seed, "score": 50.0 + run.seed}
            grid.results.add(run, {**trained, **again})
    _, row, last = section(grid.result("labels"), "model").rows
    assert last[0] == "PREFIX_PLUS (default)" and last[4] == "nan"
    assert row == [
        *("LoRA", "10", "0.2", "5.000 (1.667)", "2.500", "1.500 to 3.500", "51.0", "50.0 to 52.0"),
        *("4.000 → 4.000", "0.50", "2", "0.1: nan, 0.2: 1.500, 0.3: 2.000"),
    ]
    report(tmp_path, "model", [grid.result("labels")], Console(quiet=True))
    assert (tmp_path / "quality.png").is_file()


def test_all_methods_have_as_many_parameters_as_the_prefix() -> None:
    config = LlamaConfig(hidden_size=576, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3)
    sizes = equal_sizes(config, 20)
    assert (sizes.tokens, sizes.rank, sizes.prompt_tokens) == (20, 4, 80)
    prefix = num_parameters(config, prefix_plus_config(sizes, reparameterization="none"))
    for other in (
        lora_config(sizes),
        prompt_tuning_config(sizes),
        prefix_plus_config(sizes, reparameterization="linear"),
        prefix_plus_config(sizes, reparameterization="mlp"),
    ):
        assert num_parameters(config, other) == pytest.approx(prefix, rel=0.01)


# ------------------------------------------------------------------------------------------------------------ tasks


def test_e2e_asks_for_a_sentence_and_has_all_references_of_an_input(data: Path) -> None:
    task = TASKS["e2e"](data)
    assert [(record.prompt, record.completion) for record in task.training] == [
        (f"{row['mr']}\n", row["ref"]) for row in ROWS
    ]
    assert len(task.held_out) == 6 and len(task.prompts) == 3
    for prompt, references in task.prompts:
        assert references == [row["ref"] for row in ROWS if f"{row['mr']}\n" == prompt]


def test_labels_asks_for_an_attribute_of_restaurants_that_are_not_in_the_training(data: Path) -> None:
    task = TASKS["labels"](data)
    assert len(task.training) + len(task.held_out) == len(ROWS) and task.held_out
    by_sentence = {row["ref"]: row["mr"] for row in ROWS}
    inputs = []
    for records in (task.training, task.held_out):
        inputs.append({by_sentence[record.prompt.split("\n")[0]] for record in records})
        for record in records:
            sentence, attribute = record.prompt.removesuffix(":").split("\n")
            value = re.search(rf"{attribute}\[(.*?)\]", by_sentence[sentence])
            assert record.completion == (f" {value[1]}" if value else " not mentioned")
    assert not inputs[0] & inputs[1]
    assert task.prompts == [(record.prompt, [record.completion.strip()]) for record in task.held_out]


def test_names_are_held_out_with_all_their_translations(data: Path) -> None:
    task = TASKS["names"](data)
    assert len(task.held_out) == 400
    completions = {record.prompt: record.completion for record in task.training}
    assert completions["Japan in Italian:"] == " Giappone" and completions["French in German:"] == " Französisch"
    trained = {prompt.split(" in ")[0] for prompt in completions}
    assert not trained & {record.prompt.split(" in ")[0] for record in task.held_out}


def test_docstrings_asks_what_a_function_does_of_modules_that_are_not_in_the_training(data: Path) -> None:
    task = TASKS["docstrings"](data)
    assert len(task.held_out) == 300 and len(task.prompts) == 50

    def module(record: Record) -> Path:
        path = LIBRARY
        for part in record.prompt.removeprefix("def ").split("(")[0].split("."):
            path /= part
            if path.with_suffix(".py").is_file():
                return path
        package: Path = path.parent
        while not package.is_dir():
            package = package.parent
        return package

    assert not set(map(module, task.training)) & set(map(module, task.held_out))
    every = {record.prompt: record.completion for record in task.training + task.held_out}
    assert every["def textwrap.fill(text, width=70, **kwargs):\n"] == inspect.getdoc(textwrap.fill)


def test_scores() -> None:
    references = [["The pub is cheap.", "A cheap pub it is, by the river."], ["It is a pub for families."]]
    assert bleu([of_answer[-1] for of_answer in references], references) == pytest.approx(100)
    assert bleu(["No.", "No."], references) < 5
    assert chrf(["A pub."], [["A pub."]]) == pytest.approx(100) and chrf(["No."], [["A pub."]]) < 20
    assert exact_match(["a", "b", "c", "d"], [["a"], ["x", "b"], ["C"], ["dd"]]) == 50


def test_what_cannot_be_run_is_refused_before_it_starts(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            quality.parse(arguments)
        return " ".join(capsys.readouterr().err.split())

    real = ("--model", str(model), "--data", str(data))
    assert "--scale is only without --model" in refusal(*real, "--scale", "large")
    assert "--methods is only with --model" in refusal("--methods", "LoRA")
    assert "there is no task 'prose' on a real model. There are: e2e, labels, names, docstrings." in refusal(
        *real, "--task", "prose"
    )
    assert "there is no task 'e2e' without --model. There are: prose, table." in refusal("--task", "e2e")
    assert "'adapters' is in the name of no method. There are: PREFIX_PLUS" in refusal(*real, "--methods", "adapters")
    assert "--steps must be at least 2, got 1" in refusal(*real, "--steps", "1")
    assert "devset.csv does not exist" in refusal(*real[:2], "--data", str(tmp_path))
    assert "`make real-model` makes a model" in refusal("--model", str(tmp_path / "none"), *real[2:])
    (tmp_path / "devset.csv").write_text("input,output\na,b\n")
    assert "must have the columns 'mr' and 'ref', found 'input', 'output'" in refusal(
        *real[:2], "--data", str(tmp_path)
    )
    assert quality.parse(real).output == Path("quality-output", model.name)
    assert quality.parse([]).output == Path("quality-output")


# -------------------------------------------------------------------------------------------------- the small model


def test_the_small_model_is_made_and_adapted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SCALES["small"]
    scale = dataclasses.replace(
        small,
        model={**small.model, "num_hidden_layers": 2},
        pretraining_steps=2,
        pretraining_batch=2,
        steps=10,
        batch=2,
    )
    monkeypatch.setitem(SCALES, "small", scale)
    monkeypatch.setattr(
        quality_data, "library_sources", lambda: ["def function(argument):\n    return argument\n" * 200]
    )
    with progress_bar(Console(quiet=True)) as progress:
        quality_data.make_base(tmp_path / "base", scale, "cpu", progress)
    for method, rate in {"PREFIX_PLUS (default)": 5e-3, "PREFIX_TUNING, projection": 3e-3, "LoRA": 5e-3}.items():
        run = quality_small.Run("table", "0.5 %", method, rate, seed=0)
        result = quality_small.perform(run, tmp_path, "small", "cpu")
        assert math.isfinite(result["loss"])
        assert ("retrained_loss" in result) == (method == "PREFIX_PLUS (default)")
