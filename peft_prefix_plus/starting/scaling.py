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
        scales = DECOUPLED_SCALES if config.decoupled else JOINT_SCALES
        share = _share(encoder, bool(config.decoupled))
        scaling = [scale * share * _power_of_two(std) for scale, std in zip(scales, stds, strict=True)]
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


def scale_as_given(encoder: PrefixEncoder, key: torch.Tensor, value: torch.Tensor) -> None:
    """
    Set an encoder's scale to suit the keys and values that its prefix is about to start from.

    Args:
        encoder (`PrefixEncoder`): The encoder of one attention module of a joint or gated prefix, whose `prefix_scaling` is `None`.
        key (`torch.Tensor`): The keys, (heads, tokens, key_dim).
        value (`torch.Tensor`): The values, (heads, tokens, value_dim).
    """
    share, pairs = _share(encoder, False), zip(GIVEN_SCALES, (key, value), strict=True)
    encoder.scaling.set(*(scale * share * _power_of_two(spread(states)) for scale, states in pairs))


def _share(encoder: PrefixEncoder, is_decoupled: bool) -> float:
    """What an encoder has of the scale of a prefix that is itself the parameter."""
    if not isinstance(encoder, ProjectedEncoder):
        return 1.0
    return PROJECTED_DECOUPLED if is_decoupled else PROJECTED_JOINT


def _power_of_two(number: float) -> float:
    """The power of two nearest to a number: products with it are exact, so scaling loses nothing."""
    return 2.0 ** round(math.log2(number))
