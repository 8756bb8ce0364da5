"""What a probe runs a model on: inputs that the user gives, or tokens and noise in the shapes that the model's config names."""

from __future__ import annotations

import inspect
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


Shape = tuple[int, ...]

TEXT_INPUTS = ("input_ids", "decoder_input_ids")
"""Arguments that are token ids."""

_given: ContextVar[Mapping[str, Any] | None] = ContextVar("example_inputs", default=None)


@contextmanager
def example_inputs(**inputs: Any) -> Iterator[None]:
    """
    Use these inputs wherever an adapter is added or loaded, instead of inputs made from the model's config.

    Adding an adapter runs the model once, to see the shapes of its keys and values. Most models need no help with that. One
    whose `forward` takes arguments of its own does. Without `target_modules`, the attention modules that these inputs reach
    get a prefix.

    Args:
        inputs: The arguments of the model's `forward`, of a batch of one. Where an encoder and a decoder have inputs, these
            should differ in length: that tells cross-attention from self-attention.

    Example:

    ```py
    >>> import torch
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> from peft_prefix_plus import PrefixPlusConfig, example_inputs

    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
    >>> model = ViTForImageClassification(ViTConfig(**sizes))
    >>> with example_inputs(pixel_values=torch.rand(1, 3, 16, 16)):
    ...     model = get_peft_model(model, PrefixPlusConfig(num_virtual_tokens=10))

    ```
    """
    token = _given.set(inputs)
    try:
        yield
    finally:
        _given.reset(token)


def given_inputs(model: nn.Module, device: torch.device | None) -> dict[str, Any] | None:
    """
    Return the inputs that the user gave by [`example_inputs`], on a device and in a model's dtype, or `None`.

    Args:
        model (`nn.Module`): The model.
        device (`torch.device`, *optional*): The device.
    """
    inputs = _given.get()
    if inputs is None:
        return None
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return _moved(inputs, next(dtypes, torch.float32), device)


def probe_inputs(
    model: PreTrainedModel, num_tokens: int, device: torch.device | None
) -> Iterator[dict[str, torch.Tensor]]:
    """
    Yield inputs for a model's forward, by name, in one way after another: the first that it takes will do.

    1. Its main input: tokens from all over the vocabulary, or noise in the shapes that its config names.
    2. Its `dummy_inputs`, if its class has some of its own.
    3. All inputs that its forward requires, or takes beside a text, and that are known here.

    Args:
        model (`PreTrainedModel`): The model.
        num_tokens (`int`): How many tokens a decoder gets. An encoder that reads text gets one more, so that lengths tell
            cross-attention and encoder from the decoder.
        device (`torch.device`, *optional*): Where to put them.
    """
    make = _Maker(model, num_tokens, device)
    parameters = inspect.signature(model.forward).parameters
    main = model.main_input_name if isinstance(model.main_input_name, str) else model.main_input_name[0]
    if main == "inputs":  # Perceiver's, of any kind: another argument says of which
        main = next((name for name in ("input_ids", "pixel_values") if name in parameters), main)
    if main not in _MAKERS and main not in TEXT_INPUTS:
        main = "input_ids"
    decoder = {}
    if getattr(model.config, "is_encoder_decoder", False) and (
        "decoder_input_ids" in parameters or main == "input_ids"
    ):
        decoder["decoder_input_ids"] = make.tokens(num_tokens)
    for tensors in make.ways(main):
        yield {**decoder, **tensors}
    if type(model).dummy_inputs is not PreTrainedModel.dummy_inputs:
        yield _moved(model.dummy_inputs, model.dtype, device)
    known = [
        name
        for name, parameter in parameters.items()
        if name != main and name in _MAKERS and (parameter.default is parameter.empty or main in TEXT_INPUTS)
    ]
    if not decoder:
        known += [name for name in TEXT_INPUTS if name in parameters and name != main]
    if known:
        further: dict[str, torch.Tensor] = {}
        for name in known:
            further.update(next(make.ways(name), {}))
        for tensors in make.ways(main):
            yield {**decoder, **further, **tensors}


