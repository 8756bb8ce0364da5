"""docs/compatibility.md lists the private and undocumented names of other packages that the code uses, and they all exist."""

from __future__ import annotations

import ast

import pytest
from compatibility_report import PAGE, Row, rows, used_now
from private_names import _accessed, _defined, _imported, is_undocumented, resolves, uses


ROWS = rows(PAGE.read_text(encoding="utf-8"))
ADVICE = "run `make compatibility`, and say in its last column what breaks without a new name"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_name_exists(row: Row) -> None:
    assert resolves(row.name), f"{row.name} is gone. Without it: {row.consequence} Used in {', '.join(row.files)}."


def test_the_page_lists_what_the_code_uses() -> None:
    listed, used = ({row.name: row.files for row in each} for each in (ROWS, used_now(ROWS)))
    assert used.keys() - listed.keys() == set(), f"docs/compatibility.md lacks these: {ADVICE}"
    assert listed.keys() - used.keys() == set(), f"these are not used any more: {ADVICE}"
    assert listed == used, f"other files use these: {ADVICE}"


def test_the_page_says_what_each_name_is_for() -> None:
    assert [row.name for row in ROWS if not row.consequence] == []


# ---------------------------------------------------------------------------------------------------- the finder itself


def test_a_name_that_is_gone_is_noticed() -> None:
    for path in ("peft.tuners.tuners_utils.BaseTuner", "torch.Tensor._version", "peft.PeftType._member_map_"):
        assert resolves(path) and not resolves(f"{path}_gone")
    assert not resolves("peft.no_such_module.name")


def test_what_is_documented_is_told_from_what_is_not() -> None:
    assert not is_undocumented("peft", "PeftModel") and not is_undocumented("torch.nn", "Module")
    assert is_undocumented("peft.tuners.tuners_utils", "_ExcludedModule")
    assert is_undocumented("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS")
    assert is_undocumented("torch._C", "Graph")


def test_every_way_to_use_a_name_is_found() -> None:
    import torch

    tree = ast.parse(
        """
import torch
import torch.nn.functional as F
from torch import overrides
from torch.overrides import _pop_mode
own._mine = 1
def _mine(): ...
x._version; torch._C._y; F._z(); overrides._a; getattr(x, "_hf_hook"); _mine(); x._mine
"""
    )
    assert set(_imported(tree)) == {"torch.overrides._pop_mode"}
    assert set(_accessed(tree, set(_defined(tree)), [torch.Tensor])) == {
        "torch._C.TensorBase._version",
        "torch._C._y",
        "torch.nn.functional._z",
        "torch.overrides._a",
        "_hf_hook",
    }


def test_names_that_are_overridden_are_found() -> None:
    assert any(name.endswith("BaseTuner._create_and_replace") for name in uses())
