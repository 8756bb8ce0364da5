"""Converting adapters of PEFT's CARTRIDGE to PREFIX_PLUS adapters with the same output, and back."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import CartridgeConfig, PeftModel, PeftType
from torch import nn

from .cached_prefix import CachedPrefix, from_cached_prefix, to_cached_prefix


def from_cartridge(
    adapter: str | os.PathLike[str] | PeftModel,
    model: nn.Module | None = None,
    adapter_name: str = "default",
    allow_pickle: bool = False,
    **hub_arguments: Any,
) -> PeftModel:
    """
    Convert an adapter of PEFT's CARTRIDGE to a PREFIX_PLUS adapter with the same output.

    CARTRIDGE passes its keys and values to the model as PREFIX_TUNING does. [`from_prefix_tuning`] therefore describes
    this conversion too: when it is exact, how that is measured, and what happens to the model. If you train the new
    adapter further, CARTRIDGE's frozen first tokens are trained like all others.

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
        ValueError: If there is no CARTRIDGE adapter, or no prefix here gives the same output on this model. The model is then left
            as it was.

    Warns:
        UserWarning: If the outputs are equal only up to some length of text.

    Example:

    ```py
    >>> from peft import CartridgeConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import from_cartridge

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
    >>> from_cartridge(model).peft_config["default"].peft_type.value
    'PREFIX_PLUS'

    ```
    """
    method = CachedPrefix(PeftType.CARTRIDGE, CartridgeConfig)
    return from_cached_prefix(method, adapter, model, adapter_name, allow_pickle, **hub_arguments)


def to_cartridge(
    model: PeftModel,
    adapter_name: str = "default",
    save_directory: str | os.PathLike[str] | None = None,
    num_frozen_tokens: int = 1,
) -> tuple[CartridgeConfig, dict[str, torch.Tensor]]:
    """
    Convert a PREFIX_PLUS adapter to an adapter of PEFT's CARTRIDGE with the same output, which PEFT loads without this
    package. This is the inverse of [`from_cartridge`]. Of a reparameterization, only the prefix that it computes
    remains.

    Args:
        model (`PeftModel`): A model with the adapter, which is left as it is.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        save_directory (`str` or `os.PathLike`, *optional*): A directory to save `adapter_config.json` and
            `adapter_model.safetensors` in.
        num_frozen_tokens (`int`, defaults to 1): How many of the first tokens CARTRIDGE leaves untrained in further
            training.

    Returns:
        `tuple[CartridgeConfig, dict[str, torch.Tensor]]`: The configuration, and the tensors as PEFT saves them:
        `prompt_embeddings`, (num_virtual_tokens, num_layers · 2 · kv_heads · head_dim), and those of `modules_to_save`.

    Raises:
        TypeError: If `model` is not a `PeftModel`.
        ValueError: If CARTRIDGE cannot express the adapter (position-free, a gate, some layers only, cross-attention or an encoder, keys
            and values of different shapes), does not give the same output on this model, or cannot freeze so many tokens.

    Warns:
        UserWarning: As [`from_cartridge`].
    """
    method = CachedPrefix(PeftType.CARTRIDGE, CartridgeConfig, {"num_frozen_tokens": num_frozen_tokens})
    return to_cached_prefix(method, model, adapter_name, save_directory)
