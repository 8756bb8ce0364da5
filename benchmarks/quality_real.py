"""
The part of benchmarks/quality.py that adapts a pretrained model: its methods, and what is measured of each.

The base model is frozen, in bfloat16 unless --dtype says otherwise; PEFT makes the adapters in float32. Every method has about as
many trainable parameters as a prefix of --tokens virtual tokens, and one learning rate for all of them.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import random
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from quality_methods import (
    Method,
    Setting,
    Sizes,
    cartridge,
    equal_sizes,
    examples_beside_decoupled,
    full_fine_tuning,
    lora,
    prefix_plus,
    prefix_plus_from_text,
    prefix_tuning,
    prefix_tuning_from_text,
    prefix_tuning_from_zero,
    prompt_tuning,
)
from quality_real_report import MethodResult, TaskResult, report
from quality_real_tasks import TASKS, Task
from quality_runs import Results, file_name, lowest, perform_all, process_pool, progress_bar
from quality_training import Batch, held_out_loss, to, train
from rich.console import Console
from speed import peak_bytes
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_prefix_plus.cli.records import Collator, encode, prompt_ids
from peft_prefix_plus.encoders import untrained_parameters
from peft_prefix_plus.training.padding import padding_id


ROWS = 8
"""The rows of a training batch."""

RATES = (1e-3, 2e-3, 5e-3, 1e-2)
"""The learning rates of all forms of PREFIX_PLUS."""

PREFIX_RATES = (0.03, 0.1, 0.3)
"""The learning rates of the methods whose parameters are keys, values or embeddings without a scale."""

METHODS = {
    "PREFIX_PLUS (default)": Method(prefix_plus(), RATES),
    "PREFIX_PLUS, steps do not shrink": Method(prefix_plus(reparameterization="none"), RATES),
    "PREFIX_PLUS, fixed positions": Method(prefix_plus(position_free=False), RATES),
    "PREFIX_PLUS, joint": Method(prefix_plus(decoupled=False), RATES),
    "PREFIX_PLUS, joint, fixed positions": Method(prefix_plus(decoupled=False, position_free=False), RATES),
    "PREFIX_PLUS, gating": Method(prefix_plus(gating=True), RATES),
    "PREFIX_PLUS, linear": Method(prefix_plus(reparameterization="linear"), RATES),
    "PREFIX_PLUS, mlp": Method(prefix_plus(reparameterization="mlp"), RATES),
    "PREFIX_PLUS, joint, linear": Method(prefix_plus(decoupled=False, reparameterization="linear"), RATES),
    "PREFIX_PLUS, joint, mlp": Method(prefix_plus(decoupled=False, reparameterization="mlp"), RATES),
    "PREFIX_PLUS, joint, fixed positions, start: text": Method(prefix_plus_from_text(), RATES),
    "PREFIX_PLUS, joint, fixed positions, start: text by attention": Method(prefix_plus_from_text("attention"), RATES),
    "PREFIX_PLUS, joint from text beside decoupled": Method(examples_beside_decoupled, RATES),
    "LoRA": Method(lora, (2e-3, 5e-3, 1e-2, 2e-2, 4e-2)),
    "PREFIX_TUNING, random": Method(prefix_tuning, PREFIX_RATES),
    "PREFIX_TUNING, start: zero": Method(prefix_tuning_from_zero, PREFIX_RATES),
    "PREFIX_TUNING, start: text": Method(prefix_tuning_from_text, PREFIX_RATES),
    "CARTRIDGE": Method(cartridge, PREFIX_RATES),
    "prompt tuning": Method(prompt_tuning, PREFIX_RATES),
}

BASE = "base model"


# ------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One training, or, with the method `BASE`, the measurement of the base model."""

    model: str
    task: str
    tokens: int
    steps: int
    method: str
    rate: float
    seed: int

    @property
    def file_name(self) -> str:
        setting = (self.task, self.model, f"{self.tokens}tokens", f"{self.steps}steps")
        return file_name(*setting, self.method, f"{self.rate:g}", self.seed)


@dataclass(frozen=True)
class Place:
    """Where a run finds what it needs."""

    data: Path
    sizes: Sizes
    dtype: str
    device: str


@cache
def load_task(name: str, data: Path) -> Task:
    return TASKS[name](data)


