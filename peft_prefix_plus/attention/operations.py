"""The operations that a module's scores may go through on their way from the product of queries and keys to the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


# Operations by their names without underscores: `Tensor.__itruediv__` is "itruediv".
PRODUCTS = {"matmul", "rmatmul", "bmm", "baddbmm"}
SCALINGS = {"mul", "imul", "multiply", "div", "truediv", "itruediv", "divide"}
BIASES = {"add", "radd", "iadd", "masked_fill", "where", "max", "maximum", "clamp"}
RESHAPES = {"view", "reshape", "contiguous", "to", "float", "type", "type_as", "unsqueeze", "squeeze", "clone"}
PROBABILITY_KEEPING = {*RESHAPES, "masked_fill"}
TRANSPOSES = {"transpose", "permute"}
SOFTMAXES = {"softmax", "scaled_dot_product_attention"}


def _known_operations() -> dict[Any, str]:
    """The functions that are called by the names above."""
    known = PRODUCTS | SCALINGS | BIASES | RESHAPES | TRANSPOSES | SOFTMAXES | {"dropout"}
    names = [(owner, name) for owner in (torch, torch.Tensor, nn.functional) for name in dir(owner)]
    functions = {getattr(owner, name): name.strip("_") for owner, name in names if name.strip("_") in known}
    return {function: name for function, name in functions.items() if callable(function)}


OPERATIONS = _known_operations()
"""Their names by function: torch.compile can look a function up, but not handle its name."""


def operation_name(func: Any) -> str:
    """The name of an operation, without underscores; while compiling, empty for one that is not known here."""
    name = OPERATIONS.get(func)
    if name is not None:
        return name
    return "" if torch.compiler.is_compiling() else getattr(func, "__name__", "").strip("_")


def operands(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The two factors of a product."""
    names = {"baddbmm": ("input", "batch1", "batch2"), "bmm": ("input", "mat2")}.get(name, ("input", "other"))
    values = [*args, *(kwargs[each] for each in names[len(args) :] if each in kwargs)]
    if len(values) < 2:
        return None, None
    return (values[1], values[0]) if name == "rmatmul" else (values[-2], values[-1])


def scalar_factor(name: str, args: Any) -> Any:
    """The number that an operation multiplies its first argument with, or `None`."""
    if name not in SCALINGS or len(args) < 2:
        return None
    number = args[1]
    if isinstance(number, torch.Tensor):
        if number.numel() != 1:
            return None
        number = number.reshape(())
    elif not isinstance(number, (int, float)):
        return None
    return 1.0 / number if "div" in name else number
