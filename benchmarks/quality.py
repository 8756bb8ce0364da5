"""
How well PREFIX_PLUS learns, against PREFIX_TUNING, CARTRIDGE, prompt tuning, LoRA and full fine-tuning.

A small decoder is trained from scratch on the sources of Python's standard library, and then adapted, frozen, to two tasks:
the language's reference documentation (prose), and sentences that say what a table says. At equal numbers of trainable
parameters and equal steps, each method runs with every learning rate of its own grid, and with the best one for two more
seeds (for the order of the training data, and for the method's own start). The score is the loss on held-out text.

    python benchmarks/quality.py                    # about an hour on 2 cores; what is done is not done again
    python benchmarks/quality.py --tasks table      # a part of it
    python benchmarks/quality.py --scale large --device cuda --workers 1

Every result is a file of its own under --output, so that a run that is broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import CartridgeConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from quality_data import SCALES, TASKS, Batch, Scale, Task, make_base
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peft_prefix_plus import (
    PrefixPlusConfig,
    initialize_from_text,
    prefix_plus_param_groups,
    prune_layers,
    suggest_layers,
)
from peft_prefix_plus.cli.records import IGNORED_LABEL
from peft_prefix_plus.hub import write_atomically


TEXT = (
    "The documentation describes the language. For example, the following statement returns a list of the names.\n"
    * 20
)
"""What the methods that start from a text start from; the methods take as many of its tokens as they have."""


@dataclass(frozen=True)
class Method:
    """
    A way of adapting the base model.

    Attributes:
        adapt: Makes the adapted model of a base model, a tokenizer and the sizes.
        rates: Its grid of learning rates.
        sizes: At which sizes it runs.
    """

    adapt: Callable[[Any, Any, Any], Any]
    rates: tuple[float, ...]
    sizes: tuple[str, ...] = ("0.5 %", "2 %")


def prefix_tuning(**fields: Any) -> Callable[..., Any]:
    def adapt(base: Any, tokenizer: Any, size: Any) -> Any:
        tokens, hidden = size[3] if fields.get("prefix_projection") else (size[0], None)
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=tokens, encoder_hidden_size=hidden, **fields
        )
        return get_peft_model(base, config)

    return adapt


def prefix_tuning_from_text(base: Any, tokenizer: Any, size: Any) -> Any:
    model = prefix_tuning()(base, tokenizer, size)
    initialize_kv_prefix_from_text(model, tokenizer, text=TEXT, use_chat_template=False, max_length=size[0])
    return model


def prefix_tuning_from_zero(base: Any, tokenizer: Any, size: Any) -> Any:
    model = prefix_tuning()(base, tokenizer, size)
    torch.nn.init.zeros_(model.prompt_encoder["default"].embedding.weight)
    return model


def cartridge(base: Any, tokenizer: Any, size: Any) -> Any:
    # its first token is frozen
    model = get_peft_model(base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=size[0] + 1))
    initialize_kv_prefix_from_text(model, tokenizer, text=TEXT, use_chat_template=False, max_length=size[0] + 1)
    return model


def prompt_tuning(base: Any, tokenizer: Any, size: Any) -> Any:
    return get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size[2]))


def lora(base: Any, tokenizer: Any, size: Any) -> Any:
    targets = ["q_proj", "v_proj"]
    return get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=size[1], lora_alpha=size[1], target_modules=targets)
    )


def full_fine_tuning(base: Any, tokenizer: Any, size: Any) -> Any:
    return base


def prefix_plus(**fields: Any) -> Callable[..., Any]:
    def adapt(base: Any, tokenizer: Any, size: Any) -> Any:
        return get_peft_model(base, PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=size[0], **fields))

    return adapt


def prefix_plus_from_text(base: Any, tokenizer: Any, size: Any) -> Any:
    model = prefix_plus(position_free=False)(base, tokenizer, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text is longer than the prefix
        initialize_from_text(model, tokenizer, TEXT)
    return model


RATE = (5e-3,)
"""The one learning rate of all variants of PREFIX_PLUS."""

SMALL = ("0.5 %",)

DEFAULT = "PREFIX_PLUS (default)"

METHODS = {
    DEFAULT: Method(prefix_plus(), (2e-3, *RATE, 1e-2)),
    "PREFIX_PLUS, start: activations": Method(prefix_plus(init_weights="activations"), RATE),
    "PREFIX_PLUS, fixed positions": Method(prefix_plus(position_free=False), (2e-3, *RATE, 1e-2)),
    "PREFIX_PLUS, fixed positions, start: text": Method(prefix_plus_from_text, RATE),
    "PREFIX_PLUS, start: zero": Method(prefix_plus(init_weights="zero"), RATE),
    "PREFIX_PLUS, gating": Method(prefix_plus(gating=True), RATE),
    "PREFIX_PLUS, decoupled": Method(prefix_plus(decoupled=True), RATE),
    "PREFIX_PLUS, linear": Method(prefix_plus(reparameterization="linear", encoder_dim=62), RATE, SMALL),
    "PREFIX_PLUS, mlp": Method(prefix_plus(reparameterization="mlp", encoder_dim=50), RATE, SMALL),
    "PREFIX_PLUS, unscaled": Method(prefix_plus(prefix_scaling=1.0), (0.01, 0.1, 0.3), SMALL),
    "PREFIX_TUNING, random": Method(prefix_tuning(), (0.01, 0.1, 0.3, 0.5)),
    "PREFIX_TUNING, start: zero": Method(prefix_tuning_from_zero, (0.01, 0.1, 0.3, 0.5)),
    "PREFIX_TUNING, start: text": Method(prefix_tuning_from_text, (0.01, 0.1, 0.3, 0.5)),
    "PREFIX_TUNING, projection": Method(prefix_tuning(prefix_projection=True), (3e-3, 1e-2, 3e-2)),
    "CARTRIDGE": Method(cartridge, (0.1, 0.3)),
    "prompt tuning": Method(prompt_tuning, (0.03, 0.3), SMALL),
    "LoRA": Method(lora, (5e-3, 1e-2, 2e-2, 4e-2)),
    "full fine-tuning": Method(full_fine_tuning, (1e-3, 3e-3), SMALL),
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
        name = f"{self.task}-{self.size}-{self.method}-{self.rate:g}-{self.seed}"
        return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name) + ".json"


@cache
def load_task(name: str, directory: Path, scale_name: str) -> Task:
    return TASKS[name](PreTrainedTokenizerFast.from_pretrained(directory), SCALES[scale_name])


def perform(run: Run, directory: Path, scale_name: str, device: str) -> dict[str, Any]:
    """Train, and return the held-out loss and what it took."""
    silence()
    torch.set_num_threads(1)
    scale, task = SCALES[scale_name], load_task(run.task, directory / "base", scale_name)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "base")
    base = LlamaForCausalLM.from_pretrained(directory / "base").to(device)
    started = time.monotonic()
    torch.manual_seed(run.seed)
    model = METHODS[run.method].adapt(base, tokenizer, scale.sizes[run.size]).to(device)
    generator = torch.Generator().manual_seed(run.seed)
    train(model, task, run.rate, generator, scale, device)
    result = {
        "loss": held_out_loss(model, task, device),
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "seconds": time.monotonic() - started,
    }
    if run.method == DEFAULT and run.rate == RATE[0]:
        batches = [to(task.draw(generator), device) for _ in range(8)]
        layers = suggest_layers(model, batches, budget=0.5, greedy=True).layers
        prune_layers(model, layers)
        result.update(kept_layers=layers, kept_loss=held_out_loss(model, task, device))
        train(model, task, run.rate, generator, scale, device)
        result.update(retrained_loss=held_out_loss(model, task, device))
    return result


def train(model: Any, task: Task, rate: float, generator: torch.Generator, scale: Scale, device: str) -> None:
    """Train what is trainable: a warmup over a tenth of the steps, then a linear decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # for all methods but one this is one rate: gates have another
    optimizer = torch.optim.AdamW(prefix_plus_param_groups(model, lr=rate), weight_decay=0.0)
    warmup = scale.steps // 10
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (scale.steps - step) / (scale.steps - warmup))
    )
    model.train()
    for _ in range(scale.steps):
        model(**to(task.draw(generator), device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(model: Any, task: Task, device: str) -> float:
    """Return the mean loss per token that counts."""
    model.eval()
    total = count = 0.0
    for batch in task.held_out:
        num_labels = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        total += float(model(**to(batch, device)).loss) * num_labels
        count += num_labels
    return total / count


def to(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def silence() -> None:
    """Keep libraries from writing between the progress bar's lines."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()


class Results:
    """The results of runs, a file each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, run: Run) -> dict[str, Any] | None:
        path = self.directory / run.file_name
        return json.loads(path.read_text()) if path.exists() else None

    def add(self, run: Run, result: dict[str, Any]) -> None:
        write_atomically(str(self.directory / run.file_name), json.dumps(result))

    def loss(self, run: Run) -> float:
        result = self.get(run)
        assert result is not None, f"{run} has not been performed"
        return float(result["loss"])


def combinations(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield every task, size and method."""
    for task in options.tasks:
        for size in SCALES[options.scale].sizes:
            for name, method in METHODS.items():
                if size in method.sizes:
                    yield task, size, name


def best_rate(results: Results, task: str, size: str, method: str) -> float:
    """Return the learning rate of the method's grid with the lowest loss for seed 0."""
    rates = METHODS[method].rates
    return min(rates, key=lambda rate: results.loss(Run(task, size, method, rate, seed=0)))


def perform_all(
    runs: Sequence[Run], results: Results, options: argparse.Namespace, progress: Progress, name: str
) -> None:
    """Perform the runs that have no result yet, in several processes."""
    missing = [run for run in runs if results.get(run) is None]
    task = progress.add_task(name, total=len(runs), completed=len(runs) - len(missing))
    if not missing:
        return
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        arguments = (options.output, options.scale, options.device)
        pending = {pool.submit(perform, run, *arguments): run for run in missing}
        for future in as_completed(pending):
            results.add(pending[future], future.result())
            progress.advance(task)


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
            rate = best_rate(results, task, size, method)
            runs = [Run(task, size, method, rate, seed) for seed in range(options.seeds)]
            grid = {rate: results.loss(Run(task, size, method, rate, 0)) for rate in METHODS[method].rates}
            first = results.get(runs[0])
            assert first is not None
            found.append(Row(method, rate, [results.loss(run) for run in runs], first["parameters"], grid))
    return sorted(found, key=lambda row: statistics.mean(row.losses))


def report(results: Results, options: argparse.Namespace, base_losses: dict[str, float], console: Console) -> None:
    """Print a table for each task and size, and write the same in Markdown."""
    lines = []
    for task in options.tasks:
        for size in SCALES[options.scale].sizes:
            title = f"{task}, about {size} of the parameters (loss of the base model {base_losses[task]:.3f})"
            columns = ["method", "parameters", "best rate", "loss", "spread", "loss by rate (seed 0)"]
            table = Table(*columns, title=title)
            lines += ["", f"### {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            for row in rows(results, options, task, size):
                spread = f"{min(row.losses):.3f} to {max(row.losses):.3f}"
                grid = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in row.grid.items())
                cells = [row.method, f"{row.parameters:,}", f"{row.rate:g}"]
                cells += [f"{statistics.mean(row.losses):.3f}", spread, grid]
                table.add_row(*cells)
                lines.append(f"| {' | '.join(cells)} |")
            console.print(table)
    write_atomically(str(options.output / "quality.md"), "\n".join(lines[1:]) + "\n")


def report_layers(results: Results, options: argparse.Namespace, console: Console) -> None:
    """Print what is left of the default's loss when `suggest_layers` chooses half of the layers to keep."""
    columns = ["task", "size", "seed", "all layers", "half of them", "ratio", "trained on", "ratio", "kept"]
    table = Table(*columns, title="Half of the layers")
    for task, size, method in combinations(options):
        for seed in range(options.seeds if method == DEFAULT else 0):
            result = results.get(Run(task, size, method, RATE[0], seed))
            if result is not None:
                cells = [f"{result['loss']:.3f}"]
                for name in ("kept_loss", "retrained_loss"):
                    cells += [f"{result[name]:.3f}", f"{result[name] / result['loss']:.3f}"]
                table.add_row(task, size, str(seed), *cells, str(result["kept_layers"]))
    console.print(table)


def plot(results: Results, options: argparse.Namespace) -> None:
    """Draw the losses of every method, with the spread over the seeds."""
    from matplotlib.figure import Figure

    sizes = list(SCALES[options.scale].sizes)
    figure = Figure(figsize=(7 * len(sizes), 5 * len(options.tasks)), layout="constrained")
    axes = figure.subplots(len(options.tasks), len(sizes), squeeze=False)
    for line, task in zip(axes, options.tasks, strict=True):
        for axis, size in zip(line, sizes, strict=True):
            found = rows(results, options, task, size)[::-1]
            means = [statistics.mean(row.losses) for row in found]
            spread = [
                [mean - min(row.losses) for mean, row in zip(means, found, strict=True)],
                [max(row.losses) - mean for mean, row in zip(means, found, strict=True)],
            ]
            colors = ["tab:blue" if row.method.startswith("PREFIX_PLUS") else "tab:gray" for row in found]
            positions = range(len(found))
            axis.errorbar(means, positions, xerr=spread, fmt="none", ecolor="black", capsize=3)
            axis.scatter(means, positions, c=colors, zorder=3)
            axis.set_yticks(positions, [row.method for row in found])
            axis.set_title(f"{task}, about {size} of the parameters")
            axis.set_xlabel("held-out loss (mean and range of the seeds)")
            axis.grid(axis="x", alpha=0.3)
    figure.savefig(options.output / "quality.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quality-output"), help="where results go")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trainings at the same time")
    options = parser.parse_args()
    silence()
    options.output.mkdir(parents=True, exist_ok=True)
    results, console = Results(options.output / "runs"), Console()
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        if not (options.output / "base" / "model.safetensors").exists():
            make_base(options.output / "base", SCALES[options.scale], options.device, progress)
        grid = [
            Run(task, size, method, rate, 0)
            for task, size, method in combinations(options)
            for rate in METHODS[method].rates
        ]
        perform_all(grid, results, options, progress, "learning rates")
        repeated = [
            Run(task, size, method, best_rate(results, task, size, method), seed)
            for task, size, method in combinations(options)
            for seed in range(1, options.seeds)
        ]
        perform_all(repeated, results, options, progress, "more seeds")
    base = LlamaForCausalLM.from_pretrained(options.output / "base").to(options.device)
    base_losses = {
        task: held_out_loss(base, load_task(task, options.output / "base", options.scale), options.device)
        for task in options.tasks
    }
    report(results, options, base_losses, console)
    report_layers(results, options, console)
    plot(results, options)
    console.print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"{platform.processor() or platform.machine()}. The tables and the figure are in {options.output}."
    )


if __name__ == "__main__":
    main()
