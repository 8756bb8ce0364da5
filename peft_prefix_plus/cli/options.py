"""Command-line options made from the fields of dataclasses, so that no option is written down a second time.

A field's name, type, default and `metadata["help"]` become an option's; with `metadata["is_argument"]`, those of an argument,
which is given without its name. With `metadata["is_repeatable"]`, a list's items are given one by one. The command then gets one instance per dataclass.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .errors import shown_as_command_error


Function = TypeVar("Function", bound=Callable[..., None])

NAMES = re.compile(r"[\w.]+(,[\w.]+)*")
"""One or several names, as opposed to a regular expression."""


def command(
    app: typer.Typer, groups: dict[str, type[Any]], inherited: Sequence[type[Any]] = ()
) -> Callable[[Function], Function]:
    """
    Register a function as a command of the app whose options are the fields of dataclasses.

    Args:
        app (`typer.Typer`): The app.
        groups (`dict[str, type]`):
            The dataclasses, by the title above their options in the help. The function is called with one instance of
            each, in this order.
        inherited (`Sequence[type]`): Base classes of theirs whose fields are not to become options.
    """
    left_out = {field.name for base in inherited for field in dataclasses.fields(base)}
    members = {
        title: [field for field in dataclasses.fields(group) if field.name not in left_out]
        for title, group in groups.items()
    }

    def register(function: Function) -> Function:
        def run(**values: Any) -> None:
            instances = []
            for title, group in groups.items():
                with shown_as_command_error(ValueError, TypeError):
                    instances.append(group(**{field.name: values[field.name] for field in members[title]}))
            function(*instances)

        parameters = [
            option_parameter(group, field, title) for title, group in groups.items() for field in members[title]
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        app.command(name=function.__name__)(run)
        return function

    return register


def option_parameter(group: type[Any], field: dataclasses.Field[Any], title: str) -> inspect.Parameter:
    """Return the parameter that makes typer offer a dataclass's field as an option (or argument), in the help under a title."""
    allowed = _alternatives(typing.get_type_hints(group)[field.name])
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    name = f"--{field.name.replace('_', '-')}"
    settings: dict[str, Any] = {"help": field.metadata.get("help"), "rich_help_panel": title}
    annotation: Any = str
    if field.metadata.get("is_repeatable", False):
        (annotation,) = allowed
        default = []
    elif allowed == {bool}:
        annotation, name = bool, f"{name}/--no-{name.removeprefix('--')}"
    elif len(allowed) == 1 and allowed <= {int, float, str, Path}:
        (annotation,) = allowed
    else:
        settings.update(parser=value_parser(allowed), metavar="|".join(sorted(map(_describe, allowed))))
    if default is None:
        annotation = annotation | None
    if field.metadata.get("is_argument", False):
        declared: Any = typer.Argument(**{**settings, "rich_help_panel": None})
    else:
        declared = typer.Option(name, **settings)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, declared],
    )


def _alternatives(annotation: Any) -> set[Any]:
    """Return the types that an annotation allows, without `None`, and the values that stand in a `Literal`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*map(_alternatives, typing.get_args(annotation))) - {type(None)}
    return set(typing.get_args(annotation)) if typing.get_origin(annotation) is typing.Literal else {annotation}


def _describe(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    (item,) = typing.get_args(kind) or (None,)
    return f"{item.__name__},…" if item is not None else str(kind.__name__)


def value_parser(allowed: set[Any]) -> Callable[[str], Any]:
    """
    Return a function that reads an option's text as one of several types.

    Lists are written with commas. Where a string and a list of strings are both allowed, as for `target_modules`, names
    are a list and everything else is a string, a regular expression.
    """

    def parse(text: str) -> Any:
        if not isinstance(text, str):
            return text  # a default
        if bool in allowed and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if list[int] in allowed:
            return _read_integers(text, int in allowed)
        if list[str] in allowed and (str not in allowed or NAMES.fullmatch(text)):
            return text.split(",")
        return text

    return parse


def _read_integers(text: str, may_be_single: bool) -> Any:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected integers with commas between them, got {text!r}") from None
    return numbers[0] if may_be_single and len(numbers) == 1 else numbers
