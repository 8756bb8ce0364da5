"""The scale of a prefix's parameters, and its random start.

Adam moves a parameter by about the learning rate per step, whatever its gradient. Keys and values are numbers around
1, and a prefix learns best when a step moves it by a sizable fraction of that. A prefix that is itself the parameter
therefore needs learning rates of 0.1 and more. Here a parameter of 1 means several standard deviations of the module's
own keys or values, so the usual learning rates of LoRA suit it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..encoders import PrefixEncoder, ProjectedEncoder
from ..probing.geometry import spread
from .quiet import key_units


if TYPE_CHECKING:
    from ..config import PrefixPlusConfig
    from ..probing.geometry import AttentionGeometry


JOINT_SCALES = 16.0, 16.0
DECOUPLED_SCALES = 4.0, 4.0
"""Standard deviations of the base model's keys, and values, that a parameter of 1 stands for with `prefix_scaling=None`, by
whether the prefix has a softmax. Measured: docs/quality.md."""

GIVEN_SCALES = 8.0, 8.0
"""The same for a prefix with a softmax that starts from given keys and values, in their own standard deviations: what is good already
wants smaller steps."""

PROJECTED_JOINT = 1 / 4
PROJECTED_DECOUPLED = 1 / 8
"""What a projection has of these scales: all of its weights move every token, and each by about the learning rate."""


def scale_and_start(encoder: PrefixEncoder, config: PrefixPlusConfig, geometry: AttentionGeometry) -> None:
    """
    Set an encoder's scale, and fill the parameters that it owns at random.

    Except for the random numbers, the prefix starts the same under every `prefix_scaling`.

    Args:
        encoder (`PrefixEncoder`): The encoder of one attention module.
        config (`PrefixPlusConfig`): Its adapter's configuration.
        geometry (`AttentionGeometry`): The attention module's geometry.
    """
    stds = (spread(geometry.key), spread(geometry.value))
    if config.prefix_scaling is None:
        form = (DECOUPLED_SCALES, PROJECTED_DECOUPLED) if config.decoupled else (JOINT_SCALES, PROJECTED_JOINT)
        scaling = _measured_scaling(encoder, stds, *form)
    else:
        scaling = [config.prefix_scaling] * 2
    encoder.scaling.set(*scaling)
    key_std: float | torch.Tensor
    key_std, value_std = (std / factor for std, factor in zip(stds, scaling, strict=True))
    if config.init_weights == "zero":
        key_std = value_std = 0.0
    elif config.init_weights is True:
        key_std = key_units(geometry, bool(config.position_free)) / scaling[0]
        if not config.gating:  # values of zero would leave a closed gate without a gradient
            value_std = 0.0
    encoder.initialize_parameters(key_std, value_std)


def scale_as_given(encoder: PrefixEncoder, config: PrefixPlusConfig, key: torch.Tensor, value: torch.Tensor) -> None:
    """
    Set an encoder's scale to suit the keys and values that its prefix is about to start from, if the prefix has a softmax and its scale
    is a measured one.

    Args:
        encoder (`PrefixEncoder`): The encoder of one attention module.
        config (`PrefixPlusConfig`): Its adapter's configuration.
        key (`torch.Tensor`): The keys, (heads, tokens, key_dim).
        value (`torch.Tensor`): The values, (heads, tokens, value_dim).
    """
    if config.prefix_scaling is None and not config.decoupled:
        stds = (spread(key), spread(value))
        encoder.scaling.set(*_measured_scaling(encoder, stds, GIVEN_SCALES, PROJECTED_JOINT))


def _measured_scaling(
    encoder: PrefixEncoder, stds: tuple[float, float], scales: tuple[float, float], projected: float
) -> list[float]:
    """The factors on keys and on values of these standard deviations: `scales`, of which a projection has the share `projected`."""
    share = projected if isinstance(encoder, ProjectedEncoder) else 1.0
    return [scale * share * _power_of_two(std) for scale, std in zip(scales, stds, strict=True)]


def _power_of_two(number: float) -> float:
    """The power of two nearest to a number: products with it are exact, so scaling loses nothing."""
    return 2.0 ** round(math.log2(number))
