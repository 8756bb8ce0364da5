"""Configuration of the documentation. Build it with `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import peft_prefix_plus


sys.path.insert(0, str(Path(__file__).parent))

import pictures


project = "peft-prefix-plus"
author = "the peft-prefix-plus authors"
project_copyright = author
release = version = peft_prefix_plus.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def as_restructured_text(lines: list[str]) -> list[str]:
    """
    Translate the Markdown that PEFT's docstring style uses into reStructuredText.

    Args:
        lines (`list[str]`): A docstring's lines.

    Returns:
        `list[str]`: The same with literals in double backticks, fences turned into code blocks, and indented blocks
        after a colon marked as literal.
    """
    translated: list[str] = []
    fence: str | None = None
    for index, line in enumerate(lines):
        indentation = line[: len(line) - len(line.lstrip())]
        if line.strip().startswith("```"):
            language = line.strip().removeprefix("```")
            fence = indentation if fence is None else None
            if fence is not None:
                translated += ["", f"{indentation}.. code-block:: {_LEXERS.get(language, 'text')}", ""]
            continue
        if fence is not None:
            translated.append(f"    {line}" if line.strip() else "")
            continue
        if line.rstrip().endswith(":") and _introduces_block(lines, index, len(indentation)):
            line = f"{line.rstrip()}:"
        line = re.sub(r"\[`([^`]+)`\]", r"`\1`", line)
        translated.append(re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line))
    return translated


_LEXERS = {"py": "pycon", "python": "python", "bash": "bash", "sh": "bash"}


def _introduces_block(lines: list[str], index: int, indentation: int) -> bool:
    """Whether a line is followed by a blank one and then by a line that is indented further."""
    if index + 2 >= len(lines) or lines[index + 1].strip():
        return False
    following = lines[index + 2]
    return bool(following.strip()) and len(following) - len(following.lstrip()) > indentation


def translate_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)


def setup(app: Any) -> None:
    pictures.draw_all()
    app.connect("autodoc-process-docstring", translate_docstring, priority=100)  # before napoleon
