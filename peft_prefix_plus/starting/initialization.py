"""Starting a prefix from a text, or from given keys and values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..adapters.lookup import base_of, layers_with_adapter
from ..adapters.snapshot import all_or_nothing
from ..layer import PrefixPlusLayer
from .compaction import AttentionResidual, Reading, compact, matching_error
from .fitting import KeyValue, Residual, fit
from .reading import PIECE, read, read_again
from .scaling import scale_as_given


METHODS = ("first", "attention")
"""The ways from a text to a shorter prefix."""


def initialize_from_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    adapter_name: str = "default",
    add_special_tokens: bool = True,
    method: str = "first",
    prompts: Sequence[str] | None = None,
) -> dict[str, Residual] | dict[str, AttentionResidual]:
    """
    Start an adapter's prefix from the keys and values that the base model computes for a text.

    `method="first"` uses the first `num_virtual_tokens` tokens. With `reparameterization="none"` the model then gives the same
    output as the base model that reads these tokens before the input: at the positions -num_virtual_tokens, …, -1 if keys
    rotate by their position (RoPE), else at 0, 1, …. This holds if only the causal mask hides text from the input (no shorter
    sliding window), and if positions enter through the keys (no distance bias, as in ALiBi or T5).

    `method="attention"` replaces the whole text, however long. In each head it takes the keys that queries attend to most, and
    fits values by least squares, so that attention is close to attention over the whole text (attention matching, arXiv
    2602.16284). The queries are those of the text, which the base model reads a second time after itself, and of `prompts`.
    There is no training.

    With the other reparameterizations the encoders are fitted to these keys and values (see [`initialize_from_key_values`]).

    A text's keys are at its own positions. If the model rotates keys, `method="first"` therefore makes the adapter
    `position_free=False`. `method="attention"` does not change that field.

    Args:
        model (`nn.Module`): A model with the adapter.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        text (`str`): The text, of at least `num_virtual_tokens` tokens.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        add_special_tokens (`bool`, defaults to `True`): Whether the tokenizer adds its special tokens to the text.
        method (`str`, defaults to `"first"`): `"first"` or `"attention"`.
        prompts (`Sequence[str]`, *optional*):
            Likely questions about the text, as the model will see them, chat template included. Their queries count as
            well as the text's own. Only with `method="attention"`.

    Returns:
        `dict[str, Residual]` or `dict[str, AttentionResidual]`: By attention module, how far the prefix is from the text's keys
        and values (with `"first"`: 0 for `reparameterization="none"`), or attention with the prefix from attention with the text
        (with `"attention"`).

    Raises:
        TypeError: If the base model is not one of transformers.
        ValueError: If the model has no such adapter, or it is decoupled, or with `"attention"` has a gate; if the text is too short,
            the model cannot read it, or it does not reach one of the adapter's attention modules. The adapter is then as it was.

    Warns:
        UserWarning: With `"first"`, if the text is longer, or the adapter was position-free where that makes a difference.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
    if prompts is not None and method != "attention":
        raise ValueError(f'`prompts` are read with method="attention" only, got method={method!r}.')
    layers = dict(layers_with_adapter(model, adapter_name))
    if any(layer.is_decoupled[adapter_name] for layer in layers.values()):
        raise ValueError(
            f"Adapter {adapter_name!r} is decoupled, and a text's keys and values act through the softmax that they share with the "
            "input's. Make the adapter with PrefixPlusConfig(decoupled=False), or with gating=True."
        )
    num_tokens = next(iter(layers.values())).prefix_key_value(adapter_name)[0].shape[1]
    token_ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    if len(token_ids) < num_tokens:
        raise ValueError(
            f"The text has {len(token_ids)} tokens and adapter {adapter_name!r} has num_virtual_tokens={num_tokens}. Give a "
            f"text of at least that many tokens, or make the adapter with num_virtual_tokens={len(token_ids)}."
        )
    if method == "attention":
        prompt_ids = _prompt_ids(tokenizer, prompts or ())
        return _match_attention(model, adapter_name, layers, token_ids, prompt_ids, num_tokens)
    return _take_first(model, adapter_name, layers, token_ids, num_tokens)


def _take_first(
    model: nn.Module, adapter_name: str, layers: dict[str, PrefixPlusLayer], token_ids: list[int], num_tokens: int
) -> dict[str, Residual]:
    """Start a prefix from the first tokens of a text."""
    if len(token_ids) > num_tokens:
        warnings.warn(
            f"The text has {len(token_ids)} tokens; the prefix starts from the first num_virtual_tokens={num_tokens}. "
            'method="attention" stands for the whole text.',
            stacklevel=3,
        )
    base = base_of(model)
    key_values = _key_values(base, adapter_name, layers, token_ids[:num_tokens])
    with all_or_nothing(model, adapter_name=adapter_name):
        residuals = initialize_from_key_values(model, key_values, adapter_name)
        if any(layer.reads_unrotated(adapter_name) for layer in layers.values()):
            warnings.warn(
                f"Adapter {adapter_name!r} is not position-free any more: the keys of a text act from the text's own positions. Make "
                "the adapter with position_free=False if that is what you want.",
                stacklevel=3,
            )
            configs: Any = base.peft_config
            configs[adapter_name] = replace(configs[adapter_name], position_free=False)
            for layer in layers.values():
                layer.set_position_free(adapter_name, False, layer.rotation)
    return residuals


