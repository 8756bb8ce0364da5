"""Figures of a prefix and of its training. They need matplotlib, the extra `plot`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..conversion.flatten import prefix_key_values
from ..saving.reading import read_fields


if TYPE_CHECKING:
    from matplotlib.figure import Figure


HEIGHT_OF_ROW = 0.28
"""Inches per attention module."""


def plot_attention_mass(masses: Mapping[str, torch.Tensor]) -> Figure:
    """
    Plot the result of [`prefix_attention_mass`]: a row for each attention module, a column for each of its query
    heads.

    Args:
        masses (`dict[str, torch.Tensor]`): The mass of each query head, (query_heads,), by module.

    Returns:
        `matplotlib.figure.Figure`: A heatmap from 0 to 1; cells of heads that a module does not have are empty.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no masses.
    """
    if not masses:
        raise ValueError("`masses` is empty; pass the result of prefix_attention_mass.")
    return _heads(masses, "attention on the prefix")


def plot_prefix_contribution(contributions: Mapping[str, torch.Tensor]) -> Figure:
    """
    Plot the result of [`prefix_contribution`]: a row for each attention module, a column for each of its query heads.

    Args:
        contributions (`dict[str, torch.Tensor]`): The contribution in each query head, (query_heads,), by module.

    Returns:
        `matplotlib.figure.Figure`: A heatmap from 0 to 1; cells of heads that a module does not have are empty.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no contributions.
    """
    if not contributions:
        raise ValueError("`contributions` is empty; pass the result of prefix_contribution.")
    return _heads(contributions, "contribution of the prefix")


def plot_prefix_norms(model: nn.Module, adapter_name: str = "default") -> Figure:
    """
    Plot the norms of a prefix: a row for each attention module, a column for each virtual token.

    A cell is the norm over heads and dimensions. Keys and values have a heatmap each.

    Args:
        model (`nn.Module`): A model with the adapter.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Returns:
        `matplotlib.figure.Figure`: The heatmaps of keys and of values.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the model has no such adapter.
    """
    prefixes = prefix_key_values(model, adapter_name)
    figure = _figure(2, len(prefixes))
    both = figure.subplots(1, 2, sharey=True)
    for index, (axes, title) in enumerate(zip(both, ("keys", "values"), strict=True)):
        norms = {name: pair[index].float().square().sum(dim=(0, 2)).sqrt() for name, pair in prefixes.items()}
        image = _heatmap(axes, norms, vmin=0.0)
        axes.set_title(title)
        axes.set_xlabel("virtual token")
        figure.colorbar(image, ax=axes, label="norm")
    return figure


def plot_training_curve(state: Any) -> Figure:
    """
    Plot the training loss by step and, if there is one, the evaluation loss.

    Args:
        state: A `TrainerState`, the path of a `trainer_state.json`, or the list of dicts that both hold as `log_history`.

    Returns:
        `matplotlib.figure.Figure`: The curves.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If the state is none of these.
        ValueError: If it has no loss.
    """
    history = _log_history(state)
    curves = {}
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
        if points:
            curves[label] = points
    if not curves:
        raise ValueError(
            f"The log has {len(history)} entries and none with 'step' and 'loss' or 'eval_loss'. Train with logging: set "
            "`logging_steps` to at most the number of steps."
        )
    figure = _figure(1, 14)
    axes = figure.subplots()
    for label, points in curves.items():
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, marker="." if len(points) < 50 else None, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    return figure


def _log_history(state: Any) -> list[dict[str, float]]:
    if isinstance(state, (str, os.PathLike)):
        loaded = read_fields(state)
        if "log_history" not in loaded:
            raise ValueError(
                f"{state} has no 'log_history'; expected the trainer_state.json of a Trainer's checkpoint."
            )
        return list(loaded["log_history"])
    history = getattr(state, "log_history", state)
    is_log = isinstance(history, Sequence) and all(isinstance(entry, Mapping) for entry in history)
    if not is_log:
        raise TypeError(
            f"`state` must be a TrainerState, the path of a trainer_state.json or a list of dicts, got {type(state).__name__}."
        )
    return [dict(entry) for entry in history]


def require_matplotlib() -> type[Figure]:
    """
    Return matplotlib's class of figures.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Figures need matplotlib, which is not installed. Install with: pip install "peft-prefix-plus[plot]"'
        ) from error
    return Figure


def _figure(num_columns: int, num_rows: int) -> Figure:
    """Make an empty figure, without pyplot, which would keep it and need a display."""
    size = (2.5 + 4.0 * num_columns, max(2.5, 1.2 + HEIGHT_OF_ROW * num_rows))
    return require_matplotlib()(figsize=size, layout="constrained")


def _heads(measured: Mapping[str, torch.Tensor], label: str) -> Figure:
    """Draw numbers from 0 to 1 of the query heads of attention modules."""
    figure = _figure(1, len(measured))
    axes = figure.subplots()
    image = _heatmap(axes, measured, vmin=0.0, vmax=1.0)
    axes.set_xlabel("query head")
    figure.colorbar(image, ax=axes, label=label)
    return figure


def _heatmap(axes: Any, rows: Mapping[str, torch.Tensor], **limits: float) -> Any:
    """Draw a row of cells for each name; shorter rows end in empty cells."""
    width = max(len(row) for row in rows.values())
    cells = torch.full((len(rows), width), torch.nan)
    for index, row in enumerate(rows.values()):
        cells[index, : len(row)] = row.float()
    image = axes.imshow(cells.numpy(), aspect="auto", interpolation="nearest", **limits)
    axes.set_yticks(range(len(rows)), labels=list(rows))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return image
