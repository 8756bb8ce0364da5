"""
The part of benchmarks/quality.py that needs no downloads: a small model, trained from scratch, and two tasks.

A small decoder is trained on the sources of Python's standard library, and then adapted, frozen, to the language's reference
documentation (prose), and to sentences that say what a table says. The score is the loss on held-out text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from quality_data import SCALES, TASKS, Scale, Task, make_base
from quality_methods import (
    Method,
    Setting,
    cartridge,
    full_fine_tuning,
    lora,
    prefix_plus,
    prefix_plus_from_text,
    prefix_tuning,
    prefix_tuning_from_text,
    prefix_tuning_from_zero,
    prefix_tuning_with_projection,
    prompt_tuning,
)
from quality_report import Section, draw_ranges, versions
from quality_runs import Results, file_name, lowest, perform_all, process_pool, progress_bar, rank
from quality_training import held_out_loss, to, train
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peft_prefix_plus import prefix_plus_param_groups, prune_layers, suggest_layers
from peft_prefix_plus.saving.files import write_atomically


TEXT = (
    "The documentation describes the language. For example, the following statement returns a list of the names.\n"
    * 20
)
"""What the methods that start from a text start from."""


@dataclass(frozen=True)
class SizedMethod(Method):
    """
    A method, and at which sizes it runs.

    Attributes:
        sizes: The names of the sizes.
    """

    sizes: tuple[str, ...] = ("0.5 %", "2 %")


RATE = (5e-3,)
"""The one learning rate of all variants of PREFIX_PLUS."""

SMALL = ("0.5 %",)

DEFAULT = "PREFIX_PLUS (default)"

METHODS = {
    DEFAULT: SizedMethod(prefix_plus(), (2e-3, *RATE, 1e-2)),
    "PREFIX_PLUS, fixed positions": SizedMethod(prefix_plus(position_free=False), (2e-3, *RATE, 1e-2)),
    "PREFIX_PLUS, joint": SizedMethod(prefix_plus(decoupled=False), (2e-3, *RATE, 1e-2)),
    "PREFIX_PLUS, joint, fixed positions": SizedMethod(prefix_plus(decoupled=False, position_free=False), RATE),
    "PREFIX_PLUS, joint, fixed positions, start: text": SizedMethod(prefix_plus_from_text(), RATE),
    "PREFIX_PLUS, joint, start: activations": SizedMethod(
        prefix_plus(decoupled=False, init_weights="activations"), RATE
    ),
    "PREFIX_PLUS, joint, start: zero": SizedMethod(prefix_plus(decoupled=False, init_weights="zero"), RATE),
    "PREFIX_PLUS, gating": SizedMethod(prefix_plus(gating=True), RATE),
    "PREFIX_PLUS, linear": SizedMethod(prefix_plus(reparameterization="linear"), RATE, SMALL),
    "PREFIX_PLUS, mlp": SizedMethod(prefix_plus(reparameterization="mlp"), RATE, SMALL),
    "PREFIX_PLUS, unscaled": SizedMethod(prefix_plus(prefix_scaling=1.0), (0.01, 0.1, 0.3), SMALL),
    "PREFIX_TUNING, random": SizedMethod(prefix_tuning, (0.01, 0.1, 0.3, 0.5)),
    "PREFIX_TUNING, start: zero": SizedMethod(prefix_tuning_from_zero, (0.01, 0.1, 0.3, 0.5)),
    "PREFIX_TUNING, start: text": SizedMethod(prefix_tuning_from_text, (0.01, 0.1, 0.3, 0.5)),
    "PREFIX_TUNING, projection": SizedMethod(prefix_tuning_with_projection, (3e-3, 1e-2, 3e-2)),
    "CARTRIDGE": SizedMethod(cartridge, (0.1, 0.3)),
    "prompt tuning": SizedMethod(prompt_tuning, (0.03, 0.3), SMALL),
    "LoRA": SizedMethod(lora, (5e-3, 1e-2, 2e-2, 4e-2)),
    "full fine-tuning": SizedMethod(full_fine_tuning, (1e-3, 3e-3), SMALL),
}


# ------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    size: str
    method: str
    rate: float
    seed: int

    @property
    def file_name(self) -> str:
        return file_name(self.task, self.size, self.method, f"{self.rate:g}", self.seed)


@cache
def load_task(name: str, directory: Path, scale_name: str) -> Task:
    return TASKS[name](PreTrainedTokenizerFast.from_pretrained(directory), SCALES[scale_name])


def perform(run: Run, directory: Path, scale_name: str, device: str) -> dict[str, Any]:
    """Train, and return the held-out loss and what it took."""
    scale, task = SCALES[scale_name], load_task(run.task, directory / "base", scale_name)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "base")
    base = LlamaForCausalLM.from_pretrained(directory / "base").to(device)
    started = time.monotonic()
    torch.manual_seed(run.seed)
    model = METHODS[run.method].adapt(Setting(base, tokenizer, scale.sizes[run.size], TEXT)).to(device)
    generator = torch.Generator().manual_seed(run.seed)
    train_on(model, task, run.rate, generator, scale, device)
    result = {
        "loss": held_out_loss(model, task.held_out, device),
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "seconds": time.monotonic() - started,
    }
    if run.method == DEFAULT and run.rate == RATE[0]:
        batches = [to(task.draw(generator), device) for _ in range(8)]
        layers = suggest_layers(model, batches, budget=0.5, greedy=True).layers
        prune_layers(model, layers)
        result.update(kept_layers=layers, kept_loss=held_out_loss(model, task.held_out, device))
        train_on(model, task, run.rate, generator, scale, device)
        result.update(retrained_loss=held_out_loss(model, task.held_out, device))
    return result


def train_on(model: Any, task: Task, rate: float, generator: torch.Generator, scale: Scale, device: str) -> None:
    # for all methods but one this is one rate: gates have another
    groups = prefix_plus_param_groups(model, lr=rate)
    train(model, lambda: task.draw(generator), groups, scale.steps, scale.steps // 10, device)


def combinations(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield every task, size and method."""
    for task in options.tasks:
        for size in SCALES[options.scale].sizes:
            for name, method in METHODS.items():
                if size in method.sizes:
                    yield task, size, name


