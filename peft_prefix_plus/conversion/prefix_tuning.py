"""Converting adapters of PEFT's PREFIX_TUNING to PREFIX_PLUS adapters with the same output, and back."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftModel, PeftType, PrefixTuningConfig
from torch import nn

from ..saving.prefix_tuning_folder import CONVERTERS
from .cached_prefix import CachedPrefix, from_cached_prefix, to_cached_prefix


_METHOD = CachedPrefix(PeftType.PREFIX_TUNING, PrefixTuningConfig)


def from_prefix_tuning(
    adapter: str | os.PathLike[str] | PeftModel,
    model: nn.Module | None = None,
    adapter_name: str = "default",
    allow_pickle: bool = False,
    **hub_arguments: Any,
) -> PeftModel:
    """
    Convert an adapter of PEFT's PREFIX_TUNING to a PREFIX_PLUS adapter with the same output.

    PREFIX_TUNING moves the real tokens' positions by L_p, the length of the prefix. With rotary positions R, a query
    at position t there scores a prefix's key k as (R(t + L_p) q)ᵀ k = (R(t) q)ᵀ R(−L_p) k. With unmoved positions, the
    keys with the same scores are k rotated back by L_p positions. Values stay. The rotation of a model's attention
    modules is measured on their own keys, and the logits of both methods are compared on a random text before anything
    is returned.

    Args:
        adapter (`str`, `os.PathLike` or `PeftModel`):
            A directory or a repository on the Hub with the saved adapter, or a model that has it as its active
            adapter. The result takes over the base model of such a `PeftModel`, which you must not use afterwards.
        model (`nn.Module`, *optional*): The base model, where `adapter` is not a model itself. It is adapted in place.
        adapter_name (`str`, defaults to `"default"`): The name of the new adapter.
        allow_pickle (`bool`, defaults to `False`):
            Also load an adapter that was not saved in the safetensors format. PEFT then unpickles tensors only.
        hub_arguments: `revision`, `subfolder`, `token`, `cache_dir` and so on, as for [`PeftModel.from_pretrained`].

    Returns:
        `PeftModel`: The model with the new adapter, `reparameterization="none"`, which can be trained further.

    Raises:
        TypeError: If `model` is missing or has adapters, or is given along with a `PeftModel`.
        ValueError: If there is no PREFIX_TUNING adapter, or no prefix here gives the same output on this model: with
            learned positions or position biases (GPT-2, OPT, Bloom, T5), moving positions changes more than keys. The
            model is then left as it was.

    Warns:
        UserWarning: If the outputs are equal only up to some length of text: beyond a sliding window PREFIX_TUNING's
            prefix is lost and this one is not, and rotary frequencies that depend on the length change L_p tokens
            earlier there.

    Example:

    ```py
    >>> from peft import PrefixTuningConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import from_prefix_tuning

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
    >>> from_prefix_tuning(model).peft_config["default"].peft_type.value
    'PREFIX_PLUS'

    ```
    """
    return from_cached_prefix(_METHOD, adapter, model, adapter_name, allow_pickle, **hub_arguments)


def to_prefix_tuning(
    model: PeftModel, adapter_name: str = "default", save_directory: str | os.PathLike[str] | None = None
) -> tuple[PrefixTuningConfig, dict[str, torch.Tensor]]:
    """
    Convert a PREFIX_PLUS adapter to an adapter of PEFT's PREFIX_TUNING with the same output, which PEFT loads without
    this package. This is the inverse of [`from_prefix_tuning`]: the keys are rotated by L_p positions. Of a
    reparameterization, only the prefix that it computes remains.

    Args:
        model (`PeftModel`): A model with the adapter, which is left as it is.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        save_directory (`str` or `os.PathLike`, *optional*): A directory to save `adapter_config.json` and
            `adapter_model.safetensors` in.

    Returns:
        `tuple[PrefixTuningConfig, dict[str, torch.Tensor]]`: The configuration, and the tensors as PEFT saves them:
        `prompt_embeddings`, (num_virtual_tokens, num_layers · 2 · kv_heads · head_dim), and those of `modules_to_save`.

    Raises:
        TypeError: If `model` is not a `PeftModel`.
        ValueError: If PREFIX_TUNING cannot express the adapter (position-free, a gate, some layers only, cross-attention or an encoder, keys
            and values of different shapes), or does not give the same output on this model.

    Warns:
        UserWarning: As [`from_prefix_tuning`].
    """
    return to_cached_prefix(_METHOD, model, adapter_name, save_directory)


CONVERTERS[PeftType.PREFIX_TUNING] = to_prefix_tuning
