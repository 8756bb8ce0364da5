"""The report of `prefix-plus train`: a table, and a figure of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import Trainer

from ..insight.plots import plot_training_curve, require_matplotlib
from .errors import shown_as_command_error
from .records import EncodedRecord
from .training_settings import TrainingSettings


PLOT = "training_curve.png"


def report(settings: TrainingSettings, trainer: Trainer, dataset: Sequence[EncodedRecord]) -> None:
    """
    Print a summary of a training, and draw its losses into the output directory if matplotlib is installed.

    Args:
        settings (`TrainingSettings`): Its options.
        trainer (`Trainer`): The trainer, after training.
        dataset (`Sequence[EncodedRecord]`): The training data.

    Raises:
        CommandError: If the figure cannot be written.
    """
    table = Table("", show_header=False, title="Training")
    table.add_column(overflow="fold")
    for name, text in summary(settings, trainer, dataset).items():
        table.add_row(name, text)
    plot = draw_losses(settings.output, trainer)
    if plot is not None:
        table.add_row("losses", str(plot))
    Console().print(table)


def summary(settings: TrainingSettings, trainer: Trainer, dataset: Sequence[EncodedRecord]) -> dict[str, str]:
    """Return the rows of the table: names and texts."""
    model: Any = trainer.model
    history = trainer.state.log_history
    trainable, total = model.get_nb_trainable_parameters()
    tokens = sum(len(record.token_ids) for record in dataset)
    lines = {
        "base model": f"{settings.model}, {settings.task_type}",
        "trained": f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        "data": f"{len(dataset):,} records, {tokens:,} tokens",
        "steps": f"{trainer.state.global_step:,}, {trainer.state.epoch or 0:.2f} epochs",
    }
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses:
        lines["training loss"] = f"{losses[0]:.4g} → {losses[-1]:.4g}" if len(losses) > 1 else f"{losses[0]:.4g}"
    for metric, label in (("eval_loss", "evaluation loss"), ("eval_accuracy", "accuracy")):
        values = [entry[metric] for entry in history if metric in entry]
        if values:
            lines[label] = " → ".join(f"{value:.4g}" for value in dict.fromkeys((values[0], values[-1])))
    if trainer.state.best_metric is not None:
        best = Path(trainer.state.best_model_checkpoint or "").name
        lines["best"] = f"{settings.metric_for_best_model} {trainer.state.best_metric:.4g} ({best}), which is saved"
    seconds = sum(entry.get("train_runtime", 0.0) for entry in history)
    lines["time"] = f"{seconds:,.0f} s"
    return lines


def draw_losses(output: Path, trainer: Trainer) -> Path | None:
    """Draw the losses by step, and return the file, or `None` if matplotlib is missing or there is no loss."""
    try:
        require_matplotlib()
        figure = plot_training_curve(trainer.state)
    except (ImportError, ValueError):
        return None
    with shown_as_command_error(OSError, while_doing="Cannot write the figure"):
        figure.savefig(output / PLOT)
    return output / PLOT
