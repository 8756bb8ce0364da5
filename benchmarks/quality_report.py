"""The tables and figures of benchmarks/quality.py."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from rich.table import Table


@dataclass(frozen=True)
class Section:
    """A table with its title, for the console and for a Markdown page."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def table(self) -> Table:
        table = Table(*self.columns, title=self.title)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)]) + "\n"


def draw_ranges(axes: Any, methods: Sequence[str], values: Sequence[Sequence[float]], label: str) -> None:
    """
    Draw a line for each method, the first at the top, with the mean of its values and their range.

    Args:
        axes (`matplotlib.axes.Axes`): Where to draw.
        methods (`Sequence[str]`): The names of the methods; PREFIX_PLUS has a color of its own.
        values (`Sequence[Sequence[float]]`): The values of each method, one per seed.
        label (`str`): What the values are.
    """
    methods, values = methods[::-1], values[::-1]
    means = [statistics.mean(of_method) for of_method in values]
    ranges = [
        [mean - min(of_method) for mean, of_method in zip(means, values, strict=True)],
        [max(of_method) - mean for mean, of_method in zip(means, values, strict=True)],
    ]
    colors = ["tab:blue" if method.startswith("PREFIX_PLUS") else "tab:gray" for method in methods]
    positions = range(len(methods))
    axes.errorbar(means, positions, xerr=ranges, fmt="none", ecolor="black", capsize=3)
    axes.scatter(means, positions, c=colors, zorder=3)
    axes.set_yticks(positions, methods)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)


def versions() -> str:
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"{platform.processor() or platform.machine()}"
    )
