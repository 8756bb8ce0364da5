"""`prefix-plus run`: run another Python program in this process, where PEFT knows the method."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .errors import CommandError, shown_as_command_error


def run_program(program: str, arguments: Sequence[str], is_module: bool = False) -> None:
    """
    Run a program as Python would, and end the process with its exit code.

    Args:
        program (`str`): A Python file or folder, or the name of a command that a Python package installs.
        arguments (`Sequence[str]`): Its arguments.
        is_module (`bool`, defaults to `False`): Whether the program is the name of a module, as after `python -m`.

    Raises:
        CommandError: If there is no such program.
        SystemExit: When the program ends.
    """
    before = sys.argv, list(sys.path)
    try:
        start = _module(program) if is_module else _file(program) or _command(program)
        sys.argv = [program, *arguments]
        _end_with(start)
    finally:
        sys.argv, sys.path[:] = before


def _end_with(start: Callable[[], Any]) -> None:
    """Run a program, and exit as Python does."""
    try:
        sys.exit(start())
    except Exception:  # noqa: BLE001 (as at the end of any Python program, not as an error of this command)
        traceback.print_exc()
        sys.exit(1)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.exit(130)


def _module(name: str) -> Callable[[], Any]:
    sys.path[0] = os.getcwd()
    with shown_as_command_error(ImportError, ValueError, while_doing=f"Cannot run the module {name!r}"):
        found = importlib.util.find_spec(name)
    if found is None:
        raise CommandError(f"Cannot run the module {name!r}: it is not installed. Install it, or correct the name.")

    def start() -> None:
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return start


def _file(program: str) -> Callable[[], Any] | None:
    """Return a function that runs a file, or a folder with a `__main__.py`; `None` if the path does not exist."""
    path = Path(program)
    if not path.exists():
        return None
    if path.is_file():
        sys.path[0] = str(path.resolve().parent)

    def start() -> None:
        runpy.run_path(program, run_name="__main__")

    return start


def _command(name: str) -> Callable[[], Any]:
    """Return the function that an installed command calls."""
    commands = list(entry_points(group="console_scripts", name=name))
    if commands:
        return lambda: commands[0].load()()
    other = shutil.which(name)
    reason = (
        f"{other} is not a command of a Python package in this environment" if other else "there is no such command"
    )
    raise CommandError(
        f"Cannot run {name!r}: expected a Python file, or a command of an installed Python package; {reason}. "
        "To run a module: prefix-plus run -m MODULE"
    )
