"""Finding the names of other packages that are private or undocumented, and that the package uses all the same."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peft_prefix_plus


ROOT = Path(peft_prefix_plus.__file__).parents[1]
MODULES = [*sorted((ROOT / "peft_prefix_plus").rglob("*.py")), ROOT / "peft_prefix_plus_cli.py"]
# vLLM is pinned to one version and is not installed here: tests/serving run what uses it
FILES = [path for path in MODULES if not re.search(r"^from vllm", path.read_text(encoding="utf-8"), re.MULTILINE)]
PACKAGES = ("accelerate", "huggingface_hub", "peft", "safetensors", "torch", "transformers")

COMMON_OWNERS = (torch.Tensor, torch.nn.Module, transformers.PreTrainedConfig, torch.ops.aten)
"""Whose attributes the package reads without importing their classes."""

OF_PYTHON = {"_asdict", "_fields", "_make", "_replace"}
"""What a NamedTuple has: documented, in spite of the underscore."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_undocumented(module: str, name: str) -> bool:
    """
    Whether a name that is imported is promised to nobody: PEFT and transformers document what their top package exports, the
    others what neither has an underscore in front nor lies in a module that has.
    """
    if any(map(is_private, [*module.split("."), name])):
        return True
    top: Any = {"peft": peft, "transformers": transformers}.get(module.split(".")[0])
    return top is not None and not hasattr(top, name)


@functools.cache
def uses() -> dict[str, set[str]]:
    """
    The private and undocumented names that the package uses, each with the files that use it.

    A name is a path, where the code says whose it is: `torch._C._are_functorch_transforms_active`, or
    `peft.tuners.tuners_utils.BaseTuner._create_and_replace` for a method that one of the package's classes has from PEFT's; or
    `torch.Tensor._version`, for an attribute of any object, where one of the classes that the package imports has such a one. Else it
    is bare: `_hf_hook`.
    """
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    own = {name for tree in trees.values() for name in _defined(tree)}
    imported = {each for tree in trees.values() for each in _imported_classes(tree)}
    owners = [*COMMON_OWNERS, *sorted(imported - set(COMMON_OWNERS), key=path_of)]
    found: dict[str, set[str]] = defaultdict(set)
    for file, tree in trees.items():
        for name in (*_imported(tree), *_accessed(tree, own, owners), *_inherited(file, tree)):
            found[name].add(file)
    return dict(found)


def _defined(tree: ast.AST) -> Iterator[str]:
    """The private names that a file gives to anything of its own."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if is_private(name):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()) if is_private(name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) if is_private(name):
                yield name
            case ast.keyword(arg=str(name)) if is_private(name):
                yield name


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module.split(".")[0] in PACKAGES:
                for alias in node.names:
                    if is_undocumented(node.module, alias.name):
                        yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in PACKAGES and "._" in a.name)


def _imported_classes(tree: ast.AST) -> Iterator[Any]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in PACKAGES:
            found = (getattr(importlib.import_module(node.module or ""), alias.name, None) for alias in node.names)
            yield from filter(inspect.isclass, found)


@functools.cache
def _source(owner: Any) -> str:
    """The code of a class, function or module; empty for what is not written in Python."""
    try:
        code = Path(inspect.getsourcefile(owner) or "").read_text(encoding="utf-8")
    except (TypeError, OSError):
        return ""
    if inspect.ismodule(owner):
        return code
    # quicker than inspect.getsource, which parses the whole file
    definition = re.search(rf"^(class|def) {owner.__name__}\b.*\n(?:(?:[ \t)].*)?\n)*", code, re.MULTILINE)
    return definition[0] if definition else ""


@functools.cache
def _has(owner: Any, name: str) -> bool:
    """Whether a class, or what is like one, has an attribute, or its instances get it from its own code."""
    if hasattr(owner, name) or name in getattr(owner, "__annotations__", {}):
        return True
    return inspect.isclass(owner) and re.search(rf"\bself\.{name}\b", _source(owner)) is not None


def _of_owner(name: str, owners: list[Any]) -> str | None:
    """The path of an attribute of the first owner that has it, or of the base that it has it from."""
    for owner in owners:
        if _has(owner, name):
            bases = [base for base in getattr(owner, "__mro__", (owner,)) if _has(base, name)]
            return f"{path_of(bases[-1])}.{name}"
    return None


def path_of(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if inspect.isclass(owner) else "torch.ops.aten"


def _accessed(tree: ast.AST, own: set[str], owners: list[Any]) -> Iterator[str]:
    """Private attributes, as paths where it is clear whose they are or else bare, and strings that are such an attribute's name."""
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update({alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    parts_of_words = {
        id(part)
        for node in ast.walk(tree)
        for part in (
            node.values
            if isinstance(node, ast.JoinedStr)
            else node.args
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "endswith"
            else ()
        )
    }
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            path = _path(node)
            root = imported.get(path[0], "") if path else ""
            if root.split(".")[0] in PACKAGES:
                if id(node) not in inner:
                    yield ".".join([root, *path[1:]])
            elif path[:1] not in (["self"], ["cls"]) or len(path) > 2:  # the others: see `_inherited`
                of_owner = _of_owner(node.attr, owners)
                if of_owner or node.attr not in own | OF_PYTHON:
                    yield of_owner or node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts_of_words:
            name = node.value.strip(".")
            if is_private(name) and name.isidentifier() and name not in own:
                yield _of_owner(name, owners) or name


def _path(node: ast.expr) -> list[str]:
    """The names of `a.b.c`; empty for an attribute of anything but a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (path := _path(node.value)):
        return [*path, node.attr]
    return []


NOT_INSTALLED = {"vllm", "fastapi"}
"""What the package imports in environments of their own."""


def _inherited(file: str, tree: ast.Module) -> Iterator[str]:
    """The private methods and attributes of other packages' classes that a class of this file overrides, or uses on itself."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    if not classes:
        return
    try:
        module = importlib.import_module(file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
    except ModuleNotFoundError as error:
        if error.name not in NOT_INSTALLED:
            raise
        return  # what runs in vLLM's processes derives from vLLM's classes only
    for node in classes:
        bases = [base for base in getattr(module, node.name).__mro__ if base.__module__.split(".")[0] in PACKAGES]
        names = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        names |= {
            item.attr
            for item in ast.walk(node)
            if isinstance(item, ast.Attribute) and _path(item)[:1] in (["self"], ["cls"])
        }
        for name in filter(is_private, sorted(names)):
            owners = [base for base in bases if _has(base, name)]
            if owners:
                yield f"{path_of(owners[-1])}.{name}"


def resolves(path: str) -> bool:
    """
    Whether a name still exists: as an attribute, or, for what only instances have, in the source of the class, function or
    module that the path says it is set in.
    """
    owner, _, name = path.rpartition(".")
    try:
        found = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError):
        return False
    return _has(found, name) or re.search(rf"\b{name}\b", _source(found)) is not None


if __name__ == "__main__":
    for each, files in sorted(uses().items()):
        print(each, sorted(files))
