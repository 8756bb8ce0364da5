"""
Architectures whose first input is no text, or more than text: each works with a prefix, or says clearly why not.

`make test-models` tests them all and writes docs/models.md; the default run tests a sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from beyond_text import UNBUILDABLE, cases, inputs_of, numbers_of
from models import adapter_parameters, assert_unchanged, joint_config, state_of
from peft import PeftModel, get_peft_model
from test_models import attention_classes, report
from tiny_models import Case, tiny_model


SAMPLE = {
    "Wav2Vec2ForCTC",
    "ViTForImageClassification",
    "DabDetrForObjectDetection",
    "OneFormerForUniversalSegmentation",
    "DiaForConditionalGeneration",
    "MusicgenForConditionalGeneration",
    "SamModel",
    "TimeSeriesTransformerForPrediction",
    "ResNetForImageClassification",
}
"""What the default run tests; the rest has the marker `models`."""

REFUSED = {
    "BitForImageClassification",
    "ConvNextForImageClassification",
    "ConvNextV2ForImageClassification",
    "CvtForImageClassification",
    "EfficientNetForImageClassification",
    "FocalNetForImageClassification",
    "FocalNetForMaskedImageModeling",
    "HGNetV2ForImageClassification",
    "HieraForImageClassification",
    "LayoutLMv3ForQuestionAnswering",
    "MobileNetV1ForImageClassification",
    "MobileNetV2ForImageClassification",
    "MobileNetV2ForSemanticSegmentation",
    "MobileViTV2ForImageClassification",
    "MobileViTV2ForSemanticSegmentation",
    "PPLCNetForImageClassification",
    "PPOCRV5MobileDetForObjectDetection",
    "PPOCRV6SmallDetForObjectDetection",
    "PPOCRV6TinyRecForTextRecognition",
    "PatchTSMixerForRegression",
    "PatchTSMixerForTimeSeriesClassification",
    "PoolFormerForImageClassification",
    "RegNetForImageClassification",
    "ResNetForImageClassification",
    "SEWDForCTC",
    "SEWDForSequenceClassification",
    "SLANetForTableRecognition",
    "SuperPointForKeypointDetection",
    "SwiftFormerForImageClassification",
    "Swin2SRForImageSuperResolution",
    "Swinv2ForImageClassification",
    "Swinv2ForMaskedImageModeling",
    "TextNetForImageClassification",
    "WavLMForAudioFrameClassification",
    "WavLMForCTC",
    "WavLMForSequenceClassification",
    "WavLMForXVector",
}
"""The models that cannot have a prefix; docs/models.md has their errors. No other may be refused."""

UNREAD: dict[str, str] = {}
"""Modules whose prefix changes nothing of the output, by model class, as the start of their names."""


def parameters() -> list[Any]:
    """The cases as pytest's parameters."""
    return [
        pytest.param(case, id=str(case), marks=[] if case.class_name in SAMPLE else [pytest.mark.models])
        for group in cases().values()
        for case in group
        if case.class_name not in UNBUILDABLE
    ]


@pytest.mark.parametrize("case", parameters())
def test_an_architecture_works_with_a_prefix_or_says_why_not(case: Case, tmp_path: Path) -> None:
    # frozen, as the adapter leaves it: torch takes other kernels for some sums when a parameter needs a gradient
    model = tiny_model(case).requires_grad_(False)
    before = state_of(model)
    inputs = inputs_of(model)
    expected = None if inputs is None else numbers_of(model, inputs)
    # keys and values of both signs and unit size: they visibly change what the model computes
    # joint: a share of the softmax is seen however small a model's scores are
    config = joint_config(num_virtual_tokens=3, init_weights=False)
    try:
        tuned = get_peft_model(model, config).eval()
    except ValueError as error:
        report(case, "refused", str(error))
        assert_unchanged(model, before)
        assert type(model).__name__ in str(error)
        assert case.class_name in REFUSED, error
        return
    assert case.class_name not in REFUSED
    try:
        prefixed, others = attention_classes(tuned)
        check_all(case, tuned, inputs, expected, tmp_path)
    except BaseException as error:
        report(case, "failed", f"{type(error).__name__}: {error}")
        raise
    report(case, "passed", {"prefixed": prefixed, "others": others, "is_run": inputs is not None})


def test_the_documentation_lists_every_architecture() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    names = [case.class_name for group in cases().values() for case in group]
    assert [name for name in names if f"`{name}`" not in text] == []


def check_all(
    case: Case,
    tuned: PeftModel,
    inputs: dict[str, torch.Tensor] | None,
    expected: list[torch.Tensor] | None,
    tmp_path: Path,
) -> None:
    """Check what an adapter does to a model, that gradients reach it, and that it can be saved and loaded."""
    if inputs is not None and expected is not None:
        changed = numbers_of(tuned, inputs)
        assert any(differs(one, other) for one, other in zip(changed, expected, strict=True)), "it changes nothing"
        with tuned.disable_adapter():
            assert_equal(numbers_of(tuned, inputs), expected)
        check_gradients(case, tuned, inputs)
    parameters_before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(tuned).items()}
    tuned.save_pretrained(tmp_path)
    base = tuned.unload()
    if inputs is not None and expected is not None:
        assert_equal(numbers_of(base, inputs), expected)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    parameters_after = adapter_parameters(loaded)
    assert list(parameters_after) == list(parameters_before)
    assert all(torch.equal(parameters_after[name], each) for name, each in parameters_before.items())
    if inputs is not None:
        assert_equal(numbers_of(loaded, inputs), changed)


def check_gradients(case: Case, tuned: PeftModel, inputs: dict[str, torch.Tensor]) -> None:
    """Each parameter of the adapter gets a gradient from a random sum of all that the model returns."""
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (each * torch.randn(each.shape, generator=generator)).nan_to_num(0.0, 0.0, 0.0).sum()
        for each in numbers_of(tuned, inputs, with_gradients=True)
        if each.requires_grad
    )
    loss.backward()
    unread = UNREAD.get(case.class_name)
    without = [
        name
        for name, parameter in adapter_parameters(tuned).items()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert [name for name in without if not (unread and unread in name)] == [], "no gradient reaches them"
    assert not unread or without, "gradients reach all"
    tuned.zero_grad()


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape or not torch.allclose(one, other, atol=1e-6, equal_nan=True)


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
