"""The imports keep what the `__init__` of each part of the package promises: what it may import, and who may import it."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest
from pictures import PACKAGE, imports, modules, part_imports


ROOT = Path(__file__).parents[1]


WINGS = sorted(path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py"))
GRAPH = part_imports()


def promise(wing: str) -> str:
    """The docstring of a wing's `__init__`, in one line."""
    docstring = ast.get_docstring(ast.parse((ROOT / PACKAGE / wing / "__init__.py").read_text(encoding="utf-8")))
    return " ".join((docstring or "").split())


def may_import(text: str) -> set[str]:
    """The parts that a promise allows to import."""
    found = re.search(r"May import (?P<all>everything)?(?P<names>[^.]*?)(?:; nothing|\.$|\. )", text)
    assert found, (
        f"the docstring says nowhere what the wing may import ('May import `attention` and `layer`.'): {text}"
    )
    names = set(re.findall(r"`(\w+)`", found["names"]))
    assert names <= GRAPH.keys(), f"there is no such part of the package: {names - GRAPH.keys()}"
    return set(GRAPH) - names if found["all"] else names


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_what_it_says(wing: str) -> None:
    assert GRAPH[wing] <= may_import(promise(wing))


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_is_imported_by_those_that_it_names(wing: str) -> None:
    text = promise(wing)
    importers = {part for part, imported in GRAPH.items() if wing in imported}
    only = re.search(r"[Nn]othing(?: but (?P<names>[^.;]*))? imports? it", text)
    if only:
        assert importers <= set(re.findall(r"`(\w+)`", only["names"] or ""))
    assert wing != "cli" or only, "everything may import the command"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter(imports()).prepare()


def test_what_says_so_does_not_know_of_peft() -> None:
    without_peft = [wing for wing in WINGS if "Nothing in here knows of PEFT" in promise(wing)]
    assert "attention" in without_peft
    for name, path in modules().items():
        imported = {
            (node.module if isinstance(node, ast.ImportFrom) else alias.name) or ""
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        wing = name.split(".")[1] if "." in name else ""
        if wing in without_peft:
            assert not any(module.split(".")[0] == "peft" for module in imported), name


def test_a_file_of_tests_finds_what_it_imports_when_it_runs_alone() -> None:
    tests = ROOT / "tests"
    folders = {path.stem: path.parent for path in tests.rglob("*.py") if path.name != "conftest.py"}
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            folder = folders.get(node.module or "") if isinstance(node, ast.ImportFrom) else None
            # pytest finds those in `tests` and in the file's own folder
            assert folder in (None, tests, path.parent), f"{path} imports from {folder}"


# ---------------------------------------------------------------------------------------------------- these tests can fail


def test_what_a_promise_says_is_read() -> None:
    assert may_import("Words. May import `config` and `layer`; nothing else. More.") == {"config", "layer"}
    assert may_import("Words. May import nothing of the package.") == set()
    assert may_import("May import everything but `cli`; nothing but `cli` imports it.") == set(GRAPH) - {"cli"}
    with pytest.raises(AssertionError, match="may import"):
        may_import("Words.")


def test_imports_are_found() -> None:
    found = imports()
    assert "peft_prefix_plus.encoders" in found["peft_prefix_plus.layer"]
    assert "peft_prefix_plus.config" not in found["peft_prefix_plus.encoders.base"]  # for types only
    assert {"config", "layer", "attention"} <= GRAPH["model"]
