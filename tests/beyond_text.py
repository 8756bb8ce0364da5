"""Architectures whose first input is no text, or more than text: transformers' auto mappings of them, and inputs for tiny models."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import MAPPINGS, Case
from transformers.models.auto import modeling_auto

from peft_prefix_plus.probing.inputs import probe_inputs


GROUPS = {
    "Sound": (
        "AUDIO_CLASSIFICATION",
        "AUDIO_FRAME_CLASSIFICATION",
        "AUDIO_XVECTOR",
        "CTC",
        "SPEECH_SEQ_2_SEQ",
        "RNNT",
        "TDT",
        "TEXT_TO_SPECTROGRAM",
        "TEXT_TO_WAVEFORM",
    ),
    "Images": (
        "IMAGE_CLASSIFICATION",
        "MASKED_IMAGE_MODELING",
        "CAUSAL_IMAGE_MODELING",
        "IMAGE_TO_IMAGE",
        "DEPTH_ESTIMATION",
        "NORMAL_ESTIMATION",
        "POINTMAP_ESTIMATION",
        "POSE_ESTIMATION",
        "KEYPOINT_DETECTION",
        "KEYPOINT_MATCHING",
        "TABLE_RECOGNITION",
        "TEXT_RECOGNITION",
    ),
    "Detection": ("OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION"),
    "Segmentation and masks": (
        "IMAGE_SEGMENTATION",
        "SEMANTIC_SEGMENTATION",
        "INSTANCE_SEGMENTATION",
        "UNIVERSAL_SEGMENTATION",
        "IMAGE_MATTING",
        "MASK_GENERATION",
    ),
    "Video": ("VIDEO_CLASSIFICATION",),
    "Images and text": (
        "IMAGE_TEXT_TO_TEXT",
        "MULTIMODAL_LM",
        "VISUAL_QUESTION_ANSWERING",
        "DOCUMENT_QUESTION_ANSWERING",
        "TABLE_QUESTION_ANSWERING",
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "RETRIEVAL",
    ),
    "Time series and decisions": (
        "TIME_SERIES_PREDICTION",
        "TIME_SERIES_CLASSIFICATION",
        "TIME_SERIES_REGRESSION",
        "DECISION",
    ),
}
"""The auto mappings, by what docs/models.md calls them together."""

TIMM = "needs the library timm"
SIZES = "has sizes that depend on each other in ways that the tests' rules for tiny models do not follow"

UNBUILDABLE = {
    "DiffusionGemmaForBlockDiffusion": SIZES,
    "DinatForImageClassification": "needs the library natten",
    "EdgeTamModel": TIMM,
    "FastVlmForConditionalGeneration": TIMM,
    "Granite4VisionForConditionalGeneration": SIZES,
    "LayoutLMv2ForQuestionAnswering": "needs the library detectron2",
    "MoonshineStreamingForConditionalGeneration": SIZES,
    "NemotronH_Omni_Reasoning_V3": SIZES,
    "OmDetTurboForObjectDetection": TIMM,
    "PPOCRV5ServerDetForObjectDetection": SIZES,
    "PPOCRV6MediumDetForObjectDetection": SIZES,
    "PerceptionLMForConditionalGeneration": TIMM,
    "Qwen3OmniMoeForConditionalGeneration": SIZES,
    "Sam2Model": SIZES,
    "TimmWrapperForImageClassification": TIMM,
    "VibeVoiceForConditionalGeneration": SIZES,
}
"""Architectures that are not built here, by model class, with the reason."""

FURTHER_INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "BlipForQuestionAnswering": {"labels": torch.tensor([[70, 80, 90]])},  # the question is read for an answer only
    "TapasForQuestionAnswering": {  # the segment, column and row of each token: of those outside a table nothing is read
        "token_type_ids": torch.tensor([[[1, 1 + place % 2, 1 + place // 2, 0, 0, 0, 0] for place in range(6)]])
    },
}
"""What some models need to read all that they are given, by model class."""


def cases() -> dict[str, list[Case]]:
    """Every model class of the mappings that the sweep over text does not have, once, by group; its task is the mapping's name."""
    seen = {name for mapping in MAPPINGS.values() for names in mapping.values() for name in _listed(names)}
    found: dict[str, list[Case]] = {}
    for group, tasks in GROUPS.items():
        for task in tasks:
            mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
            for model_type, names in mapping.items():
                for name in _listed(names):
                    if name not in seen:
                        seen.add(name)
                        found.setdefault(group, []).append(Case(task, model_type, name))
    return found


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def inputs_of(model: Any) -> dict[str, torch.Tensor] | None:
    """
    Inputs that the model takes, of a batch of one, or `None`: in the shapes that the probe tries, with numbers of its own.

    Only shapes and names come from the code under test. That the model itself takes them is what tells whether they are right.
    """
    for seed, inputs in enumerate(probe_inputs(model, 6, None)):
        generator = torch.Generator().manual_seed(seed)
        inputs = {
            name: torch.randn(each.shape, generator=generator) if each.is_floating_point() else each
            for name, each in inputs.items()
        }
        inputs.update(FURTHER_INPUTS.get(type(model).__name__, {}))
        try:
            numbers_of(model, inputs)
        except Exception:  # noqa: BLE001, S112 - a model's forward raises anything
            continue
        return inputs
    return None


def numbers_of(model: Any, inputs: dict[str, torch.Tensor], with_gradients: bool = False) -> list[torch.Tensor]:
    """All tensors of numbers in a model's output, as far as they are of the model's choosing: with the same random numbers."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(with_gradients):
        return list(_tensors(model(**inputs)))


def _tensors(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from _tensors(each)
