"""`prefix-plus --help` answers at once, because it imports nothing that a command needs."""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_prefix_plus_cli


ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from peft_prefix_plus_cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(json.dumps([stop.code, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def run(*arguments: str) -> tuple[str, int, set[str]]:
    """Run the command in a new process; return what it prints, its exit code, and the packages that it has imported."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *printed, last = result.stdout.splitlines()
    code, modules = json.loads(last)
    return "\n".join([*printed, result.stderr]), code, set(modules)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["no-such-command"], 2)])
def test_the_help_imports_nothing_heavy(arguments: list[str], code: int) -> None:
    printed, found, modules = run(*arguments)
    assert found == code and "prefix-plus" in printed
    assert {"torch", "transformers", "peft", "numpy", "huggingface_hub", "peft_prefix_plus"}.isdisjoint(modules)


def test_the_help_names_every_command_with_its_docstring() -> None:
    app = pytest.importorskip("peft_prefix_plus.cli.app").app
    docstrings = {command.name: inspect.getdoc(command.callback) for command in app.registered_commands}
    assert docstrings == peft_prefix_plus_cli.COMMANDS
    printed, _, _ = run("--help")
    assert all(name in printed for name in docstrings)


def test_the_installed_script_is_this_command() -> None:
    (name,) = re.findall(
        r'^prefix-plus = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert pkgutil.resolve_name(name) is peft_prefix_plus_cli.main


def modules_after(program: str) -> set[str]:
    """The packages that a program has imported when it ends."""
    command = [sys.executable, "-c", f"{program}; import sys; print(*sys.modules)"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name.split(".")[0] for name in printed.split()}


def test_importing_the_package_imports_no_other_package_than_importing_peft() -> None:
    assert modules_after("import peft_prefix_plus") - modules_after("import peft") == {"peft_prefix_plus"}
