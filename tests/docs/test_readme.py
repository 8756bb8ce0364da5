"""The code that the README, the documentation, the docstrings and the examples show runs as it is shown."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import peft_prefix_plus


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(peft_prefix_plus.__path__, "peft_prefix_plus.")
    if not name.endswith("__main__")
]
FENCE = re.compile(r"^```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """
    A fenced block of a page.

    Attributes:
        language (`str`): What stands after the fence.
        code (`str`): What stands between the fences.
        line (`int`): The line of the page that the code starts in.
        directly_follows (`bool`): Whether only blank space is between this block and the one before.
    """

    language: str
    code: str
    line: int
    directly_follows: bool


def blocks(text: str) -> list[Block]:
    found, end = [], 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], match["code"], line, not text[end : match.start()].strip()))
        end = match.end()
    return found


def run_page(text: str, filename: str) -> None:
    """Run a page's Python blocks in order in one namespace; a text block right after one is what it must print."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(text):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, filename, "exec")
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(code, namespace)  # noqa: S102 (code of our own pages)
            printed = output.getvalue()
        elif block.language == "text" and block.directly_follows:
            assert printed.strip() == block.code.strip(), f"{filename}:{block.line} shows other output"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield tmp_path
    logging.set_verbosity(verbosity)


@pytest.fixture
def small_models_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's model that the pages name be a small one of random weights."""
    load = AutoModelForCausalLM.from_pretrained
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}

    def small(name: str, **kwargs: Any) -> Any:
        return LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)) if name == MODEL else load(name, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", small)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_a_page_runs(page: Path, elsewhere: Path, small_models_of_the_hub: None) -> None:
    run_page(page.read_text(encoding="utf-8"), page.name)


def test_pages_with_code_are_found() -> None:
    counts = {page.name: sum(block.language == "python" for block in blocks(page.read_text())) for page in PAGES}
    assert counts["README.md"] >= 3
    assert {name for name, count in counts.items() if count} >= {
        "README.md",
        "adapters.md",
        "configuration.md",
        "diagnostics.md",
        "method.md",
        "migration.md",
        "quickstart.md",
        "saving.md",
    }


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\nprint('one')\n```\n\n```text\ntwo\n```\n", AssertionError),
        ("```python\nprint(undefined)\n```\n", NameError),
    ],
)
def test_a_page_that_is_wrong_fails(page: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run_page(page, "page.md")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_of_a_module(name: str, elsewhere: Path) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name is not None and not error.name.startswith("peft_prefix_plus")
        pytest.skip(f"needs the extra that brings {error.name}")
    assert doctest.testmod(module).failed == 0


def test_public_classes_have_docstrings_that_run() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for name in ("PrefixPlusConfig", "PrefixPlusModel"):
        assert any(test.examples for test in finder.find(getattr(peft_prefix_plus, name)))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_runs(example: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [example.name])
    runpy.run_path(str(example), run_name="__main__")


def shell_lines() -> list[str]:
    return [
        line.split("#")[0].strip()
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.language == "bash"
        for line in block.code.splitlines()
        if line.split("#")[0].strip()
    ]


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"`make ([a-z]+)`", texts))
    named |= {line.split()[-1] for line in shell_lines() if line.startswith("make ")}
    assert named >= {"demo", "test", "lint", "docs"}
    assert named <= targets


def commands_of_the_app() -> dict[str, set[str]]:
    """The options of the command line, by command."""
    app = pytest.importorskip("peft_prefix_plus.cli.app").app
    group = importlib.import_module("typer").main.get_command(app)
    return {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in group.commands.items()
    }


def test_commands_and_options_that_are_named_exist() -> None:
    commands = commands_of_the_app()
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"`prefix-plus ([a-z]+)", texts)) == set(commands)
    lines = [line for line in shell_lines() if line.startswith("prefix-plus ")]
    assert len(lines) >= 6
    for line in lines:
        command = line.split()[1]
        assert set(re.findall(r"--[a-z-]+", line)) - {"--help"} <= commands[command], line


@pytest.mark.parametrize("page", ["README.md", "docs/method.md"])
def test_table_of_parameters_is_what_the_command_prints(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = pytest.importorskip("peft_prefix_plus.cli.parameters")
    parameters.params(parameters.CountingSettings(markdown=True))
    assert capsys.readouterr().out.strip() in (ROOT / page).read_text(encoding="utf-8")


def test_links_to_files_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
