"""
Write the names and the files of docs/compatibility.md anew: `make compatibility`.

What breaks without a name is written by hand, in the last column, and kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from private_names import PACKAGES, ROOT, uses


PAGE = ROOT / "docs" / "compatibility.md"
START, END = "<!-- names: written by `make compatibility` but for the last column -->", "<!-- end of the names -->"
ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<files>[^|]*) \| (?P<consequence>[^|]*)\|$", re.MULTILINE)


class Row(NamedTuple):
    """
    A line of the table.

    Attributes:
        name (`str`): The path of the name.
        files (`tuple[str, ...]`): The files that use it.
        consequence (`str`): What breaks without it.
    """

    name: str
    files: tuple[str, ...]
    consequence: str

    def line(self) -> str:
        files = ", ".join(f"`{file}`" for file in self.files)
        return f"| `{self.name}` | {files} | {self.consequence} |"


def rows(page: str) -> list[Row]:
    """The lines of the page's tables."""
    return [
        Row(match["name"], tuple(re.findall("`([^`]+)`", match["files"])), match["consequence"].strip())
        for match in ROW.finditer(page)
    ]


def used_now(known: list[Row]) -> list[Row]:
    """The lines that there should be; a name without a path gets that of the line that ends with it, where there is one."""
    consequences = {row.name: row.consequence for row in known}
    paths = {row.name.rpartition(".")[2]: row.name for row in known}
    found = []
    for name, files in uses().items():
        path = name if "." in name else paths.get(name, name)
        short = tuple(sorted(file.removeprefix("peft_prefix_plus/") for file in files))
        found.append(Row(path, short, consequences.get(path, "")))
    return sorted(found)


def tables(found: list[Row]) -> Iterator[str]:
    packages = sorted({row.name.split(".")[0] for row in found}, key=lambda name: (name not in PACKAGES, name))
    for package in packages:
        yield f"## {package if package in PACKAGES else f'Python: {package}'}\n"
        yield "| name | used in | without it |\n|---|---|---|"
        yield from (row.line() for row in found if row.name.split(".")[0] == package)
        yield ""


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(START)
    _, tail = rest.split(END)
    found = used_now(rows(page))
    PAGE.write_text(f"{head}{START}\n\n" + "\n".join(tables(found)) + f"\n{END}{tail}", encoding="utf-8")
    for row in found:
        if not row.consequence:
            print(f"{row.name} is new: say in the last column of {PAGE} what breaks without it.")


if __name__ == "__main__":
    main()
