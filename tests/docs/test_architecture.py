"""The pictures of docs/architecture.md are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import PICTURES, calls_of_a_query, part_imports


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_the_code_gives_and_the_page_shows_it(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PICTURES[name](), "run `make docs`, which draws it anew"
    assert f"]({name})" in (DOCS / "architecture.md").read_text(encoding="utf-8")


def test_the_page_names_every_part() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert [part for part in part_imports() if f"`{part}/`" not in page and f"`{part}.py`" not in page] == []


def test_a_querys_way_begins_where_transformers_calls_and_meets_the_prefix() -> None:
    places = [call.place for call in calls_of_a_query()]
    assert any("prefix_attention" in place for place in places)
    assert any("Encoder.forward" in place for place in places)
