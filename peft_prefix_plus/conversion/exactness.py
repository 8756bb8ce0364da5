"""
Whether, and up to which length of text, a method of PEFT and PREFIX_PLUS give the same output, measured on the model
itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..probing.modules import attention_modules
from ..probing.recording import recording
from .measured_rotations import Rotation, candidate_rotations, closest_rotation


NUM_TOKENS = 16
"""Length of the random text on which a conversion is measured and verified."""

TOLERANCE = {torch.float64: 5e-5, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""
How much of the norm of its keys or queries a rotation may leave unexplained, by the base model's dtype. Rounding leaves about
a tenth of this in 16 layers (rotary angles are float32 in any dtype).
"""

OUTPUT_TOLERANCE = 1e-5
"""How far the outputs may differ where moving the text alone changes nothing, as a multiple of the largest (and of 1)."""

ROUNDING = 8.0
"""How many times further they may differ than moving the text alone changes them, which is rounding where rotations fit."""


@dataclass(frozen=True)
class Attended:
    """The queries, keys and values of one attention module on a text, (heads or kv_heads, tokens, dim) each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def random_text(base: Any, exact: tuple[int, str] | None) -> dict[str, torch.Tensor]:
    """
    A row of random token ids without special tokens, the same every time, and no longer than the conversion is exact.
    """
    num_tokens = NUM_TOKENS if exact is None else min(NUM_TOKENS, exact[0])
    special = {
        number
        for name, value in base.config.get_text_config().to_dict().items()
        if name.endswith(("token_id", "token_index"))
        for number in (value if isinstance(value, list) else [value])
    }
    vocabulary = getattr(base.get_input_embeddings(), "num_embeddings", None)
    if vocabulary is None:
        raise ValueError(
            f"{type(base).__name__} takes no plain text as input, so a conversion cannot be verified on it."
        )
    plain = torch.tensor([number for number in range(vocabulary) if number not in special])
    ids = plain[torch.randint(len(plain), (1, num_tokens), generator=torch.Generator().manual_seed(0))]
    return {"input_ids": ids.to(base.device), "attention_mask": torch.ones_like(ids).to(base.device)}


def record_attention(base: nn.Module, run: Any) -> tuple[dict[str, Attended], torch.Tensor]:
    """Return what every attention module attends to while `run` runs the base model, and the output of `run`."""
    attended = {}

    def record(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: Any) -> None:
        attended[name] = Attended(query[0].detach(), key[0].detach(), value[0].detach())

    with recording(attention_modules(base), record), torch.no_grad():
        output = run()[0]
    return attended, output


def run_with_cache(
    base: Any, source: PeftModel, inputs: Mapping[str, torch.Tensor], length: int, is_seen: bool
) -> Any:
    """Run the base model as a method of PEFT does, on a cache that holds the prefix, visible to the text or not."""
    mask = inputs["attention_mask"]
    prefix_mask = mask.new_full((len(mask), length), int(is_seen))
    return base(
        input_ids=inputs["input_ids"],
        attention_mask=torch.cat([prefix_mask, mask], dim=1),
        past_key_values=source.get_prompt(batch_size=len(mask)),
    )


def prefixes_in(
    recorded: Mapping[str, Attended], num_tokens: int, length: int, method: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the prefixes in the recorded attention, by the names of the modules that have one."""
    prefixed = {
        name: (attended.key[:, :length], attended.value[:, :length])
        for name, attended in recorded.items()
        if attended.key.shape[1] == num_tokens + length
    }
    if not prefixed:
        raise ValueError(
            f"{method}'s prefix does not reach any attention module of this model, so there is nothing to convert."
        )
    return prefixed