def grid_of(results: Results, task: str, size: str, method: str) -> dict[float, float]:
    """Return the loss for seed 0 at each of the method's learning rates."""
    return {rate: results.loss(Run(task, size, method, rate, seed=0)) for rate in METHODS[method].rates}


# ----------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Row:
    """A method's losses at its best learning rate, by seed."""

    method: str
    rate: float
    losses: list[float]
    parameters: int
    grid: dict[float, float]


def rows(results: Results, options: argparse.Namespace, task: str, size: str) -> list[Row]:
    found = []
    for of_task, of_size, method in combinations(options):
        if (of_task, of_size) == (task, size):
            grid = grid_of(results, task, size, method)
            rate = lowest(grid)
            runs = [Run(task, size, method, rate, seed) for seed in range(options.seeds)]
            losses = [results.loss(run) for run in runs]
            found.append(Row(method, rate, losses, results.of(runs[0])["parameters"], grid))
    return sorted(found, key=lambda row: rank(statistics.mean(row.losses)))


def report(results: Results, options: argparse.Namespace, base_losses: dict[str, float], console: Console) -> None:
    """Print a table for each task and size, and write the same in Markdown."""
    sections = []
    for task in options.tasks:
        for size in SCALES[options.scale].sizes:
            title = f"{task}, about {size} of the parameters (loss of the base model {base_losses[task]:.3f})"
            columns = ["method", "parameters", "best rate", "loss", "spread", "loss by rate (seed 0)"]
            cells = [
                [
                    row.method,
                    f"{row.parameters:,}",
                    f"{row.rate:g}",
                    f"{statistics.mean(row.losses):.3f}",
                    f"{min(row.losses):.3f} to {max(row.losses):.3f}",
                    ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in row.grid.items()),
                ]
                for row in rows(results, options, task, size)
            ]
            sections.append(Section(title, columns, cells))
    for section in sections:
        console.print(section.table())
    write_atomically(str(options.output / "quality.md"), "\n".join(section.markdown() for section in sections))


def report_layers(results: Results, options: argparse.Namespace, console: Console) -> None:
    """Print what is left of the default's loss when `suggest_layers` chooses half of the layers to keep."""
    columns = ["task", "size", "seed", "all layers", "half of them", "ratio", "trained on", "ratio", "kept"]
    section = Section("Half of the layers", columns, [])
    for task, size, method in combinations(options):
        for seed in range(options.seeds if method == DEFAULT else 0):
            result = results.get(Run(task, size, method, RATE[0], seed))
            if result is not None:
                cells = [f"{result['loss']:.3f}"]
                for name in ("kept_loss", "retrained_loss"):
                    cells += [f"{result[name]:.3f}", f"{result[name] / result['loss']:.3f}"]
                section.rows.append([task, size, str(seed), *cells, str(result["kept_layers"])])
    console.print(section.table())


def plot(results: Results, options: argparse.Namespace) -> None:
    """Draw the losses of every method, with the spread over the seeds."""
    from matplotlib.figure import Figure

    sizes = list(SCALES[options.scale].sizes)
    figure = Figure(figsize=(7 * len(sizes), 5 * len(options.tasks)), layout="constrained")
    axes = figure.subplots(len(options.tasks), len(sizes), squeeze=False)
    for line, task in zip(axes, options.tasks, strict=True):
        for axis, size in zip(line, sizes, strict=True):
            found = rows(results, options, task, size)
            label = "held-out loss (mean and range of the seeds)"
            draw_ranges(axis, [row.method for row in found], [row.losses for row in found], label)
            axis.set_title(f"{task}, about {size} of the parameters")
    figure.savefig(options.output / "quality.png", dpi=110)


def main(options: argparse.Namespace) -> None:
    """Perform what has no result yet, and report."""
    results, console = Results(options.output / "runs"), Console()
    base_directory = options.output / "base"
    with progress_bar(console) as progress, process_pool(options.workers) as pool:
        if not (base_directory / "model.safetensors").exists():
            make_base(base_directory, SCALES[options.scale], options.device, progress)
        training = partial(perform, directory=options.output, scale_name=options.scale, device=options.device)
        every_rate = [
            Run(task, size, method, rate, 0)
            for task, size, method in combinations(options)
            for rate in METHODS[method].rates
        ]
        perform_all(every_rate, training, results, pool, progress, "learning rates")
        more_seeds = [
            Run(task, size, method, lowest(grid_of(results, task, size, method)), seed)
            for task, size, method in combinations(options)
            for seed in range(1, options.seeds)
        ]
        perform_all(more_seeds, training, results, pool, progress, "more seeds")
    base = LlamaForCausalLM.from_pretrained(base_directory).to(options.device)
    base_losses = {
        task: held_out_loss(base, load_task(task, base_directory, options.scale).held_out, options.device)
        for task in options.tasks
    }
    report(results, options, base_losses, console)
    report_layers(results, options, console)
    plot(results, options)
    console.print(f"{versions()}. The tables and the figure are in {options.output}.")
