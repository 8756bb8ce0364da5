"""`prefix-plus inspect`: the size of the prefix in each layer of an adapter, and how much it contributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ..adapters.lookup import layers_with_adapter
from ..insight.contribution import prefix_contribution
from ..insight.plots import plot_prefix_contribution, plot_prefix_norms, plot_training_curve, require_matplotlib
from ..training.checkpoints import checkpoints
from ..training.padding import padding_id
from .errors import CommandError, check_numbers, shown_as_command_error
from .loading import DTYPE_HELP, check_dtype, load_adapted_model, load_config, load_without_base_weights
from .records import Collator, read_records
from .training import encode_all


@dataclass(kw_only=True)
class InspectionSettings:
    """The options of `prefix-plus inspect`; the help texts describe them."""

    adapter: str = field(metadata={"help": "The adapter: a directory or a name on the Hub.", "is_argument": True})
    base: str | None = field(
        default=None,
        metadata={
            "help": "The base model. Default: the one that the adapter names. Its weights are read only with --data."
        },
    )
    data: Path | None = field(
        default=None,
        metadata={"help": "Data as for train; measure how much the prefix contributes to attention on them."},
    )
    plot: Path | None = field(default=None, metadata={"help": "A directory for figures, as PNG files."})
    batch_size: int = field(default=8, metadata={"help": "Records per batch."})
    max_length: int = field(
        default=1024,
        metadata={"help": "The most tokens per record. Long prompts lose their start, long completions their end."},
    )
    dtype: str = field(default="auto", metadata=DTYPE_HELP)

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_numbers(self, 1, "batch_size", "max_length")


class Row(NamedTuple):
    """
    A row of the table: one attention module.

    Attributes:
        module (`str`): Its name.
        shape (`str`): Heads, tokens and dim of the prefix.
        key_rms (`float`): The root mean square of the keys.
        value_rms (`float`): The root mean square of the values.
        gate (`float`, *optional*): The mean absolute gate; `None` without a gate.
        parameters (`int`): The number of parameters in the module.
    """

    module: str
    shape: str
    key_rms: float
    value_rms: float
    gate: float | None
    parameters: int


def inspect(settings: InspectionSettings) -> None:
    """
    Print a table of an adapter's prefix, with a row for each attention module. With `plot`, draw figures too.

    Args:
        settings (`InspectionSettings`): The options.

    Raises:
        CommandError: If the adapter, its base model or the data cannot be read, the figures cannot be written, or matplotlib is missing.
    """
    if settings.plot is not None:
        with shown_as_command_error(ImportError):
            require_matplotlib()
        if settings.plot.exists() and not settings.plot.is_dir():
            raise CommandError(f"--plot must be a directory, {settings.plot} is a file. Give another path.")
    records = read_records(settings.data) if settings.data is not None else None
    task_type = load_config(settings.adapter).task_type
    if task_type not in (None, "CAUSAL_LM"):
        raise CommandError(
            f"{settings.adapter!r} is an adapter for {task_type}; prefix-plus inspects adapters for CAUSAL_LM. Load the model in Python, "
            "and use peft_prefix_plus.prefix_key_values and prefix_contribution."
        )
    contributions = None
    if records is None:
        model = load_without_base_weights(settings.adapter, settings.base, "--base")
    else:
        model, tokenizer = load_adapted_model(settings.adapter, settings.base, settings.dtype, "--base")
        encoded = encode_all(records, tokenizer, settings.max_length, model)
        collate = Collator(padding_id(tokenizer))
        starts = range(0, len(encoded), settings.batch_size)
        contributions = mean_contributions(
            model, [collate(encoded[start : start + settings.batch_size]) for start in starts]
        )
    print_table(settings.adapter, rows_of(model), contributions)
    if settings.plot is not None:
        draw(settings.plot, settings.adapter, model, contributions)


@torch.no_grad()
def rows_of(model: Any, adapter_name: str = "default") -> list[Row]:
    """
    Describe an adapter's prefix in each attention module.

    Args:
        model (`PeftModel`): A model with the adapter.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Returns:
        `list[Row]`: A row for each module.
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


def mean_contributions(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of [`prefix_contribution`] over the real tokens of all batches, (query_heads,) for each module."""
    totals: dict[str, torch.Tensor] = {}
    num_tokens = 0
    for batch in batches:
        inputs: dict[str, Any] = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        tokens = int(batch["attention_mask"].sum())
        num_tokens += tokens
        for name, mean in prefix_contribution(model, **inputs).items():
            totals[name] = totals.get(name, torch.zeros_like(mean)) + mean * tokens
    return {name: total / num_tokens for name, total in totals.items()}


def print_table(adapter: str, rows: Sequence[Row], contributions: dict[str, torch.Tensor] | None) -> None:
    """Print the table. Contributions are shown as the mean and the largest over a module's query heads."""
    has_gate = any(row.gate is not None for row in rows)
    table = Table("module", "heads × tokens × dim", title=adapter)
    numbers = ["key rms", "value rms", *(["gate"] if has_gate else []), "parameters"]
    for title in [*numbers, *(["contribution", "largest"] if contributions is not None else [])]:
        table.add_column(title, justify="right")
    for row in rows:
        cells = [row.module, row.shape, f"{row.key_rms:.4g}", f"{row.value_rms:.4g}"]
        if row.gate is not None:
            cells.append(f"{row.gate:.4g}")
        cells.append(f"{row.parameters:,}")
        if contributions is not None:
            of_heads = contributions.get(row.module)
            cells += ["", ""] if of_heads is None else [f"{of_heads.mean():.1%}", f"{of_heads.max():.1%}"]
        table.add_row(*cells)
    console = Console(soft_wrap=True)
    # as wide as the table, because a narrow terminal or a pipe would cut its cells
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)
    console.print(f"{sum(row.parameters for row in rows):,} parameters in all", highlight=False)


def draw(directory: Path, adapter: str, model: Any, contributions: dict[str, torch.Tensor] | None) -> None:
    """Draw the figures that there are data for, and print their paths."""
    figures = {"prefix_norms": plot_prefix_norms(model)}
    if contributions is not None:
        figures["prefix_contribution"] = plot_prefix_contribution(contributions)
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
