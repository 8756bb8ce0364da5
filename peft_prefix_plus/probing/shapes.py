"""The shapes of images, sounds and series that a model takes, as its config names them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


Shape = tuple[int, ...]


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
    """Whisper has the bins first and a fixed length; most others have them last and accept any length."""
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


def _tasks(model: PreTrainedModel, num_tokens: int) -> Iterator[Shape]:
    """The name of a task, as ids of a fixed length (OneFormer)."""
    yield 1, setting(model.config, "task_seq_len") or num_tokens


SHAPES = {
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "inputs": _images,
    "input_values": _sounds,
    "audio_values": _sounds,
    "input_features": _spectrograms,
    "past_values": _series,
    "bbox": _boxes,
    "task_inputs": _tasks,
}
"""Functions that yield the shapes which an input may have, by its name; with other inputs that belong to it, as a dict."""


WHOLE_NUMBERS = {"past_observed_mask", "static_categorical_features", "bbox", "pixel_mask", "freq", "task_inputs"}
"""Inputs that are ones: masks, classes, boxes, ids."""
