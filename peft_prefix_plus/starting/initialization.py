"""Starting a prefix from a text, or from given keys and values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.lookup import base_of, layers_with_adapter
from ..probing.inputs import positions_before
from ..probing.modules import attention_modules, execution_device
from ..probing.recording import evaluating, recording
from .fitting import KeyValue, Residual, fit


def initialize_from_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    adapter_name: str = "default",
    add_special_tokens: bool = True,
) -> dict[str, Residual]:
    """
    Start an adapter's prefix from the keys and values that the base model has for a text.

    With `reparameterization="none"` the model then gives what the base model gives when it reads the text before the input,
    at the positions -num_virtual_tokens, …, -1 where keys rotate by their position (RoPE), else at 0, 1, …: as long as
    nothing but the causal mask keeps the input from the text (no sliding window that is shorter), and the positions enter
    by the keys (no bias by distance, as of ALiBi or T5). The other reparameterizations are fitted to it (see
    [`initialize_from_key_values`]).

    A text's keys are at its own positions: where the model rotates keys, the adapter is `position_free=False` afterwards.

    Args:
        model (`nn.Module`): A model with the adapter.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        text (`str`): The text, of at least `num_virtual_tokens` tokens. Of a longer one, the first tokens count, with a
            warning.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        add_special_tokens (`bool`, defaults to `True`): Whether the tokenizer adds its special tokens to the text.

    Returns:
        `dict[str, Residual]`: By attention module, how far the prefix is from the text's keys and values: 0 for
        `reparameterization="none"`.

    Raises:
        TypeError: If the base model is not one of transformers.
        ValueError: If the model has no such adapter, or it is decoupled; if the text is too short, the model cannot read it, or it does not reach
            one of the adapter's attention modules. The adapter is then as it was.

    Warns:
        UserWarning: If the text is longer, or the adapter was position-free where that makes a difference.
    """
    layers = layers_with_adapter(model, adapter_name)
    if layers[0][1].is_decoupled[adapter_name]:
        raise ValueError(
            f"Adapter {adapter_name!r} is decoupled, and a text's keys and values act through the softmax that they share with the "
            "input's. Make the adapter with PrefixPlusConfig(decoupled=False), or with gating=True."
        )
    num_tokens = layers[0][1].prefix_key_value(adapter_name)[0].shape[1]
    token_ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    if len(token_ids) < num_tokens:
        raise ValueError(
            f"The text has {len(token_ids)} tokens and adapter {adapter_name!r} has num_virtual_tokens={num_tokens}. Give a "
            f"text of at least that many tokens, or make the adapter with num_virtual_tokens={len(token_ids)}."
        )
    if len(token_ids) > num_tokens:
        warnings.warn(
            f"The text has {len(token_ids)} tokens; the prefix starts from the first num_virtual_tokens={num_tokens}.",
            stacklevel=2,
        )
    base = base_of(model)
    key_values = _read(base, torch.tensor([token_ids[:num_tokens]], device=execution_device(base)))
    unread = [name for name, _ in layers if name not in key_values]
    if unread:
        raise ValueError(
            f"A text does not reach {', '.join(unread)}, where adapter {adapter_name!r} has a prefix. Use "
            "initialize_from_key_values with keys and values for these modules too."
        )
    residuals = initialize_from_key_values(model, {name: key_values[name] for name, _ in layers}, adapter_name)
    if any(layer.reads_unrotated(adapter_name) for _, layer in layers):
        warnings.warn(
            f"Adapter {adapter_name!r} is not position-free any more: the keys of a text act from the text's own positions. Make "
            "the adapter with position_free=False if that is what you want.",
            stacklevel=2,
        )
        configs: Any = base.peft_config
        configs[adapter_name].position_free = False
        for _, layer in layers:
            layer.set_position_free(adapter_name, False, layer.rotation)
    return residuals


def initialize_from_key_values(
    model: nn.Module, key_values: Mapping[str, KeyValue], adapter_name: str = "default"
) -> dict[str, Residual]:
    """
    Start an adapter's prefix from given keys and values.

    With `reparameterization="none"` the prefix is exactly that. For `"linear"` and `"mlp"` the parameters are fitted in
    closed form: by a truncated singular value decomposition and least squares, over all layers that share parameters.

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
        ValueError: If the model has no such adapter, or the keys and values do not fit it. The adapter is then as it was.
    """
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
    return fit(encoders, key_values)


def _read(model: nn.Module, token_ids: torch.Tensor) -> dict[str, KeyValue]:
    """Return the keys and values that a base model has for a text, (1, tokens), before an input, by attention module."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"A text can be read by a model of transformers, got a {type(model).__name__}.")
    inputs = {"input_ids": token_ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = token_ids
    inputs.update(positions_before(model, inputs))
    found: dict[str, KeyValue] = {}

    def record(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: Any) -> None:
        found.setdefault(name, (key[0], value[0]))

    with recording(attention_modules(model), record), evaluating(model):
        try:
            model(**inputs)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot read a text of {token_ids.shape[1]} tokens by itself: a forward with "
                f"{sorted(inputs)} failed ({type(error).__name__}: {error}). Use initialize_from_key_values."
            ) from error
    return found
