"""`prefix-plus inspect`: what the prefix in each layer of an adapter is like, and how much attention it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ..adapters.lookup import layers_with_adapter
from ..insight.attention_mass import prefix_attention_mass
from ..insight.plots import plot_attention_mass, plot_prefix_norms, plot_training_curve, require_matplotlib
from ..training.checkpoints import checkpoints
from .errors import CommandError, check_numbers, shown_as_command_error
from .loading import check_dtype, load_adapted_model, load_config, load_without_base_weights
from .records import Collator, padding_id, read_records
from .training import encode_all


@dataclass(kw_only=True)
class InspectionSettings:
    """Which adapter to look at, and on what data. The fields' help texts say the rest."""

    adapter: str = field(metadata={"help": "The adapter: a directory or a name on the Hub.", "is_argument": True})
    base: str | None = field(
        default=None,
        metadata={
            "help": "The base model, if it is not where the adapter says; without --data its weights are not read."
        },
    )
    data: Path | None = field(
        default=None,
        metadata={"help": "JSON lines as for train; the attention that the prefix draws on them is measured."},
    )
    plot: Path | None = field(default=None, metadata={"help": "A directory to draw figures into, as PNG files."})
    batch_size: int = field(default=8, metadata={"help": "Records at a time."})
    max_length: int = field(
        default=1024, metadata={"help": "The most tokens per record: prompts lose their start, completions their end."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "The base model's dtype: auto, float32, bfloat16 or float16."}
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_numbers(self, 1, "batch_size", "max_length")


class Row(NamedTuple):
    """What is shown of one attention module; `gate` is None without a gate."""

    module: str
    shape: str
    key_rms: float
    value_rms: float
    gate: float | None
    parameters: int


def inspect(settings: InspectionSettings) -> None:
    """
    Print a table of an adapter's prefix, a line for each attention module, and draw figures if asked to.

    Args:
        settings (`InspectionSettings`): Which adapter to look at, and on what data.

    Raises:
        CommandError: If a name, a file or the directory for the figures is not as it must be, or matplotlib is missing.
    """
    if settings.plot is not None:
        with shown_as_command_error(ImportError):
            require_matplotlib()
        if settings.plot.exists() and not settings.plot.is_dir():
            raise CommandError(f"--plot must be a directory, {settings.plot} is a file.")
    records = read_records(settings.data) if settings.data is not None else None
    task_type = load_config(settings.adapter).task_type
    if task_type not in (None, "CAUSAL_LM"):
        raise CommandError(
            f"{settings.adapter!r} is an adapter for {task_type}; prefix-plus looks into those of causal language models. Use "
            "peft_prefix_plus.prefix_key_values and prefix_attention_mass on the loaded model."
        )
    masses = None
    if records is None:
        model = load_without_base_weights(settings.adapter, settings.base, "--base")
    else:
        model, tokenizer = load_adapted_model(settings.adapter, settings.base, settings.dtype, "--base")
        encoded = encode_all(records, tokenizer, settings.max_length, model)
        collate = Collator(padding_id(tokenizer))
        starts = range(0, len(encoded), settings.batch_size)
        masses = mean_masses(model, [collate(encoded[start : start + settings.batch_size]) for start in starts])
    print_table(settings.adapter, rows_of(model), masses)
    if settings.plot is not None:
        draw(settings.plot, settings.adapter, model, masses)


@torch.no_grad()
def rows_of(model: Any, adapter_name: str = "default") -> list[Row]:
    """
    Describe an adapter's prefix in each attention module.

    Args:
        model: A model with the adapter.
        adapter_name (`str`, defaults to `"default"`): The adapter.
    """
    rows = []
    for name, layer in layers_with_adapter(model, adapter_name):
        key, value = layer.prefix_key_value(adapter_name)
        dims = f"{key.shape[2]}" if key.shape[2] == value.shape[2] else f"{key.shape[2]}/{value.shape[2]}"
        gate = layer.prefix_plus_gate(adapter_name)
        rows.append(
            Row(
                module=name,
                shape=f"{key.shape[0]} × {key.shape[1]} × {dims}",
                key_rms=key.float().square().mean().sqrt().item(),
                value_rms=value.float().square().mean().sqrt().item(),
                gate=None if gate is None else gate.tanh().abs().mean().item(),
                parameters=sum(parameter.numel() for parameter in layer.adapter_parameters(adapter_name)),
            )
        )
    return rows


def mean_masses(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The attention that the prefix draws, (query_heads,) for each module: the mean over the real tokens of all batches."""
    totals: dict[str, torch.Tensor] = {}
    num_tokens = 0
    for batch in batches:
        inputs: dict[str, Any] = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        tokens = int(batch["attention_mask"].sum())
        num_tokens += tokens
        for name, mass in prefix_attention_mass(model, **inputs).items():
            totals[name] = totals.get(name, torch.zeros_like(mass)) + mass * tokens
    return {name: total / num_tokens for name, total in totals.items()}


def print_table(adapter: str, rows: Sequence[Row], masses: dict[str, torch.Tensor] | None) -> None:
    """Print what was found; the attention is the mean over a module's query heads and the largest of them."""
    has_gate = any(row.gate is not None for row in rows)
    table = Table("module", "heads × tokens × dim", title=adapter)
    numbers = ["key rms", "value rms", *(["gate"] if has_gate else []), "parameters"]
    for title in [*numbers, *(["attention", "largest"] if masses is not None else [])]:
        table.add_column(title, justify="right")
    for row in rows:
        cells = [row.module, row.shape, f"{row.key_rms:.4g}", f"{row.value_rms:.4g}"]
        if row.gate is not None:
            cells.append(f"{row.gate:.4g}")
        cells.append(f"{row.parameters:,}")
        if masses is not None:
            mass = masses.get(row.module)
            cells += ["", ""] if mass is None else [f"{mass.mean():.1%}", f"{mass.max():.1%}"]
        table.add_row(*cells)
    console = Console(soft_wrap=True)
    # as wide as it must be: in a narrow terminal, and in a pipe, the cells would be cut
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)
    console.print(f"{sum(row.parameters for row in rows):,} parameters in all", highlight=False)


def draw(directory: Path, adapter: str, model: Any, masses: dict[str, torch.Tensor] | None) -> None:
    """Write the figures that there are data for, and say which."""
    figures = {"prefix_norms": plot_prefix_norms(model)}
    if masses is not None:
        figures["attention_mass"] = plot_attention_mass(masses)
    states = [path / "trainer_state.json" for path in (*checkpoints(Path(adapter), complete_only=True), Path(adapter))]
    states = [path for path in states if path.is_file()]
    if states:
        try:
            figures["training_curve"] = plot_training_curve(states[-1])
        except ValueError as error:
            print(f"No training curve: {error}")
    with shown_as_command_error(OSError, while_doing="Cannot write the figures"):
        directory.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(directory / f"{name}.png")
            print(f"{directory / f'{name}.png'}")