def lone_inputs(
    module: nn.Module, num_tokens: int, dtype: torch.dtype, device: torch.device | None
) -> Iterator[dict[str, Any]]:
    """
    Yield inputs for an attention module alone, in one way after another: noise as wide as what its projections read.

    Args:
        module (`nn.Module`): The module.
        num_tokens (`int`): How many tokens.
        dtype (`torch.dtype`): The dtype of its hidden states.
        device (`torch.device`, *optional*): Where to put them.

    Raises:
        ValueError: If it has no linear projections, or wants an argument that is not known here.
    """
    widths = {name: _width_read(child) for name, child in module.named_children()}
    known = {name: width for name, width in widths.items() if width is not None}
    if not known:
        raise ValueError("it has no linear projections")
    width_of_keys = next((width for name, width in known.items() if name.startswith(("k", "kv"))), None)
    width = next(iter(known.values()))
    inputs: dict[str, Any] = {}
    further: dict[str, Any] = {}  # what cross-attention needs, and self-attention does not take
    parameters = inspect.signature(module.forward).parameters
    for index, (name, parameter) in enumerate(parameters.items()):
        is_required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if index == 0:
            inputs[name] = _noise((1, num_tokens, width), dtype, device)
        elif name in OTHER_STATES:
            states = _noise((1, num_tokens + 1, width_of_keys or width), dtype, device)
            (inputs if is_required else further)[name] = states
        elif name == "position_ids":
            inputs[name] = torch.arange(num_tokens, device=device)[None]
        elif is_required:
            if not re.search("mask|bias|position_embeddings", name):
                raise ValueError(f"its argument {name!r} is not known")
            inputs[name] = None
    rotations: list[dict[str, Any]] = [{}]
    if "position_embeddings" in parameters:
        dim = getattr(module, "head_dim", None) or width // _num_heads(module)
        rotated = getattr(module, "qk_rope_head_dim", None) or dim
        sizes = (rotated, rotated // 2)  # some get a number per plane of two dims
        ones = [torch.ones(1, num_tokens, size, dtype=dtype, device=device) for size in sizes]
        rotations = [{"position_embeddings": (each, torch.zeros_like(each))} for each in ones]
    for rotation in rotations:
        yield {**inputs, **rotation}
    if further:
        yield {**inputs, **rotations[0], **further}


OTHER_STATES = ("key_value_states", "encoder_hidden_states", "context", "key_states", "latents")
"""Arguments of attention modules that are further states, of what keys and values are made of for instance."""


def different_tokens(model: PreTrainedModel, num_tokens: int, device: torch.device | None) -> torch.Tensor:
    """Return token ids (1, num_tokens) spread evenly over a model's vocabulary."""
    # a model of characters has no vocabulary, and takes any small numbers
    size = getattr(model.config.get_text_config(), "vocab_size", num_tokens + 1)
    return (torch.arange(1, num_tokens + 1, device=device) * size // (num_tokens + 1))[None]


@dataclass(frozen=True)
class _Maker:
    """
    Makes inputs for a model.

    Attributes:
        model (`PreTrainedModel`): The model.
        num_tokens (`int`): How many tokens.
        device (`torch.device`, *optional*): Where to put them.
    """

    model: PreTrainedModel
    num_tokens: int
    device: torch.device | None

    def tokens(self, num_tokens: int) -> torch.Tensor:
        return different_tokens(self.model, num_tokens, self.device)

    def ways(self, name: str) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what an input may be, alone or with what belongs to it."""
        if name in TEXT_INPUTS:
            is_longer = getattr(self.model.config, "is_encoder_decoder", False) and name == "input_ids"
            yield {name: self.tokens(self.num_tokens + is_longer)}
            return
        for shapes in _MAKERS[name](self.model, self.num_tokens):
            yield {
                part: torch.ones(shape, dtype=torch.long, device=self.device)
                if part in _WHOLE_NUMBERS
                else _noise(shape, self.model.dtype, self.device)
                for part, shape in ({name: shapes} if isinstance(shapes, tuple) else shapes).items()
            }


_WHOLE_NUMBERS = {"past_observed_mask", "static_categorical_features", "bbox", "pixel_mask", "freq"}
"""Inputs that are ones: masks, classes, boxes."""


def setting(config: Any, *names: str) -> Any:
    """
    Return the first setting of one of these names, the earlier ones first, in a config or the configs in it, or `None`.

    Args:
        config: The config.
        names: The names.
    """
    for name in names:
        queue = deque([config])
        while queue:
            current = queue.popleft()
            value = getattr(current, name, None)
            if value is not None:
                return value
            queue.extend(item for item in vars(current).values() if isinstance(item, PreTrainedConfig))
    return None


def _image_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width); detectors, whose configs name no size, take any that has enough patches for their queries."""
    size = setting(config, "image_size", "img_size", "crop_size") or 224
    if isinstance(size, Mapping):
        size = size["height"], size["width"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return setting(config, "num_channels", "in_channels", "in_chans") or 3, int(height), int(width)


def _images(model: PreTrainedModel, num_tokens: int) -> Iterator[Shape]:
    shape = _image_shape(model.config)
    frames = setting(model.config, "num_frames", "frames_per_clip")
    if frames is not None:
        yield (1, frames, *shape)
    yield (1, *shape)
    yield (1, 1, *shape)  # several pictures, or tiles of one, per text


def _videos(model: PreTrainedModel, num_tokens: int) -> Iterator[Shape]:
    frames = setting(model.config, "num_frames", "frames_per_clip") or 4
    yield (1, frames, *_image_shape(model.config))


def _sounds(model: PreTrainedModel, num_tokens: int) -> Iterator[Shape]:
    """Samples, or a spectrogram of a fixed length."""
    config = model.config
    bins, length = setting(config, "num_mel_bins"), setting(config, "max_length")
    if bins is not None and length is not None:
        yield 1, length, bins
    strides = setting(config, "conv_stride")
    samples = 16000 if strides is None else math.prod(strides) * 4 * num_tokens
    yield 1, max(samples, 4000)
    yield 1, 1, max(samples, 4000)


def _spectrograms(model: PreTrainedModel, num_tokens: int) -> Iterator[Shape]:
    """Whisper has the bins first and one length; most others have them last and any length."""
    names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim", "feature_size")
    bins, positions = setting(model.config, *names) or 80, setting(model.config, "max_source_positions")
    if positions is not None:
        yield 1, bins, 2 * positions
    frames = 16 * num_tokens
    yield 1, frames, bins
    yield 1, bins, frames
    for module in model.modules():
        if isinstance(module, nn.Linear):  # some read several frames at once
            yield 1, frames, module.in_features
            return


def _series(model: PreTrainedModel, num_tokens: int) -> Iterator[Any]:
    """The past of time series, with the features and, for a decoder, the future that belong to it."""
    config = model.config
    length = setting(config, "context_length") or 4 * num_tokens
    channels = setting(config, "num_input_channels")
    if channels is not None:
        yield 1, length, channels
    lags, size = setting(config, "lags_sequence"), setting(config, "input_size") or 1
    if lags is not None:
        whole, future = length + max(lags), setting(config, "prediction_length")
        features = setting(config, "num_time_features") or 0
        variates = (size,) if size > 1 else ()
        series = {
            "past_values": (1, whole, *variates),
            "past_time_features": (1, whole, features),
            "past_observed_mask": (1, whole, *variates),
            "future_values": (1, future, *variates),
            "future_time_features": (1, future, features),
        }
        for name in ("static_categorical_features", "static_real_features"):
            count = setting(config, f"num_{name}")
            if count:
                series[name] = (1, count)
        yield series
    yield 1, length


def _boxes(model: PreTrainedModel, num_tokens: int) -> Iterator[Shape]:
    yield 1, num_tokens, 4


_MAKERS = {
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "inputs": _images,
    "input_values": _sounds,
    "audio_values": _sounds,
    "input_features": _spectrograms,
    "past_values": _series,
    "bbox": _boxes,
}
"""Functions that yield the shapes which an input may have, by its name; with other inputs that belong to it, as a dict."""


def _width_read(child: nn.Module) -> int | None:
    """How wide the states are that a linear projection reads, or `None` for other modules."""
    for name in ("in_features", "nx", "in_channels"):
        width = getattr(child, name, None)
        if isinstance(width, int):
            return width
    return None


def _num_heads(module: nn.Module) -> int:
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads")
    return next((count for name in names if isinstance(count := getattr(module, name, None), int)), 1)


def _moved(inputs: Mapping[str, Any], dtype: torch.dtype, device: torch.device | None) -> dict[str, Any]:
    """Bring tensors to a device, and those of numbers with a point to a dtype."""
    return {
        name: each.to(device, dtype if each.is_floating_point() else each.dtype)
        if isinstance(each, torch.Tensor)
        else each
        for name, each in inputs.items()
    }


def _noise(shape: Shape, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    if device is not None and device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def positions_before(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return the arguments that put tokens at the positions from which a prefix acts: those before the first real one.

    Keys that rotate by their position can have any: …, -2, -1. Positions that are learned, or looked up in a table, begin at 0,
    and there is nothing to give; as where queries are scaled by the logarithm of their position (Llama 4, Ministral 3).

    Args:
        model (`PreTrainedModel`): The model.
        inputs (`Mapping[str, torch.Tensor]`): The tokens, `input_ids` and perhaps `decoder_input_ids`, (1, tokens) each.
    """
    config = model.config.get_text_config()
    rotations = getattr(config, "rope_parameters", None) or {}
    scales_queries = "llama_4_scaling_beta" in rotations or getattr(config, "attn_temperature_tuning", False)
    has_rotary = any("RotaryEmbedding" in type(module).__name__ for module in model.modules())
    if scales_queries or not has_rotary:
        return {}
    taken = inspect.signature(model.forward).parameters
    names = {"input_ids": "position_ids", "decoder_input_ids": "decoder_position_ids"}
    return {
        position_name: torch.arange(-tokens.shape[1], 0, device=tokens.device)[None]
        for name, position_name in names.items()
        if position_name in taken and (tokens := inputs.get(name)) is not None
    }
