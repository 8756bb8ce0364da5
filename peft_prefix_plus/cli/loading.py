"""Loading base models, tokenizers and adapters for the command."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils import load_peft_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..config import PrefixPlusConfig
from ..model import PrefixPlusModel
from ..registration import PREFIX_PLUS
from .errors import CommandError, shown_as_command_error


DTYPES = ("auto", "float32", "bfloat16", "float16")

DTYPE_HELP = {"help": "The base model's dtype: auto, float32, bfloat16 or float16."}
BASE_MODEL_HELP = {"help": "The base model. Default: the one that the adapter names."}
TRUST_HELP = {"help": "Run code from the base model's repository."}
FOUR_BITS_HELP = {"help": "Quantize the base model to 4 bits with bitsandbytes."}
EIGHT_BITS_HELP = {"help": "Quantize the base model to 8 bits with bitsandbytes."}
"""Metadata of fields that several commands have."""

LARGEST_SEED = 2**32 - 1
"""The largest seed that numpy takes."""


def reading(what: str) -> AbstractContextManager[None]:
    """Turn any exception of code that reads a user's file into a [`CommandError`]: broken files raise exceptions of every class."""
    return shown_as_command_error(Exception, while_doing=f"Cannot load {what}")


def check_dtype(name: str) -> None:
    """
    Raise unless a name is one of `DTYPES`.

    Raises:
        ValueError: If it is not.
    """
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")


def num_bits(load_in_4bit: bool, load_in_8bit: bool) -> int | None:
    """
    Return the number of bits that the options `--load-in-4bit` and `--load-in-8bit` quantize a base model to, or `None`.

    Raises:
        ValueError: If both are given.
    """
    if load_in_4bit and load_in_8bit:
        raise ValueError("--load-in-4bit and --load-in-8bit contradict each other. Give one of them.")
    return 4 if load_in_4bit else 8 if load_in_8bit else None


class Task(NamedTuple):
    """
    A kind of model.

    Attributes:
        words (`str`): Its name in errors.
        auto_class: The class of transformers that loads it.
        mapping: The configurations of all models of this kind.
    """

    words: str
    auto_class: Any
    mapping: Any