def perform(run: Run, place: Place) -> dict[str, Any]:
    """
    Adapt, train and measure.

    Returns:
        `dict`: `parameters`, `first_loss` (before the first step, on the same rows in all runs),
        `loss`, `score`, `unrelated_loss`, and, of what has been trained, `seconds_per_step` and `peak_bytes`.
    """
    task, device = load_task(run.task, place.data), place.device
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    base = AutoModelForCausalLM.from_pretrained(run.model, dtype=getattr(torch, place.dtype))
    base.requires_grad_(False).to(device)
    torch.manual_seed(run.seed)
    some = random.Random(0).sample(task.training, min(64, len(task.training)))
    text = "\n\n".join(record.prompt + record.completion for record in some)
    adapt = full_fine_tuning if run.method == BASE else METHODS[run.method].adapt
    model = adapt(Setting(base, tokenizer, place.sizes, text)).to(device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first_batches = list(islice(training_batches(task, tokenizer, seed=0), 4))
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in set(trainable) - untrained_parameters(model)),
        "first_loss": held_out_loss(model, first_batches, device),
    }
    if trainable:
        batches = islice(training_batches(task, tokenizer, run.seed), len(first_batches), None)
        groups = [{"params": trainable, "lr": run.rate}]
        seconds = train(model, lambda: next(batches), groups, run.steps, max(1, run.steps // 8), device)
        result["seconds_per_step"] = statistics.median(seconds)
        result["peak_bytes"] = peak_of_a_step(model, first_batches[0], device)
    result["loss"] = held_out_loss(model, held_out_batches(task, tokenizer), device)
    result["unrelated_loss"] = held_out_loss(model, unrelated_batches(tokenizer), device)
    result["score"] = task.score.of(answers(model, tokenizer, task, device), [right for _, right in task.prompts])
    return result


def training_batches(task: Task, tokenizer: Any, seed: int) -> Iterator[Batch]:
    """Yield batches of random records."""
    generator, collate = random.Random(seed), Collator(padding_id(tokenizer))
    while True:
        drawn = [task.training[generator.randrange(len(task.training))] for _ in range(ROWS)]
        yield collate([encode(record, tokenizer) for record in drawn])


def held_out_batches(task: Task, tokenizer: Any) -> Iterator[Batch]:
    """Yield the held-out records, those of about the same length together."""
    collate = Collator(padding_id(tokenizer))
    records = sorted((encode(record, tokenizer) for record in task.held_out), key=lambda record: len(record.token_ids))
    for start in range(0, len(records), 16):
        yield collate(records[start : start + 16])


def unrelated_batches(tokenizer: Any) -> Iterator[Batch]:
    """Yield 32 pieces of 128 tokens of Python's reference documentation, whose loss tells what a model has forgotten."""
    titles = sorted(pydoc_data.topics.topics)
    random.Random(0).shuffle(titles)
    text = "\n".join(pydoc_data.topics.topics[title] for title in titles)
    ids = torch.tensor(tokenizer(text[:50_000], add_special_tokens=False)["input_ids"])
    for pieces in ids[: 32 * 128].unflatten(0, (-1, 128)).split(8):
        yield {"input_ids": pieces, "labels": pieces}


def peak_of_a_step(model: Any, batch: Batch, device: str) -> int:
    """Return the bytes that a forward and backward pass has allocated at most, as benchmarks/speed.py measures it."""
    model.train()

    def step() -> None:
        model(**to(batch, device)).loss.backward()
        model.zero_grad()

    return peak_bytes(device, step)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, task: Task, device: str) -> list[str]:
    """Return the greedy answers to the prompts of a task."""
    model.eval()
    end, limit = tokenizer.eos_token_id, task.max_new_tokens
    if limit is None:
        references = [f" {right}" for _, of_prompt in task.prompts for right in of_prompt]
        limit = 1 + max(len(ids) for ids in tokenizer(references, add_special_tokens=False)["input_ids"])
    prompts = [prompt_ids(prompt, tokenizer) for prompt, _ in task.prompts]
    # by length: PEFT's prompt learning ignores position ids in `generate`, so that padding moves the text away from the prefix
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found = [""] * len(prompts)
    for start in range(0, len(order), 16):
        indices = order[start : start + 16]
        length = len(prompts[indices[-1]])
        padding = [length - len(prompts[index]) for index in indices]
        input_ids = [[end] * pads + prompts[index] for pads, index in zip(padding, indices, strict=True)]
        attention_mask = [[0] * pads + [1] * (length - pads) for pads in padding]
        generated = model.generate(
            input_ids=torch.tensor(input_ids, device=device),
            attention_mask=torch.tensor(attention_mask, device=device),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=end,
            eos_token_id=end,
        )
        written = tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
        for index, answer in zip(indices, written, strict=True):
            found[index] = answer.strip()
    return found


# --------------------------------------------------------------------------------------------------------- benchmark


@dataclass(frozen=True)
class Grid:
    """The runs of one invocation."""

    options: argparse.Namespace
    results: Results

    def base(self, task: str) -> Run:
        return self.run(task, BASE, 0.0, 0)

    def run(self, task: str, method: str, rate: float, seed: int) -> Run:
        options = self.options
        return Run(options.model, task, options.tokens, options.steps, method, rate, seed)

    def wanted(self, runs: Iterable[Run]) -> list[Run]:
        """Return the runs to perform and report: all of them, or with --done those that have a result."""
        return [run for run in runs if not self.options.done or self.results.get(run) is not None]

    def at_each_rate(self, task: str, method: str) -> list[Run]:
        """Return the runs of seed 0."""
        rates = self.options.rates or METHODS[method].rates
        return self.wanted(self.run(task, method, rate, 0) for rate in rates)

    def losses(self, task: str, method: str) -> dict[float, float]:
        """Return the loss for seed 0 at each learning rate."""
        return {run.rate: self.results.loss(run) for run in self.at_each_rate(task, method)}

    def methods(self, task: str) -> list[str]:
        return [method for method in self.options.methods if self.at_each_rate(task, method)]

    def every_rate(self) -> list[Run]:
        options = self.options
        of_methods = [
            run for task in options.tasks for method in self.methods(task) for run in self.at_each_rate(task, method)
        ]
        return [*map(self.base, options.tasks), *of_methods]

    def best_rate(self, task: str, method: str) -> list[Run]:
        """Return the runs at the learning rate with the lowest loss, one for each seed."""
        rate = lowest(self.losses(task, method))
        return self.wanted(self.run(task, method, rate, seed) for seed in range(self.options.seeds))

    def result(self, task: str) -> TaskResult:
        """Return what has been measured on a task."""
        methods = []
        for method in self.methods(task):
            runs = self.best_rate(task, method)
            of_seeds = [self.results.of(run) for run in runs]
            methods.append(MethodResult(method, runs[0].rate, of_seeds, self.losses(task, method)))
        score = load_task(task, self.options.data).score.name
        return TaskResult(task, score, self.results.of(self.base(task)), methods)


def chosen_methods(parts: list[str]) -> list[str]:
    """
    Return the methods whose names contain one of the parts, whatever its case.

    Raises:
        ValueError: If a part is in no method's name.
    """
    for part in parts:
        if not any(part.lower() in method.lower() for method in METHODS):
            raise ValueError(f"--methods: {part!r} is in the name of no method. There are: {'; '.join(METHODS)}.")
    return [method for method in METHODS if any(part.lower() in method.lower() for part in parts)]


def check(options: argparse.Namespace) -> None:
    """
    Look for what the benchmark needs, before it starts.

    Raises:
        ValueError: If an option has a value that cannot be, or the data of a task is not there.
        OSError: If the model is not there.
    """
    if options.steps < 2:
        raise ValueError(f"--steps must be at least 2, got {options.steps}.")
    for task in options.tasks:
        load_task(task, options.data)
    try:
        AutoConfig.from_pretrained(options.model)
    except OSError as error:
        raise OSError(f"--model: {error} (`make real-model` makes a model in .cache/smollm2.)") from error
    if AutoTokenizer.from_pretrained(options.model).eos_token_id is None:
        raise ValueError(
            f"--model: the tokenizer of {options.model} has no end-of-text token, which ends the answers."
        )


def main(options: argparse.Namespace) -> None:
    """Perform what has no result yet, and report."""
    place = Place(
        options.data,
        equal_sizes(AutoConfig.from_pretrained(options.model), options.tokens),
        options.dtype,
        options.device,
    )
    grid = Grid(options, Results(options.output / "runs"))
    console = Console(width=None if sys.stdout.isatty() else 200)  # the table is wide
    with progress_bar(console) as progress, process_pool(options.workers) as pool:
        training = partial(perform, place=place)
        perform_all(grid.every_rate(), training, grid.results, pool, progress, "learning rates")
        best = [run for task in options.tasks for method in grid.methods(task) for run in grid.best_rate(task, method)]
        perform_all(best, training, grid.results, pool, progress, "more seeds")
    report(options.output, options.model, [grid.result(task) for task in options.tasks], console)