def _match_attention(
    model: nn.Module,
    adapter_name: str,
    layers: dict[str, PrefixPlusLayer],
    token_ids: list[int],
    prompts: list[list[int]],
    num_tokens: int,
) -> dict[str, AttentionResidual]:
    """Start a prefix from a whole text, by attention matching."""
    if not all(layer.is_joint(adapter_name) for layer in layers.values()):
        raise ValueError(
            f'Adapter {adapter_name!r} has a gate and a softmax of its own, and method="attention" matches one over the prefix and the '
            'real tokens. Make the adapter with PrefixPlusConfig(decoupled=False), or use method="first".'
        )
    base = base_of(model)
    key_values = _key_values(base, adapter_name, layers, token_ids)
    unrotated = [name for name, layer in layers.items() if layer.reads_unrotated(adapter_name)]
    compacted: dict[str, KeyValue] = {}
    measured: dict[str, list[Reading]] = {}

    def use(name: str, fitted: list[Reading], held_out: list[Reading]) -> None:
        if len(token_ids) == num_tokens and name not in unrotated:
            compacted[name] = key_values[name]  # the text itself
        else:
            pairs = zip(fitted, *key_values[name], strict=True)
            found = [compact(reading, key.float(), value.float(), num_tokens) for reading, key, value in pairs]
            compacted[name] = torch.stack([key for key, _ in found]), torch.stack([value for _, value in found])
        measured[name] = held_out

    pieces = [token_ids[start : start + PIECE] for start in range(0, len(token_ids), PIECE)]
    read_again(base, token_ids, [*pieces, *prompts], key_values, unrotated, use)
    _start(model, adapter_name, compacted, scaled_to=key_values)
    with torch.no_grad():
        return {
            name: matching_error(measured[name], *layer.prefix_key_value(adapter_name))
            for name, layer in layers.items()
        }


def _key_values(
    base: nn.Module, adapter_name: str, layers: dict[str, PrefixPlusLayer], token_ids: list[int]
) -> dict[str, KeyValue]:
    """Return a text's keys and values in the modules of an adapter, or raise if it does not reach one."""
    key_values = read(base, token_ids)
    unread = [name for name in layers if name not in key_values]
    if unread:
        raise ValueError(
            f"A text does not reach {', '.join(unread)}, where adapter {adapter_name!r} has a prefix. Use "
            "initialize_from_key_values with keys and values for these modules too."
        )
    return {name: key_values[name] for name in layers}


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    found = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise ValueError(f"Each of `prompts` must have at least one token; {prompt!r} has none.")
    return found


def initialize_from_key_values(
    model: nn.Module, key_values: Mapping[str, KeyValue], adapter_name: str = "default"
) -> dict[str, Residual]:
    """
    Start an adapter's prefix from given keys and values.

    With `reparameterization="none"` the prefix equals them. For `"linear"` and `"mlp"` the parameters are fitted in
    closed form, by a truncated singular value decomposition and least squares, over all layers that share parameters. `"log"`,
    which `PrefixPlusConfig()` resolves to, learns a distance from a start of its own and takes no other.

    With `prefix_scaling=None`, the scale of a joint or gated prefix is set anew to suit them: half of what it is for a random start.

    Args:
        model (`nn.Module`): A model with the adapter.
        key_values (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): What [`prefix_key_values`] returns: for each
            attention module of the adapter, keys (kv_heads, num_virtual_tokens, key_dim) as they enter attention (rotated,
            unless the adapter is position-free), and values (kv_heads, num_virtual_tokens, value_dim).
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Returns:
        `dict[str, Residual]`: By attention module, how far the prefix is from the keys and from the values: the norm of
        the difference, relative to theirs.

    Raises:
        ValueError: If the model has no such adapter, the keys and values do not fit it, or its reparameterization cannot be
            fitted. The adapter is then as it was.
    """
    return _start(model, adapter_name, key_values, scaled_to=key_values)


def _start(
    model: nn.Module, adapter_name: str, key_values: Mapping[str, KeyValue], scaled_to: Mapping[str, KeyValue]
) -> dict[str, Residual]:
    """Start an adapter's prefix from keys and values, on a scale that suits those of `scaled_to`."""
    encoders = {name: layer.encoder(adapter_name) for name, layer in layers_with_adapter(model, adapter_name)}
    if set(key_values) != set(encoders):
        odd = sorted(set(key_values).symmetric_difference(encoders))
        raise ValueError(
            f"`key_values` must have the attention modules of adapter {adapter_name!r}, {', '.join(encoders)}: "
            f"{', '.join(odd)} {'is' if len(odd) == 1 else 'are'} missing or too many."
        )
    with torch.no_grad():
        for name, encoder in encoders.items():
            pair = key_values[name]
            is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
            if not is_pair or not all(isinstance(each, torch.Tensor) for each in pair):
                raise ValueError(
                    f"`key_values` must have a tensor of keys and one of values for {name}, got {pair!r}."
                )
            for kind, given, present in zip(("keys", "values"), pair, encoder(), strict=True):
                if given.shape != present.shape:
                    raise ValueError(
                        f"The {kind} of {name} must have shape {tuple(present.shape)} (heads, num_virtual_tokens, dim), got "
                        f"{tuple(given.shape)}."
                    )
                if not bool(given.isfinite().all()):
                    raise ValueError(f"The {kind} of {name} must be finite numbers; some are not.")
    configs: Any = base_of(model).peft_config
    with all_or_nothing(model, adapter_name=adapter_name):
        for name, encoder in encoders.items():
            scale_as_given(encoder, configs[adapter_name], *scaled_to[name])
        return fit(encoders, key_values)
