"""
The entry point of the command `prefix-plus`: the list of its commands, and their calls.

This module is outside of the package, because importing the package imports PEFT and torch, which takes seconds. It imports the package
only when a command is called, so `prefix-plus --help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from typer.core import TyperGroup


EXTRA_PACKAGES = ("rich", "tokenizers", "typer", "yaml")
"""The packages of the extra `cli` that every command needs."""

COMMANDS = {
    "train": "Train a prefix for a frozen model, and save it as an adapter.",
    "distill": "Train a prefix to replace a document in the context, and save it as an adapter.",
    "run": "Run another Python program with the method known to PEFT.",
    "generate": "Complete prompts with an adapter.",
    "serve": "Serve a model and its adapters with an OpenAI-compatible server, each adapter as a model with its own name.",
    "convert": "Convert an adapter to another format with the same output: PEFT's, AdapterHub's, or keys and values.",
    "params": "Count the trainable parameters of every reparameterization and sharing, without a model's weights.",
    "inspect": "Show the size of the prefix in each layer of an adapter and, with data, how much it contributes.",
    "demo": "Train a small language model, or load one, and train a prefix for table-to-text.",
}
"""The commands in the order of the help, with their descriptions: the docstrings of their functions in `peft_prefix_plus.cli.app`."""


class CommandError(Exception):
    """An error that the user can fix. The command shows its message as one line, without a traceback."""


def command_group() -> TyperGroup:
    """
    Return the command. It knows the descriptions of its subcommands, and imports them when one is called.

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
