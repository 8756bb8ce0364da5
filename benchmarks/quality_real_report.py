"""The table, the Markdown page and the figure of benchmarks/quality.py on a real model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_report import Section, draw_ranges, versions
from quality_runs import rank
from rich.console import Console

from peft_prefix_plus.saving.files import write_atomically


@dataclass(frozen=True)
class MethodResult:
    """
    What has been measured of a method on a task.

    Attributes:
        method: Its name.
        rate: The learning rate with the lowest loss.
        of_seeds: The results with that rate, one for each seed.
        grid: The loss for seed 0 at each learning rate.
    """

    method: str
    rate: float
    of_seeds: list[dict[str, Any]]
    grid: dict[float, float]

    def values(self, name: str) -> list[float]:
        return [float(result[name]) for result in self.of_seeds]

    def mean(self, name: str) -> float:
        return statistics.mean(self.values(name))

    def spread(self, name: str, digits: int) -> str:
        values = self.values(name)
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


@dataclass(frozen=True)
class TaskResult:
    """
    What has been measured on a task.

    Attributes:
        task: Its name.
        score: What its answers are measured by.
        base: The result of the base model.
        methods: Those of the methods.
    """

    task: str
    score: str
    base: dict[str, Any]
    methods: list[MethodResult]

    def ranking(self) -> list[MethodResult]:
        """Return the methods' results, the lowest loss first."""
        return sorted(self.methods, key=lambda result: rank(result.mean("loss")))


def section(result: TaskResult, model: str) -> Section:
    """Return the table of a task: the base model first, then the methods, the lowest loss first."""
    columns = ["method", "parameters", "best rate", "loss before the first step (ratio to the base model's)"]
    columns += ["loss", "spread", result.score, "spread", "loss on unrelated text, before → after"]
    columns += ["s per step", "peak MiB of a step", "loss by rate (seed 0)"]
    base, before = result.base, f"{result.base['unrelated_loss']:.3f}"
    first = [
        "base model",
        "",
        "",
        f"{base['first_loss']:.3f}",
        f"{base['loss']:.3f}",
        "",
        f"{base['score']:.1f}",
        "",
        before,
    ]
    rows = [[*first, "", "", ""]]
    for row in result.ranking():
        first_loss = row.mean("first_loss")
        rows.append(
            [
                row.method,
                f"{row.of_seeds[0]['parameters']:,}",
                f"{row.rate:g}",
                f"{first_loss:.3f} ({first_loss / base['first_loss']:.3f})",
                f"{row.mean('loss'):.3f}",
                row.spread("loss", 3),
                f"{row.mean('score'):.1f}",
                row.spread("score", 1),
                f"{before} → {row.mean('unrelated_loss'):.3f}",
                f"{statistics.median(row.values('seconds_per_step')):.2f}",
                f"{statistics.median(row.values('peak_bytes')) / 2**20:.0f}",
                ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in row.grid.items()),
            ]
        )
    return Section(f"{result.task}, {model}", columns, rows)


def plot(path: Path, results: Sequence[TaskResult]) -> None:
    """Draw the loss of every method on every task, with the spread over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 3.6), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, result in zip(axes, results, strict=True):
        ranking = result.ranking()
        draw_ranges(axis, [row.method for row in ranking], [row.values("loss") for row in ranking], "held-out loss")
        axis.set_title(f"{result.task} (base model: {result.base['loss']:.2f})")
    figure.savefig(path, dpi=110)


def report(output: Path, model: str, results: Sequence[TaskResult], console: Console) -> None:
    """
    Print a table for each task, and write the same in Markdown and as a figure.

    Args:
        output (`Path`): The folder for `quality.md` and `quality.png`.
        model (`str`): The base model.
        results (`Sequence[TaskResult]`): What has been measured.
        console (`Console`): Where to print.
    """
    sections = [section(result, model) for result in results]
    for of_task in sections:
        console.print(of_task.table())
    write_atomically(str(output / "quality.md"), "\n".join(of_task.markdown() for of_task in sections))
    plot(output / "quality.png", results)
    console.print(f"{versions()}. The tables and the figure are in {output}.")
