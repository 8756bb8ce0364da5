"""The inputs of a probe: tokens, and noise in the shapes that the model's config names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .shapes import SHAPES, WHOLE_NUMBERS
from .tensors import moved, noise


TEXT_INPUTS = ("input_ids", "decoder_input_ids")
"""Arguments that are token ids."""


def probe_inputs(
    model: PreTrainedModel, num_tokens: int, device: torch.device | None
) -> Iterator[dict[str, torch.Tensor]]:
    """
    Yield candidate inputs for a model's forward, by name. The first that the model accepts is enough.

    1. Its main input: tokens from all over the vocabulary, or noise in the shapes that its config names.
    2. Its `dummy_inputs`, if its class defines them.
    3. All inputs that its forward requires, or accepts beside a text, and that are known here.

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
    if main not in SHAPES and main not in TEXT_INPUTS:
        main = "input_ids"
    decoders: list[dict[str, torch.Tensor]] = [{}]
    if getattr(model.config, "is_encoder_decoder", False) and (
        "decoder_input_ids" in parameters or main == "input_ids"
    ):
        decoders = list(make.ways("decoder_input_ids"))
    for decoder in decoders:
        for tensors in make.ways(main):
            yield {**decoder, **tensors}
    if type(model).dummy_inputs is not PreTrainedModel.dummy_inputs:
        yield moved(model.dummy_inputs, model.dtype, device)
    known = [
        name
        for name, parameter in parameters.items()
        if name != main and name in SHAPES and (parameter.default is parameter.empty or main in TEXT_INPUTS)
    ]
    if decoders == [{}]:
        known += [name for name in TEXT_INPUTS if name in parameters and name != main]
    if known:
        further: dict[str, torch.Tensor] = {}
        for name in known:
            further.update(next(make.ways(name), {}))
        for tensors in make.ways(main):
            yield {**decoders[0], **further, **tensors}


def text_config(config: PreTrainedConfig, of_decoder: bool) -> PreTrainedConfig:
    """
    The part of a model's config that is about text. If the encoder and the decoder each have one, the requested one.
    """
    has_both = getattr(config, "text_encoder", None) is not None and getattr(config, "decoder", None) is not None
    return config.get_text_config(decoder=of_decoder, encoder=not of_decoder) if has_both else config.get_text_config()


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

    def tokens(self, name: str) -> torch.Tensor:
        """Return token ids (1, tokens) spread evenly over the vocabulary, one more for an encoder than for a decoder."""
        is_encoder = getattr(self.model.config, "is_encoder_decoder", False) and name == "input_ids"
        count = self.num_tokens + is_encoder
        # a model of characters has no vocabulary, and takes any small numbers
        size = getattr(text_config(self.model.config, not is_encoder), "vocab_size", None) or count + 1
        return (torch.arange(1, count + 1, device=self.device) * size // (count + 1))[None]

    def ways(self, name: str) -> Iterator[dict[str, torch.Tensor]]:
        """Yield candidates for an input, with the further inputs that it needs."""
        if name in TEXT_INPUTS:
            tokens = self.tokens(name)
            yield {name: tokens}
            # Sound as text has the ids of several codebooks at a time, and perhaps a text token with them (Kyutai): as further
            # numbers of a token, or as further rows.
            config = text_config(self.model.config, name == "decoder_input_ids")
            count = getattr(config, "num_codebooks", None) or getattr(config, "num_channels", None) or 1
            if count > 1:
                yield {name: tokens[..., None].expand(-1, -1, count)}
                yield {name: tokens.expand(count, -1)}
                yield {name: tokens[..., None].expand(-1, -1, count + 1)}
            return
        for shapes in SHAPES[name](self.model, self.num_tokens):
            yield {
                part: torch.ones(shape, dtype=torch.long, device=self.device)
                if part in WHOLE_NUMBERS
                else noise(shape, self.model.dtype, self.device)
                for part, shape in ({name: shapes} if isinstance(shapes, tuple) else shapes).items()
            }


def positions_before(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return the arguments that put tokens at the positions from which a prefix acts: those before the first real one.

    Keys that rotate by their position can have any position: …, -2, -1. Positions that are learned, or looked up in a
    table, begin at 0, and no arguments are needed. The same holds if queries are scaled by the logarithm of their
    position (Llama 4, Ministral 3).

    Args:
        model (`PreTrainedModel`): The model.
        inputs (`Mapping[str, torch.Tensor]`): The tokens, `input_ids` and perhaps `decoder_input_ids`, (1, tokens) each.
    """
    config = text_config(model.config, of_decoder=True)
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
