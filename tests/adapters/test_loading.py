"""What the file of an adapter may fill, and with what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import output_of, prefixed, tiny_model, token_ids
from peft import PeftModel
from safetensors.torch import load_file, save_file


WEIGHTS = "adapter_model.safetensors"


def change_file(directory: Any, change: Any) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def key_parameter(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith(".key"))


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.weight",
    ],
)
def test_a_file_cannot_change_the_base_model(tmp_path, name):
    prefixed(tiny_model()).save_pretrained(tmp_path)
    base = tiny_model()
    weight = base.state_dict()[name.removeprefix("base_model.model.")]
    change_file(tmp_path, lambda tensors: tensors.update({name: torch.zeros_like(weight)}))
    expected = output_of(base, input_ids=token_ids())
    with pytest.raises(ValueError, match=r"is not the adapter's"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(output_of(base, input_ids=token_ids()), expected)


def test_a_file_cannot_change_another_adapter(tmp_path):
    prefixed(tiny_model()).save_pretrained(tmp_path)
    model = prefixed(tiny_model(), init_weights=False).eval()
    expected = output_of(model, input_ids=token_ids())

    def add(tensors: dict[str, torch.Tensor]) -> None:
        name = key_parameter(tensors)
        other = name.replace("prefix_plus_encoder.", "prefix_plus_encoder.default.")
        tensors[other] = torch.zeros_like(tensors[name])

    change_file(tmp_path, add)
    with pytest.raises(ValueError, match=r"default"):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(output_of(model, input_ids=token_ids()), expected)


def test_a_file_fills_the_modules_that_the_adapter_saves(tmp_path):
    model = prefixed(tiny_model(), modules_to_save=["lm_head"]).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1.0)
    expected = output_of(model, input_ids=token_ids())
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(PeftModel.from_pretrained(tiny_model(), tmp_path), input_ids=token_ids()), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_numbers_that_are_not_real_are_refused(tmp_path, dtype):
    prefixed(tiny_model(), init_weights=False).save_pretrained(tmp_path)

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key_parameter(tensors)] = tensors[key_parameter(tensors)].to(dtype)

    change_file(tmp_path, cast)
    with pytest.raises(ValueError, match=str(dtype)):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=["built", "empty"])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, number, options):
    prefixed(tiny_model(), init_weights=False).save_pretrained(tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key_parameter(tensors)].view(-1)[3] = number

    change_file(tmp_path, spoil)
    base = tiny_model()
    expected = output_of(base, input_ids=token_ids())
    with pytest.raises(ValueError, match=r"NaN or Inf in .*\.key"):
        PeftModel.from_pretrained(base, tmp_path, **options)
    assert torch.equal(output_of(base, input_ids=token_ids()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_real_numbers_of_any_width_are_taken(tmp_path, dtype):
    model = prefixed(tiny_model(), init_weights=False).eval()
    model.save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.update({name: each.to(dtype) for name, each in tensors.items()}))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    # bfloat16 has eight bits
    difference = output_of(loaded, input_ids=token_ids()) - output_of(model, input_ids=token_ids())
    assert difference.abs().max() < 0.05
