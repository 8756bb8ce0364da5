"""
Command-line options made from the fields of dataclasses, so that each option is defined once.

An option gets its name, type and default from a field, and its help from `metadata["help"]`. `metadata["aliases"]` are further names. With
`metadata["is_argument"]` it is a positional argument, and with `metadata["is_repeatable"]` each use adds one item to a list. The command
receives one instance of each dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from typer.core import TyperCommand

from .errors import CommandError, shown_as_command_error


CONFIG_FILE = "config_file"

Function = TypeVar("Function", bound=Callable[..., None])

NAMES = re.compile(r"[\w.]+(,[\w.]+)*")
"""Matches one or several names, but no other regular expression."""


def command(
    app: typer.Typer,
    groups: dict[str, type[Any]],
    inherited: Sequence[type[Any]] = (),
    has_config_file: bool = False,
) -> Callable[[Function], Function]:
    """
    Return a decorator that makes a function a command of the app. The fields of dataclasses become its options.

    Args:
        app (`typer.Typer`): The app.
        groups (`dict[str, type]`):
            The dataclasses, by the title of their options in the help. The function is called with one instance of each, in
            this order.
        inherited (`Sequence[type]`): Base classes of the dataclasses whose fields do not become options.
        has_config_file (`bool`, defaults to `False`): Whether to offer `--config`, a YAML file with values for the options.

    Returns:
        `Callable`: The decorator. It returns the function unchanged.
    """
    members = {title: _own_fields(group, inherited) for title, group in groups.items()}
    aliases = {
        alias: field.name.replace("_", "-")
        for fields in members.values()
        for field in fields
        for alias in field.metadata.get("aliases", ())
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
        if has_config_file:
            parameters.insert(0, config_file_parameter(aliases))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        names = {"token_normalize_func": lambda name: _option_name(name, aliases)}
        app.command(name=function.__name__, cls=PlainCommand, context_settings=names)(run)
        return function

    return register


def _own_fields(group: type[Any], inherited: Sequence[type[Any]]) -> list[dataclasses.Field[Any]]:
    bases = [base for base in inherited if issubclass(group, base)]
    left_out = {field.name for base in bases for field in dataclasses.fields(base)}
    return [field for field in dataclasses.fields(group) if field.name not in left_out]


def option_parameter(group: type[Any], field: dataclasses.Field[Any], title: str) -> inspect.Parameter:
    """Return a parameter from which typer makes an option (or argument) for a dataclass's field, under a title in the help."""
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
        declared = typer.Option(name, *map("--{}".format, field.metadata.get("aliases", ())), **settings)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, declared],
    )


def _option_name(name: str, aliases: Mapping[str, str]) -> str:
    """Return an option's own name, without leading dashes, from any of its spellings: with underscores, or an alias."""
    name = name.replace("_", "-")
    return aliases.get(name, name)


class PlainCommand(TyperCommand):
    """A command whose help fits a narrow terminal: a name that is too long for its column gets its own line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the usage, the description and the options under their titles."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = getattr(parameter, "rich_help_panel", None) or "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def config_file_parameter(aliases: Mapping[str, str]) -> inspect.Parameter:
    """Return a parameter from which typer makes `--config`, a YAML file with values for the options."""

    def use(context: typer.Context, path: Path | None) -> None:
        if path is not None:
            context.default_map = {
                **(context.default_map or {}),
                **_read_config(path, context.command.params, aliases),
            }

    help_text = "A YAML file with values for the options below. Options on the command line override it."
    option = typer.Option("--config", help=help_text, callback=use, is_eager=True, expose_value=False)
    return inspect.Parameter(
        CONFIG_FILE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, option]
    )


def _read_config(path: Path, parameters: Sequence[Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """
    Read the options' values from a YAML file.

    Raises:
        CommandError: If it cannot be read, is not a mapping, or has an unknown option.
    """
    with shown_as_command_error(OSError, UnicodeDecodeError, yaml.YAMLError, while_doing=f"Cannot read {path}"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CommandError(f"{path}: expected a mapping of options to values, found {type(content).__name__}.")
    known = {parameter.name for parameter in parameters if not parameter.is_eager}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = _option_name(key, aliases).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise CommandError(
                f"{path}: {key!r} is not an option{f'; did you mean {close[0]!r}?' if close else '. See --help'}."
            )
        if name in values:
            raise CommandError(f"{path}: {key!r} gives the option --{name.replace('_', '-')} a second time. Keep one.")
        values[name] = _config_value(f"{path}: {key!r}", value)
    return {name: value for name, value in values.items() if value is not None}


def _config_value(place: str, value: Any) -> Any:
    """Return a value as text of the command line, so that it is parsed and checked in the same way."""
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        return ",".join(map(str, value))
    if value is None or isinstance(value, bool):
        return value if value is None else str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    raise CommandError(f"{place} must be a value or a list of values, found {type(value).__name__}.")


def _alternatives(annotation: Any) -> set[Any]:
    """Return the types that an annotation allows, without `None`, and the values of a `Literal`."""
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
    Return a function that parses an option's text as one of several types.

    Commas separate the items of a list. If a string and a list of strings are both allowed, as for `target_modules`, names are parsed as
    a list, and anything else as a string: a regular expression.

    Args:
        allowed (`set`): The types, and the values of a `Literal`.

    Returns:
        `Callable[[str], Any]`: The function.
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