TASKS = {
    "CAUSAL_LM": Task("causal language model", AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "SEQ_2_SEQ_LM": Task(
        "sequence-to-sequence language model", AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    ),
    "SEQ_CLS": Task(
        "sequence classifier", AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    ),
}
"""The kinds of model by PEFT's `task_type`."""


@dataclass(frozen=True)
class Source:
    """
    Where a base model comes from.

    Attributes:
        revision (`str`, *optional*): Its branch, tag or commit on the Hub; `None` means `"main"`.
        trust_remote_code (`bool`, defaults to `False`): Whether to run code from its repository.
    """

    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The arguments for `from_pretrained`."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


NEWEST = Source()


def load_model(
    name: str,
    dtype: str = "auto",
    task_type: str = "CAUSAL_LM",
    source: Source = NEWEST,
    bits: int | None = None,
    **config_changes: Any,
) -> Any:
    """
    Load a model.

    Args:
        name (`str`): A directory or a name on the Hub.
        dtype (`str`, defaults to `"auto"`): One of `DTYPES`; "auto" is the dtype of the checkpoint.
        task_type (`str`, defaults to `"CAUSAL_LM"`): The kind of model, one of `TASKS`.
        source (`Source`): Its version.
        bits (`int`, *optional*): 4 or 8 to quantize it with bitsandbytes.
        config_changes: Fields to change in its configuration.

    Returns:
        `PreTrainedModel`: The model.

    Raises:
        CommandError: If it cannot be loaded, is of another kind, or bitsandbytes is missing.
    """
    options = source.options
    if bits is not None:
        options["quantization_config"] = quantization(bits, dtype)
        options["device_map"] = {"": torch.accelerator.current_device_index() if torch.cuda.is_available() else "cpu"}
    config = load_model_config(name, task_type, source)
    for key, value in config_changes.items():
        setattr(config, key, value)
    with reading(f"the model {name!r}"):
        return TASKS[task_type].auto_class.from_pretrained(
            name,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            ignore_mismatched_sizes="num_labels" in config_changes,  # the checkpoint's own head is of other classes
            **options,
        )


def quantization(bits: int, dtype: str) -> BitsAndBytesConfig:
    """
    Return the configuration that quantizes a model to 4 bits (NF4) or 8.

    Args:
        bits (`int`): 4 or 8.
        dtype (`str`): One of `DTYPES`, in which 4-bit weights are computed with; "auto" means bfloat16.

    Raises:
        CommandError: If bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CommandError(
            f"--load-in-{bits}bit needs the package bitsandbytes. Install with: pip install bitsandbytes"
        )
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def load_model_config(name: str, task_type: str = "CAUSAL_LM", source: Source = NEWEST) -> PreTrainedConfig:
    """
    Load the configuration of a model.

    Args:
        name (`str`): A directory or a name on the Hub.
        task_type (`str`, defaults to `"CAUSAL_LM"`): The kind of model, one of `TASKS`.
        source (`Source`): Its version.

    Raises:
        CommandError: If it cannot be loaded, or the model is of another kind.
    """
    task = TASKS[task_type]
    with reading(f"the configuration of {name!r}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **source.options)
    brings_its_class = task.auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in task.mapping and not (source.trust_remote_code and brings_its_class):
        raise CommandError(
            f"{name!r} is a model of the type {config.model_type!r}, which is no {task.words}; this command needs "
            "one. Use PrefixPlusConfig and peft.get_peft_model in Python for other models."
        )
    return config


def num_positions(model: nn.Module) -> int | None:
    """Return the number of positions of a model with a table of positions; `None` if it has no such table."""
    config: Any = model.config
    if any("RotaryEmbedding" in type(module).__name__ for module in model.modules()):
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(name: str, source: Source = NEWEST) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer.

    Args:
        name (`str`): A directory or a name on the Hub.
        source (`Source`): Its version.

    Raises:
        CommandError: If it cannot be loaded.
    """
    with reading(f"the tokenizer of {name!r}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **source.options)
    return tokenizer


def load_adapter_config(adapter: str) -> PeftConfig:
    """
    Load the configuration of an adapter of any method.

    Args:
        adapter (`str`): A directory or a name on the Hub.

    Raises:
        CommandError: If it cannot be loaded.
    """
    with reading(f"the adapter {adapter!r}"):
        config: PeftConfig = PeftConfig.from_pretrained(adapter)
    return config


def load_config(adapter: str) -> PrefixPlusConfig:
    """
    Load the configuration of a PREFIX_PLUS adapter.

    Args:
        adapter (`str`): A directory or a name on the Hub.

    Raises:
        CommandError: If it cannot be loaded, or is of another method.
    """
    config: Any = load_adapter_config(adapter)
    if config.peft_type != PREFIX_PLUS:
        raise CommandError(
            f"{adapter!r} is a {PeftType(config.peft_type).value} adapter; prefix-plus loads PREFIX_PLUS adapters."
        )
    return config


def base_model_name(adapter: str, config: PeftConfig, model: str | None, option: str = "--model") -> str:
    """
    Return the name of an adapter's base model.

    Args:
        adapter (`str`): The adapter's directory or name, for errors.
        config (`PeftConfig`): Its configuration.
        model (`str`, *optional*): The user's choice; `None` means the base model that the configuration names.
        option (`str`, defaults to `"--model"`): The option of that choice, for errors.

    Raises:
        CommandError: If neither names one.
    """
    base = model or config.base_model_name_or_path
    if not base:
        raise CommandError(f"The adapter {adapter!r} names no base model. Give one with {option}.")
    return base


def load_adapted_model(
    adapter: str,
    model: str | None = None,
    dtype: str = "auto",
    option: str = "--model",
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    Load an adapter with its base model, in evaluation mode, and the tokenizer that was saved with it.

    Args:
        adapter (`str`): A directory or a name on the Hub.
        model (`str`, *optional*): The base model; `None` means the one that the adapter names.
        dtype (`str`, defaults to `"auto"`): The base model's dtype, as in [`load_model`].
        option (`str`, defaults to `"--model"`): The option that gives `model`, for errors.
        trust_remote_code (`bool`, defaults to `False`): Whether to run code from the base model's repository.

    Returns:
        `tuple`: The model and the tokenizer. A local adapter without a tokenizer gets the base model's.

    Raises:
        CommandError: If something cannot be loaded.
    """
    config = load_config(adapter)
    base = base_model_name(adapter, config, model, option)
    source = Source(config.revision if base == config.base_model_name_or_path else None, trust_remote_code)
    base_model = load_model(base, dtype, source=source).to("cuda" if torch.cuda.is_available() else "cpu")
    with reading(f"the adapter {adapter!r}"):
        adapted = PeftModel.from_pretrained(base_model, adapter)
    has_tokenizer = os.path.isfile(os.path.join(adapter, "tokenizer_config.json"))
    is_directory = os.path.isdir(adapter)
    return adapted.eval(), (
        load_tokenizer(adapter, Source(trust_remote_code=trust_remote_code))
        if has_tokenizer or not is_directory
        else load_tokenizer(base, source)
    )


def load_without_base_weights(adapter: str, model: str | None = None, option: str = "--model") -> PeftModel:
    """
    Load an adapter on a base model without weights. Only the base model's configuration is read.

    Args:
        adapter (`str`): A directory or a name on the Hub.
        model (`str`, *optional*): The base model; `None` means the one that the adapter names.
        option (`str`, defaults to `"--model"`): The option that gives `model`, for errors.

    Returns:
        `PeftModel`: The model, in evaluation mode.

    Raises:
        CommandError: If something cannot be loaded.
    """
    config = load_config(adapter)
    config.awaits_weights = True
    base_model = model_on_meta_device(base_model_name(adapter, config, model, option))
    with reading(f"the adapter {adapter!r}"):
        adapted: Any = get_peft_model(base_model, config)
        weights = load_peft_weights(adapter, device="cpu")
        weights = PrefixPlusModel._remap_adapter_state_dict_for_load(adapted, config, "default", weights)
    # PEFT's own loading would move the weights to the base model's meta device, where they would be lost
    adapted.load_state_dict(weights, strict=False, assign=True)
    return adapted.eval()


def model_on_meta_device(name: str | None) -> Any:
    """
    Build a model without weights.

    Args:
        name (`str`, *optional*): A directory or a name on the Hub, whose config.json is read; `None` means the shape of Llama-2-7B.

    Raises:
        CommandError: If the configuration cannot be loaded, or no model can be built from it.
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
