"""Fitting an adapter's encoders to given keys and values, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..encoders import DirectEncoder, PrefixEncoder, ProjectedEncoder


KeyValue = tuple[torch.Tensor, torch.Tensor]


class Residual(NamedTuple):
    """
    How far an attention module's prefix is from the keys and values that it was fitted to: the norm of the difference,
    relative to the norm of the target.
    """

    key: float
    value: float


def repeated(states: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the last `num_tokens` of keys or values (heads, tokens, dim), repeated if there are fewer."""
    available = states.shape[1]
    return states[:, -num_tokens:][:, torch.arange(num_tokens, device=states.device) % min(available, num_tokens)]


@torch.no_grad()
def fit(encoders: Mapping[str, PrefixEncoder], targets: Mapping[str, KeyValue]) -> dict[str, Residual]:
    """
    Give encoders the parameters whose output is closest to the targets.

    - `"none"` produces the targets themselves.
    - `"linear"` minimizes the squared error on the scale of the parameters (divided by the scaling), with equal weight
      for the keys and the values of a projection. The learned inputs P' are the left singular vectors of the targets
      of all layers, stacked according to what the layers share, and the projection follows by least squares. With as
      many columns in P' as there are rows, the fit is exact.
    - `"mlp"` has a random hidden layer; its learned inputs and last layer are fitted in the same way.
    - `"log"` cannot be fitted: it learns a distance from a start of its own.

    Args:
        encoders (`Mapping[str, PrefixEncoder]`): All encoders of an adapter, by module name.
        targets (`Mapping[str, KeyValue]`): For each, the keys (heads, tokens, key_dim) and values (heads, tokens,
            value_dim).

    Returns:
        `dict[str, Residual]`: The residuals, by module name.

    Raises:
        ValueError: If the reparameterization cannot be fitted.
    """
    projected: dict[str, ProjectedEncoder] = {}
    misfits = {type(each) for each in encoders.values() if not isinstance(each, (DirectEncoder, ProjectedEncoder))}
    if misfits:
        raise ValueError(
            f"This adapter's reparameterization ({misfits.pop().__name__}) cannot be fitted to given keys and values. Use "
            "reparameterization='none', which holds any, or start by `init_weights`."
        )
    for encoder in encoders.values():
        encoder.initialize_parameters(0.0, 0.0)
    for name, encoder in encoders.items():
        if isinstance(encoder, DirectEncoder):
            key, value = targets[name]
            key_factor, value_factor = encoder.scaling.values.tolist()
            encoder.key.copy_(key.to(encoder.key.device) / key_factor)
            encoder.value.copy_(value.to(encoder.value.device) / value_factor)
        elif isinstance(encoder, ProjectedEncoder):
            projected[name] = encoder
    if projected:
        _fit_projections(projected, targets)
    return {name: _residual(encoder(), targets[name]) for name, encoder in encoders.items()}


@dataclass(frozen=True)
class _Cell:
    """One module in the grid whose rows share P' and whose columns share the projection."""

    encoder: ProjectedEncoder
    target: torch.Tensor  # (tokens, size), unscaled, in float64 on the CPU


def _fit_projections(encoders: Mapping[str, ProjectedEncoder], targets: Mapping[str, KeyValue]) -> None:
    cells = [_Cell(encoder, _unscaled(encoder, *targets[name])) for name, encoder in encoders.items()]
    for component in _connected(cells):
        _fit_inputs(component)
    for group in _grouped(cells, "output"):
        _fit_output(group)


def _unscaled(encoder: ProjectedEncoder, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    key_factor, value_factor = encoder.scaling.values.tolist()
    return encoder.shape.join(key.cpu().double() / key_factor, value.cpu().double() / value_factor)


def _grouped(cells: Iterable[_Cell], part: str) -> list[list[_Cell]]:
    """Group the cells that share a part."""
    groups: dict[nn.Module, list[_Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.encoder.part(part), []).append(cell)
    return list(groups.values())


def _connected(cells: list[_Cell]) -> list[list[_Cell]]:
    """Group the cells that share P', or the projection, or both."""
    by_inputs, by_output = _grouped(cells, "virtual_tokens"), _grouped(cells, "output")
    # layers share P' under one sharing, the projection under another, and under a third both: never in a chain
    return by_inputs if len(by_inputs) <= len(by_output) else by_output


def _fit_inputs(component: list[_Cell]) -> None:
    """
    Set the learned inputs of a component to the leading left singular vectors of its targets, if there are too many
    rows.
    """
    rows = _grouped(component, "virtual_tokens")
    matrix = _balanced(torch.cat([_wanted(row) for row in rows]), _grouped(rows[0], "output"))
    weights = [row[0].encoder.part("virtual_tokens").weight for row in rows]
    width, num_rows = weights[0].shape[1], matrix.shape[0]
    if num_rows <= width:
        return  # any full set of inputs can be projected onto the targets exactly: those at random are one
    inputs = torch.linalg.svd(matrix, full_matrices=False).U[:, :width] * num_rows**0.5
    inputs = inputs * weights[0].double().square().mean().sqrt().item()  # which a single number has too
    for weight, part in zip(weights, inputs.split(weights[0].shape[0]), strict=True):
        weight[:, : part.shape[1]].copy_(part)


def _wanted(row: list[_Cell]) -> torch.Tensor:
    """The targets of cells that share P', side by side: the mean of those that share the projection as well."""
    groups = _grouped(row, "output")
    return torch.cat([torch.stack([cell.target for cell in group]).mean(dim=0) for group in groups], dim=1)


def _balanced(matrix: torch.Tensor, groups: list[list[_Cell]]) -> torch.Tensor:
    """
    Scale the keys of every projection, and the values, to norm 1. Only whole columns may be scaled, which does not
    change the least squares that finds the projection.
    """
    blocks = matrix.split([group[0].encoder.shape.size for group in groups], dim=1)
    shapes = [group[0].encoder.shape for group in groups]
    parts = [part for block, shape in zip(blocks, shapes, strict=True) for part in shape.split_columns(block)]
    return torch.cat([part / (part.norm() or 1.0) for part in parts], dim=1)


def _fit_output(group: list[_Cell]) -> None:
    """Set a projection by least squares on what it reads."""
    output = group[0].encoder.part("output")
    features = torch.cat([cell.encoder.features().cpu().double() for cell in group])
    wanted = torch.cat([cell.target for cell in group])
    if output.bias is not None:
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    solution = torch.linalg.pinv(features) @ wanted
    output.weight.copy_(solution[: output.in_features].T)
    if output.bias is not None:
        output.bias.copy_(solution[-1])


def _residual(produced: KeyValue, target: KeyValue) -> Residual:
    return Residual(*(_relative_error(*pair) for pair in zip(produced, target, strict=True)))


def _relative_error(produced: torch.Tensor, target: torch.Tensor) -> float:
    target = target.double().cpu()
    norm = target.norm().item()
    return (produced.double().cpu() - target).norm().item() / (norm or 1.0)
