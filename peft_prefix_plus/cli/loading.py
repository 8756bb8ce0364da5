"""Loading base models, tokenizers and adapters for the command."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils import load_peft_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..config import PrefixPlusConfig
from ..model import PrefixPlusModel
from ..registration import PREFIX_PLUS
from .errors import CommandError, shown_as_command_error


DTYPES = ("auto", "float32", "bfloat16", "float16")

LARGEST_SEED = 2**32 - 1
"""The largest seed that numpy takes."""


def reading(what: str) -> AbstractContextManager[None]:
    """Show what a file that the user names makes its readers raise, which is of any class, as a [`CommandError`]."""
    return shown_as_command_error(Exception, while_doing=f"Cannot load {what}")


def check_dtype(name: str) -> None:
    """
    Raise unless this names a dtype to load a model in.

    Raises:
        ValueError: If it is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")


def load_model(name: str, dtype: str = "auto") -> Any:
    """
    Load a causal language model.

    Args:
        name (`str`): A directory or a name on the Hub.
        dtype (`str`): One of `DTYPES`; "auto" is the one that the checkpoint was saved in.
    """
    config = load_model_config(name)
    with reading(f"the model {name!r}"):
        return AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )


def load_model_config(name: str) -> PreTrainedConfig:
    """
    Load the configuration of a causal language model.

    Args:
        name (`str`): A directory or a name on the Hub.

    Raises:
        CommandError: If it cannot be loaded, or is another kind of model's.
    """
    with reading(f"the configuration of {name!r}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CommandError(
            f"{name!r} is a model of the type {config.model_type!r}, which is no causal language model; the command works "
            "with those. Use PrefixPlusConfig and peft.get_peft_model for other models."
        )
    return config


def num_positions(model: nn.Module) -> int | None:
    """Return how many positions a model has learned, or has in a table, or `None` if it computes any."""
    config: Any = model.config
    if any("RotaryEmbedding" in type(module).__name__ for module in model.modules()):
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer.

    Args:
        name (`str`): A directory or a name on the Hub.
    """
    with reading(f"the tokenizer of {name!r}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


def load_adapter_config(adapter: str) -> PeftConfig:
    """
    Load the configuration of an adapter of any method.

    Args:
        adapter (`str`): A directory or a name on the Hub.

    Raises:
        CommandError: If there is none.
    """
    with reading(f"the adapter {adapter!r}"):
        config: PeftConfig = PeftConfig.from_pretrained(adapter)
    return config


def load_config(adapter: str) -> PrefixPlusConfig:
    """
    Load the configuration of an adapter of PREFIX_PLUS.

    Args:
        adapter (`str`): A directory or a name on the Hub.

    Raises:
        CommandError: If there is none, or it is another method's.
    """
    config: Any = load_adapter_config(adapter)
    if config.peft_type != PREFIX_PLUS:
        raise CommandError(
            f"{adapter!r} is a {PeftType(config.peft_type).value} adapter; prefix-plus loads PREFIX_PLUS adapters."
        )
    return config


def base_model_name(adapter: str, config: PeftConfig, model: str | None, option: str = "--model") -> str:
    """
    Return the name of an adapter's base model: the one given by an option, or else the one in the configuration.

    Raises:
        CommandError: If neither names one.
    """
    base = model or config.base_model_name_or_path
    if not base:
        raise CommandError(f"{adapter!r} does not say which base model it belongs to; give it by {option}.")
    return base


def load_adapted_model(
    adapter: str, model: str | None = None, dtype: str = "auto", option: str = "--model"
) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    Load an adapter with its base model, ready to generate, and the tokenizer that it was trained with.

    Args:
        adapter (`str`): A directory or a name on the Hub.
        model (`str`, *optional*): The base model; `None` means the one that the adapter names.
        dtype (`str`): The base model's dtype, as in [`load_model`].
        option (`str`): The option that `model` is given by.

    Returns:
        `tuple`: The model and the tokenizer.
    """
    base = base_model_name(adapter, load_config(adapter), model, option)
    base_model = load_model(base, dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    with reading(f"the adapter {adapter!r}"):
        adapted = PeftModel.from_pretrained(base_model, adapter)
    has_tokenizer = os.path.isfile(os.path.join(adapter, "tokenizer_config.json"))
    is_directory = os.path.isdir(adapter)
    return adapted.eval(), load_tokenizer(adapter if has_tokenizer or not is_directory else base)


def load_without_base_weights(adapter: str, model: str | None = None, option: str = "--model") -> PeftModel:
    """
    Load an adapter over a base model without weights, of which only the configuration is read.

    Args:
        adapter (`str`): A directory or a name on the Hub.
        model (`str`, *optional*): The base model; `None` means the one that the adapter names.
        option (`str`): The option that `model` is given by.
    """
    config = load_config(adapter)
    config.awaits_weights = True
    base_model = model_on_meta_device(base_model_name(adapter, config, model, option))
    with reading(f"the adapter {adapter!r}"):
        adapted: Any = get_peft_model(base_model, config)
        weights = load_peft_weights(adapter, device="cpu")
        weights = PrefixPlusModel._remap_adapter_state_dict_for_load(adapted, config, "default", weights)
    # not by PEFT's own loading, which brings the weights to the base model's device: there they would be lost
    adapted.load_state_dict(weights, strict=False, assign=True)
    return adapted.eval()


def model_on_meta_device(name: str | None) -> Any:
    """
    Build a model without weights.

    Args:
        name (`str`, *optional*): A directory or a name on the Hub, whose config.json is read; `None` means Llama-2-7B.
    """
    config: Any
    if name is None:
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            tie_word_embeddings=False,
        )
    else:
        config = load_model_config(name)
    with torch.device("meta"), shown_as_command_error(ValueError, while_doing=f"Cannot build {name!r}"):
        return AutoModelForCausalLM.from_config(config)
