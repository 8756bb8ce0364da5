"""What the documentation states about fields, numbers and PEFT's own method is so."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model, peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.attention.added import DECOUPLED_CAP
from peft_prefix_plus.encoders import LogEncoder
from peft_prefix_plus.layer import GATE_SCALE
from peft_prefix_plus.starting.quiet import LOUD, QUIET_SHARE, RIDGE, SPREAD
from peft_prefix_plus.starting.scaling import (
    DECOUPLED_SCALES,
    GIVEN_SCALES,
    JOINT_SCALES,
    PROJECTED_DECOUPLED,
    PROJECTED_JOINT,
)


ROOT = Path(__file__).parents[2]


def table_rows(path: str) -> list[list[str]]:
    """The cells of every table row in a page."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_configuration_page_lists_every_field_with_its_default() -> None:
    shown = {row[0]: row[1] for row in table_rows("docs/configuration.md") if len(row) == 3}
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    own = [field for field in dataclasses.fields(PrefixPlusConfig) if field.name not in inherited]
    expected = {f"`{field.name}`": f"`{field.default!r}`".replace("'", '"') for field in own}
    assert {field: default for field, default in shown.items() if field.startswith("`")} == expected


def test_migration_page_has_a_row_for_every_field_of_prefix_tuning() -> None:
    named = {match for row in table_rows("docs/migration.md") for match in re.findall(r"^`(\w+)", row[0])}
    assert named >= {field.name for field in dataclasses.fields(PrefixTuningConfig)}


def count_on_llama_2_7b(reparameterization: str, sharing: str) -> int:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    config = PrefixPlusConfig(task_type="CAUSAL_LM", reparameterization=reparameterization, sharing=sharing)
    return get_peft_model(model, config, low_cpu_mem_usage=True).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("page", ["README.md", "docs/method.md"])
def test_numbers_of_parameters_are_right(page: str) -> None:
    rows = [row for row in table_rows(page) if len(row) == 3 and re.fullmatch(r"[\d,]+", row[2])]
    assert len(rows) == 10
    for reparameterization, sharing, count in rows:
        arguments = reparameterization.strip('`"'), sharing.strip('`"') or "projection"
        assert f"{count_on_llama_2_7b(*arguments):,}" == count, arguments


def test_numbers_of_the_scale_and_the_start_are_those_of_the_code() -> None:
    method = " ".join((ROOT / "docs/method.md").read_text(encoding="utf-8").split())
    docstring = " ".join((PrefixPlusConfig.__doc__ or "").split())
    joint, decoupled = ("{:g} and {:g}".format(*scales) for scales in (JOINT_SCALES, DECOUPLED_SCALES))
    assert "The scale is {:g} for keys and {:g} for values in the decoupled form".format(*DECOUPLED_SCALES) in method
    assert f"{joint} in the others" in method
    assert (
        f"1/{1 / PROJECTED_DECOUPLED:g} of it in the decoupled form and 1/{1 / PROJECTED_JOINT:g} in the others"
        in method
    )
    assert {2 * given for given in GIVEN_SCALES} == set(JOINT_SCALES) and "it has half" in method
    assert f"{joint} ({decoupled} if `decoupled`)" in docstring
    assert f"{GATE_SCALE:g} times" in method and f"{GATE_SCALE:g} times" in docstring
    assert f"- {-math.log(QUIET_SHARE):g} - \\log L_p" in method and f"above {LOUD:g} times $e^{{-8}}$" in method
    assert f"a ridge of {RIDGE:g}" in method and f"have a standard deviation of {SPREAD:g}," in method
    assert f"{DECOUPLED_CAP:g} \\tanh(x / {DECOUPLED_CAP:g})" in method
    assert rf"a = {LogEncoder.REACH:g} \quad r = {LogEncoder.KNEE:g}" in method


def test_troubleshooting_has_the_messages_as_they_are() -> None:
    code = " ".join(
        node.value
        for path in (ROOT / "peft_prefix_plus").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    peft = inspect.getsource(peft_model)
    headings = re.findall(
        '^## "(.*)"$', (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(headings) > 10
    assert [heading for heading in headings if heading not in code and heading not in peft] == []


# ------------------------------------------------------- what the README and the migration page say of PREFIX_TUNING


@pytest.fixture
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).eval()


TOKENS = torch.arange(3, 15)[None]
OLD = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
NEW = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, init_weights=False)


def test_prefix_tuning_refuses_gradient_checkpointing(base: LlamaForCausalLM) -> None:
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        get_peft_model(base, OLD)


def test_prefix_tuning_refuses_to_train_a_saved_adapter(base: LlamaForCausalLM, tmp_path: Path) -> None:
    get_peft_model(base, OLD).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        PeftModel.from_pretrained(base, tmp_path, is_trainable=True)


@pytest.mark.parametrize(("config", "length"), [(OLD, 0), (NEW, TOKENS.shape[1])])
def test_whether_a_cache_that_is_passed_in_is_used(base: LlamaForCausalLM, config: PeftConfig, length: int) -> None:
    cache = DynamicCache()
    get_peft_model(base, config)(input_ids=TOKENS, past_key_values=cache)
    assert cache.get_seq_length() == length


@pytest.mark.parametrize(("config", "is_seen"), [(OLD, False), (NEW, True)])
def test_whether_the_prefix_is_seen_beyond_a_sliding_window(config: PeftConfig, is_seen: bool) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    model = MistralForCausalLM(MistralConfig(vocab_size=100, num_key_value_heads=2, sliding_window=4, **sizes)).eval()
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits[:, -1]
        logits = get_peft_model(model, config).eval()(input_ids=TOKENS).logits[:, -1]
    assert torch.allclose(logits, expected, atol=1e-5) != is_seen


def test_a_prefix_of_zeros_is_not_the_base_model(base: LlamaForCausalLM) -> None:
    with torch.no_grad():
        expected = base(input_ids=TOKENS).logits
        config = PrefixPlusConfig(task_type="CAUSAL_LM", init_weights="zero")
        logits = get_peft_model(base, config).eval()(input_ids=TOKENS).logits
    assert not torch.allclose(logits, expected, atol=1e-3)
