"""Loading base models, tokenizers and adapters for the command."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..registration import PREFIX_PLUS
from .errors import CommandError, shown_as_command_error


DTYPES = ("auto", "float32", "bfloat16", "float16")


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
    with shown_as_command_error(OSError, ValueError, while_doing=f"Cannot load the model {name!r}"):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer.

    Args:
        name (`str`): A directory or a name on the Hub.
    """
    with shown_as_command_error(OSError, ValueError, while_doing=f"Cannot load the tokenizer of {name!r}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


def load_adapter_config(adapter: str) -> PeftConfig:
    """
    Load an adapter's configuration.

    Args:
        adapter (`str`): A directory or a name on the Hub.
    """
    with shown_as_command_error(OSError, ValueError, while_doing=f"Cannot load the adapter {adapter!r}"):
        config: PeftConfig = PeftConfig.from_pretrained(adapter)
    return config


def base_model_name(config: PeftConfig, adapter: str, model: str | None) -> str:
    """Return the base model that is asked for, or else the one that the adapter names."""
    base = model or config.base_model_name_or_path
    if not base:
        raise CommandError(f"{adapter!r} does not say which base model it belongs to; give it by --model.")
    return base


def load_adapted_model(
    adapter: str, model: str | None = None, dtype: str = "auto"
) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    Load an adapter with its base model, ready to generate, and the tokenizer that it was trained with.

    Args:
        adapter (`str`): A directory or a name on the Hub.
        model (`str`, *optional*): The base model; `None` means the one that the adapter names.
        dtype (`str`): The base model's dtype, as in [`load_model`].

    Returns:
        `tuple`: The model and the tokenizer.
    """
    config = load_adapter_config(adapter)
    if config.peft_type != PREFIX_PLUS:
        raise CommandError(
            f"{adapter!r} is a {PeftType(config.peft_type).value} adapter; prefix-plus loads PREFIX_PLUS adapters."
        )
    base = base_model_name(config, adapter, model)
    base_model = load_model(base, dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    with shown_as_command_error(OSError, ValueError, while_doing=f"Cannot load the adapter {adapter!r}"):
        adapted = PeftModel.from_pretrained(base_model, adapter)
    has_tokenizer = os.path.isfile(os.path.join(adapter, "tokenizer_config.json"))
    is_directory = os.path.isdir(adapter)
    return adapted.eval(), load_tokenizer(adapter if has_tokenizer or not is_directory else base)