def measured_rotations(
    base: Any,
    source: PeftModel,
    names: Mapping[str, Any],
    inputs: Mapping[str, torch.Tensor],
    length: int,
    method: str,
) -> tuple[dict[str, Rotation], float]:
    """
    Measure the rotation by which each module's keys and queries follow their positions. The model runs the same text
    at its own positions and, after a prefix that the text does not see, `length` positions later.

    Returns:
        `tuple[dict[str, Rotation], float]`: The rotations by module, and the change of the output by the move alone.
    """
    here, output = record_attention(base, lambda: base(**inputs))
    moved, moved_output = record_attention(base, lambda: run_with_cache(base, source, inputs, length, is_seen=False))
    rotations = {}
    for name in names:
        candidates = candidate_rotations(base, here[name].key.shape[-1])
        rotation, key_error = closest_rotation(candidates, here[name].key, moved[name].key[:, length:], length)
        _, query_error = closest_rotation([rotation], here[name].query, moved[name].query, length)
        error = max(key_error, query_error)
        if error > TOLERANCE[base.dtype]:
            raise ValueError(
                f"The conversion is not exact for {type(base).__name__}: {method} moves the real tokens' positions by "
                f"{length}, and the keys and queries of {name} do not follow by one rotation (the closest leaves "
                f"{error:.2%} of them). This is so for instance where positions are learned, as in GPT-2: the tokens themselves change. "
                "Train a new adapter."
            )
        rotations[name] = rotation
    return rotations, (moved_output - output).abs().max().item()


def check_equal(
    base: Any, found: torch.Tensor, expected: torch.Tensor, rounding: float, length: int, method: str
) -> None:
    """Raise if outputs differ by more than rounding, measured as the change of the output by moving the text alone."""
    difference = (found - expected).abs().max().item()
    limit = max(OUTPUT_TOLERANCE * max(1.0, expected.abs().max().item()), ROUNDING * rounding)
    if not difference <= limit:
        raise ValueError(
            f"The conversion is not exact for {type(base).__name__}: on a random text the outputs of {method} and "
            f"PREFIX_PLUS differ by {difference:.2g}, more than rounding ({limit:.2g}). {method} moves the real tokens' "
            f"positions by {length}. That can be undone for rotary positions, but not for instance where positions are "
            "learned (GPT-2, OPT, BERT), or are a bias on the scores that the prefix has too (ALiBi in Bloom and MPT). Train "
            "a new adapter."
        )


# ------------------------------------------------------------------------------------------------------ how far it holds


def exact_up_to(base: Any, length: int, method: str) -> tuple[int, str] | None:
    """
    Return the number of real tokens up to which both methods give the same output, with the reason; `None` for any number.

    Raises:
        ValueError: If there is not even one.
    """
    bounds = [(bound - length, reason) for bound, reason in _bounds(base.config.get_text_config(), method)]
    if not bounds:
        return None
    num_tokens, reason = min(bounds)
    if num_tokens < 1:
        raise ValueError(
            f"The conversion is not exact for {type(base).__name__}, not even for one token: the prefix has {length} "
            f"virtual tokens, and {reason}."
        )
    return num_tokens, reason


def _bounds(config: Any, method: str) -> Iterator[tuple[int, str]]:
    """
    Yield, with the reason, the last position (from 1) up to which attention does not depend on where a text begins.
    """
    kinds = getattr(config, "layer_types", None) or ()
    for field, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked")):
        bound = getattr(config, field, None)
        if bound is not None and (not kinds or any(kind in each for each in kinds)):
            yield bound, f"{method}'s prefix is not seen beyond `{field}` = {bound}, and PREFIX_PLUS's is"
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4, which counts positions from 1 here
        yield (
            config.floor_scale - 1,
            f"queries change their scale with their position, at `floor_scale` = {config.floor_scale}",
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in parameters.values() if all(isinstance(value, dict) for value in parameters.values()) else [parameters]:
        rope_type = rope.get("rope_type", "default")
        original: Any = rope.get("original_max_position_embeddings") or getattr(
            config, "max_position_embeddings", None
        )
        if "dynamic" in rope_type or rope_type == "longrope":
            yield original, f"rotary frequencies of type {rope_type!r} change at position {original}"
        if "llama_4_scaling_beta" in rope:  # Ministral 3
            yield original, f"queries change their scale with their position, at {original}"


def warn_of_length(exact: tuple[int, str] | None) -> None:
    if exact is not None:
        num_tokens, reason = exact
        warnings.warn(
            f"Both methods give the same output for up to {num_tokens} tokens of text. Beyond, {reason}.", stacklevel=4
        )
