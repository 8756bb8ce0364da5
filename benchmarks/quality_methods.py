"""The methods that benchmarks/quality.py compares: how each adapts a base model, and how large each is."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from peft import CartridgeConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from transformers import AutoModelForCausalLM, PretrainedConfig

from peft_prefix_plus import PrefixPlusConfig, initialize_from_text


@dataclass(frozen=True)
class Sizes:
    """
    How large each method is, so that all have about the same number of trainable parameters.

    Attributes:
        tokens: The virtual tokens of a prefix.
        rank: The rank of LoRA.
        prompt_tokens: The virtual tokens of prompt tuning.
        linear_dim: The `encoder_dim` of PREFIX_PLUS with `reparameterization="linear"`.
        mlp_dim: The same with `"mlp"`.
        projection: The tokens and the hidden size of PREFIX_TUNING with its projection, if that is compared.
    """

    tokens: int
    rank: int
    prompt_tokens: int
    linear_dim: int
    mlp_dim: int
    projection: tuple[int, int] | None = None


@dataclass(frozen=True)
class Setting:
    """
    What a method has to work with.

    Attributes:
        base: The base model.
        tokenizer: Its tokenizer.
        sizes: How large each method is.
        text: What the methods that start from a text start from; they take as many of its tokens as they have.
    """

    base: Any
    tokenizer: Any
    sizes: Sizes
    text: str


@dataclass(frozen=True)
class Method:
    """
    A way of adapting the base model.

    Attributes:
        adapt: Makes the adapted model.
        rates: Its grid of learning rates.
    """

    adapt: Callable[[Setting], Any]
    rates: tuple[float, ...]


# --------------------------------------------------------------------------------------------------- configurations


def prefix_plus_config(sizes: Sizes, **fields: Any) -> PrefixPlusConfig:
    dims = {"linear": sizes.linear_dim, "mlp": sizes.mlp_dim}
    if fields.get("reparameterization") in dims:
        fields["encoder_dim"] = dims[fields["reparameterization"]]
    return PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=sizes.tokens, **fields)


def lora_config(sizes: Sizes) -> LoraConfig:
    targets = ["q_proj", "v_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=sizes.rank, lora_alpha=sizes.rank, target_modules=targets)


def prompt_tuning_config(sizes: Sizes) -> PromptTuningConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=sizes.prompt_tokens)


# ---------------------------------------------------------------------------------------------------------- methods


def prefix_plus(**fields: Any) -> Callable[[Setting], Any]:
    def adapt(setting: Setting) -> Any:
        return get_peft_model(setting.base, prefix_plus_config(setting.sizes, **fields))

    return adapt


def prefix_plus_from_text(method: str = "first") -> Callable[[Setting], Any]:
    def adapt(setting: Setting) -> Any:
        model = prefix_plus(decoupled=False, position_free=False)(setting)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the text is longer than the prefix
            initialize_from_text(model, setting.tokenizer, setting.text, method=method)
        return model

    return adapt


def examples_beside_decoupled(setting: Setting) -> Any:
    """Two adapters of half the tokens each, trained together: one joint that starts from the text, and one in the default form."""
    tokens = setting.sizes.tokens
    halves = replace(setting.sizes, tokens=tokens // 2), replace(setting.sizes, tokens=tokens - tokens // 2)
    model = prefix_plus_from_text("attention")(replace(setting, sizes=halves[0]))
    model.add_adapter("beside", prefix_plus_config(halves[1]))
    model.base_model.set_adapter(["default", "beside"])
    return model


def prefix_tuning(setting: Setting) -> Any:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=setting.sizes.tokens)
    return get_peft_model(setting.base, config)


def prefix_tuning_from_zero(setting: Setting) -> Any:
    model = prefix_tuning(setting)
    torch.nn.init.zeros_(model.prompt_encoder["default"].embedding.weight)
    return model


def prefix_tuning_from_text(setting: Setting) -> Any:
    return start_from_text(prefix_tuning(setting), setting, setting.sizes.tokens)


def prefix_tuning_with_projection(setting: Setting) -> Any:
    assert setting.sizes.projection is not None, "the sizes have none for PREFIX_TUNING's projection"
    tokens, hidden = setting.sizes.projection
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens, encoder_hidden_size=hidden, prefix_projection=True
    )
    return get_peft_model(setting.base, config)


def cartridge(setting: Setting) -> Any:
    tokens = setting.sizes.tokens + 1  # the first is frozen
    model = get_peft_model(setting.base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    return start_from_text(model, setting, tokens)


def start_from_text(model: Any, setting: Setting, tokens: int) -> Any:
    initialize_kv_prefix_from_text(
        model, setting.tokenizer, text=setting.text, use_chat_template=False, max_length=tokens
    )
    return model


def prompt_tuning(setting: Setting) -> Any:
    return get_peft_model(setting.base, prompt_tuning_config(setting.sizes))


def lora(setting: Setting) -> Any:
    return get_peft_model(setting.base, lora_config(setting.sizes))


def full_fine_tuning(setting: Setting) -> Any:
    return setting.base


# ------------------------------------------------------------------------------------------------------------ sizes


def equal_sizes(base: PretrainedConfig, tokens: int) -> Sizes:
    """
    Return the sizes at which each method has the number of trainable parameters that is nearest to a prefix's.

    Args:
        base (`PretrainedConfig`): The base model's configuration.
        tokens (`int`): The virtual tokens of the prefix.
    """
    # without what the default form saves of its start: that is not trained
    target = num_parameters(base, prefix_plus_config(Sizes(tokens, 1, 1, 1, 1), reparameterization="none"))

    def nearest(config: Callable[[int], peft.PeftConfig]) -> int:
        # the number of parameters is a polynomial of degree 2 or less in the size, so three sizes determine it
        first, second, third = (num_parameters(base, config(size)) for size in (1, 2, 3))

        def count(size: int) -> int:
            return first + (size - 1) * (second - first) + (size - 1) * (size - 2) // 2 * (third - 2 * second + first)

        above = 1 + bisect_left(range(1, target + 1), target, key=count)
        return min(max(above - 1, 1), above, key=lambda size: abs(count(size) - target))

    return Sizes(
        tokens,
        rank=nearest(lambda size: lora_config(Sizes(tokens, size, 1, 1, 1))),
        prompt_tokens=nearest(lambda size: prompt_tuning_config(Sizes(tokens, 1, size, 1, 1))),
        linear_dim=nearest(lambda size: prefix_plus_config(Sizes(tokens, 1, 1, size, 1), reparameterization="linear")),
        mlp_dim=nearest(lambda size: prefix_plus_config(Sizes(tokens, 1, 1, 1, size), reparameterization="mlp")),
    )


def num_parameters(base: PretrainedConfig, config: peft.PeftConfig) -> int:
    """Return the number of trainable parameters that an adapter has on a base model, without making either."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prefix says that its scale cannot be measured
        return int(get_peft_model(model, config, low_cpu_mem_usage=True).get_nb_trainable_parameters()[0])
