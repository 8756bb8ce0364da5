"""
The pictures of the architecture page, drawn from the code by `make docs`: the parts of the package with their imports, and the calls
that a query meets on its way through attention.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple


DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = "peft_prefix_plus"

STYLE = """<style>
text { font: 13px ui-sans-serif, system-ui, sans-serif; fill: #1b2a3a }
.small { font-size: 11px; fill: #5a6b7b }
rect { fill: #eef3f8; stroke: #7d93a8 }
path { fill: none; stroke: #9fb3c6 }
.ground { fill: #ffffff; stroke: none }
</style>"""


# ---------------------------------------------------------------------------------------------------- the imports


def modules() -> dict[str, Path]:
    """The files of the package by module name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports() -> dict[str, set[str]]:
    """For each module of the package, the modules of the package that it imports when it is imported or used, but not for types."""
    known = modules()
    return {name: set(_imported(name, path, known)) - {name} for name, path in known.items()}


def _imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _without_types(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = (
                ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            for alias in node.names:
                named = f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                if named in known and named != PACKAGE:
                    yield named


def _without_types(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk through a tree, past the blocks of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from _without_types(node)


def part_of(module: str) -> str:
    """The part of the package that a module belongs to: a wing, or a module at the door."""
    return module.split(".")[1] if "." in module else ""


def part_imports() -> dict[str, set[str]]:
    """For each part of the package, the parts that it imports."""
    found: dict[str, set[str]] = {part_of(module): set() for module in imports() if module != PACKAGE}
    for module, imported in imports().items():
        if module != PACKAGE:
            found[part_of(module)] |= {part_of(each) for each in imported} - {part_of(module), ""}
    return found


def layers(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The nodes in rows: each below all that import it, as high as that allows."""
    depth: dict[str, int] = {}

    def of(node: str, below: tuple[str, ...] = ()) -> int:
        if node not in depth:
            importers = [each for each, imported in graph.items() if node in imported and each not in below]
            depth[node] = 1 + max((of(each, (*below, node)) for each in importers), default=-1)
        return depth[node]

    rows: dict[int, list[str]] = {}
    for node in sorted(graph):
        rows.setdefault(of(node), []).append(node)
    return [rows[index] for index in sorted(rows)]


def picture_of_packages() -> str:
    """Draw the parts of the package in rows, with a line from each down to what it imports."""
    graph = part_imports()
    rows = layers(graph)
    width, height, across, down = 132, 44, 24, 56
    total = max(map(len, rows)) * (width + across) + across
    places = {}
    for row, nodes in enumerate(rows):
        start = (total - len(nodes) * (width + across) + across) / 2
        for column, node in enumerate(nodes):
            places[node] = (start + column * (width + across), 20 + row * (height + down))
    drawn = []
    for node, imported in sorted(graph.items()):
        x, y = places[node]
        for other in sorted(imported):
            to_x, to_y = places[other]
            middle = (y + height + to_y) / 2
            drawn.append(
                f'<path d="M{x + width / 2:g} {y + height} C{x + width / 2:g} {middle:g} {to_x + width / 2:g} {middle:g} {to_x + width / 2:g} {to_y}"/>'
            )
    for node, (x, y) in places.items():
        is_wing = (ROOT / PACKAGE / node).is_dir()
        drawn.append(f'<rect x="{x:g}" y="{y}" width="{width}" height="{height}" rx="6"/>')
        drawn.append(
            f'<text x="{x + width / 2:g}" y="{y + 27}" text-anchor="middle">{node}{"/" if is_wing else ".py"}</text>'
        )
    return _svg(total, 20 + len(rows) * (height + down) - down + 20, drawn)


# ---------------------------------------------------------------------------------------------------- the calls


class Call(NamedTuple):
    """A call of one of the package's functions: how many others it happens in, where, and what the function says it does."""

    depth: int
    place: str
    summary: str


def calls_of_a_query() -> list[Call]:
    """The calls that one attention module of a small Llama with a prefix makes into the package, where each happens first."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import peft_prefix_plus

    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**sizes)), peft_prefix_plus.PrefixPlusConfig(task_type="CAUSAL_LM")
    )
    tokens = torch.arange(6)[None]
    model(input_ids=tokens)  # kernels are checked at their first use
    found: list[Call] = []
    stack: list[bool] = []

    def watch(frame: Any, event: str, argument: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call":
            is_own = module.startswith(f"{PACKAGE}.") and not frame.f_code.co_name.startswith(("<", "__"))
            if is_own:
                function = f"{module.removeprefix(f'{PACKAGE}.').replace('.', '/')}.py: {frame.f_code.co_qualname}"
                found.append(Call(sum(stack), function, _summary(frame)))
            stack.append(is_own)
        elif event == "return" and stack:
            stack.pop()

    attention = next(module for module in model.modules() if hasattr(module, peft_prefix_plus.METHOD_NAME))
    forward = attention.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        sys.setprofile(watch)
        try:
            return forward(*args, **kwargs)
        finally:
            sys.setprofile(None)

    attention.forward = watched
    model(input_ids=tokens)
    first = [call for index, call in enumerate(found) if call.place not in {each.place for each in found[:index]}]
    following = [*first[1:], Call(0, "", "")]
    return [
        call for call, after in zip(first, following, strict=True) if after.depth > call.depth or _is_of_interest(call)
    ]


def _is_of_interest(call: Call) -> bool:
    """Whether a call that leads to no other is worth a line: helpers and what says nothing of itself are not."""
    return bool(call.summary) and not call.place.rpartition(" ")[2].rpartition(".")[2].startswith("_")


def _summary(frame: Any) -> str:
    """The first sentence of the docstring of the function that a frame runs."""
    docstring = (frame.f_code.co_consts or (None,))[0]
    if not isinstance(docstring, str):
        return ""
    words = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    return words if len(words) <= 110 else f"{words[:108].rsplit(' ', 1)[0]} …"


def picture_of_a_query() -> str:
    """Draw the calls as a tree, from top to bottom in the order in which they begin."""
    drawn, step, indentation = [], 42, 26
    calls = calls_of_a_query()
    last: dict[int, int] = {}
    for index, call in enumerate(calls):
        x, y = 16 + call.depth * indentation, 16 + index * step
        if call.depth:
            parent = last[max(depth for depth in last if depth < call.depth)]
            drawn.append(f'<path d="M{x - 14} {16 + parent * step + 30} V{y + 14} H{x}"/>')
        last = {depth: at for depth, at in last.items() if depth < call.depth} | {call.depth: index}
        drawn.append(f'<text x="{x + 4}" y="{y + 14}">{escape(call.place)}</text>')
        drawn.append(f'<text class="small" x="{x + 4}" y="{y + 29}">{escape(call.summary)}</text>')
    return _svg(900, 20 + len(calls) * step, drawn)


# ---------------------------------------------------------------------------------------------------- both


def _svg(width: float, height: float, elements: list[str]) -> str:
    body = "\n".join(elements)
    ground = f'<rect class="ground" width="{width:g}" height="{height:g}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}">\n{STYLE}\n{ground}\n{body}\n</svg>\n'


PICTURES = {"architecture-packages.svg": picture_of_packages, "architecture-query.svg": picture_of_a_query}


def draw_all() -> None:
    """Write the pictures beside the pages, for the build and for readers of the Markdown files."""
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    draw_all()
