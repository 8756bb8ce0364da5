"""
The door of the command `prefix-plus`: what it can do, and the call of what it is asked to do.

This module stands outside the package because importing the package imports PEFT and torch, which takes seconds. Nothing is
imported here before a command is called, so that `prefix-plus --help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from typer.core import TyperGroup


EXTRA_PACKAGES = ("rich", "tokenizers", "typer", "yaml")
"""What the extra `cli` installs that every command needs."""

COMMANDS = {
    "train": "Teach a frozen model by a prefix, and save it as an adapter.",
    "distill": "Teach a prefix what a document in the context does, and save it as an adapter.",
    "run": "Run another Python program in which PEFT knows the method.",
    "generate": "Complete prompts with an adapter.",
    "serve": "Serve a model and its adapters by an OpenAI-compatible server, each adapter as a model of its own name.",
    "convert": "Turn an adapter into one of another format with the same output: PEFT's, AdapterHub's, or keys and values.",
    "params": "Count the trainable parameters of every reparameterization and sharing; no weights are needed.",
    "inspect": "Show what the prefix in each layer of an adapter is like and, with data, how much attention it draws.",
    "demo": "Make a small language model, or load one, and teach it table-to-text by a prefix.",
}
"""The commands in the order of the help, each with its line there: the docstring of its function in `peft_prefix_plus.cli.app`."""


class CommandError(Exception):
    """An error that the user can fix: what was found, what was expected, what to do. It is shown as one line."""


def command_group() -> TyperGroup:
    """
    Return the command, which knows its subcommands by their lines in the help and imports them when one is called.

    Raises:
        ModuleNotFoundError: If the extra `cli` is not installed.
    """
    import typer
    from typer.core import TyperCommand, TyperGroup

    class Commands(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return list(COMMANDS)

        def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if args[0] not in COMMANDS:
                return super().resolve_command(ctx, args)  # which says so
            from peft_prefix_plus.cli.app import app

            return typer.main.get_group(app).resolve_command(ctx, args)

    app = typer.Typer(
        cls=Commands,
        help="Prefix tuning for PEFT.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(lambda: None)
    return typer.main.get_group(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command and exit.

    Args:
        arguments (`Sequence[str]`, *optional*): The command line after the command's name; `None` means `sys.argv`'s.

    Raises:
        SystemExit: With 0 if all went well, 1 after an error that the user can fix, 2 after one in the options.
    """
    # transformers 5.23 renames what PEFT 0.21 and older versions of transformers know by this name only
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing(_enable)?` is deprecated", FutureWarning)
    try:
        command_group()(args=None if arguments is None else list(arguments), prog_name="prefix-plus")
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_PACKAGES:
            raise
        sys.exit(
            f"Error: the command prefix-plus needs the package {error.name}, which is not installed. Install what it "
            'needs by: pip install "peft-prefix-plus[cli]"'
        )
    except CommandError as error:
        sys.exit(f"Error: {error}")
