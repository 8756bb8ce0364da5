"""TRL's trainers with the default configuration, as `examples/train_with_trl.py` has them."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from peft_prefix_plus import PrefixPlusConfig


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    pytest.importorskip("trl")
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "train_with_trl.py"))


def test_supervised_fine_tuning_learns_what_the_assistant_says(example: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(example["make_base"](), PrefixPlusConfig(task_type="CAUSAL_LM"))
    first, *_, last = example["supervise"](model, example["make_tokenizer"](), str(tmp_path), max_steps=10)
    assert last < 0.5 * first


def test_preference_optimization_starts_at_the_reference(example: dict[str, Any], tmp_path: Path) -> None:
    losses = example["prefer"](example["make_base"](), example["make_tokenizer"](), str(tmp_path), max_steps=4)
    # the reference is the model without the prefix, and a new prefix hardly changes it: both answers gain nothing, log 2
    assert losses[0] == pytest.approx(math.log(2), abs=0.005)
    assert losses[-1] < losses[0]
