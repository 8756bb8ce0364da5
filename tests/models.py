"""Tiny random models, their inputs, and what the tests ask of a model."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_prefix_plus import PrefixPlusConfig, PrefixPlusLayer


VOCABULARY = 64
PAD_TOKEN = 1

JOINT_SCALES, DECOUPLED_SCALES, GATE_SCALE = (16.0, 16.0), (4.0, 4.0), 25.0
"""What a parameter of 1 stands for: standard deviations of the module's own keys, and values; a gate."""
QUIET_SHARE, LOUD, SPREAD = math.exp(-8.0), 10.0, 1.0
"""The share of the attention that the mean query of each head gives a prefix at its start; how many times that all queries may
give it on average; the standard deviation of its keys' scores in nats."""
DECOUPLED_CAP = 6.0
"""What the scores of a decoupled prefix approach."""
SCALING_SIZE = 3
"""How many numbers hold the factors of one attention module. They require a gradient, which is zero."""

REPARAMETERIZATIONS = ("none", "linear", "mlp")
SHARINGS = ("none", "input", "projection", "all")
COMBINATIONS = list(itertools.product(REPARAMETERIZATIONS, SHARINGS))
"""Every value of the two fields, though without a reparameterization layers have nothing to share."""
ENCODERS = [("none", "none"), *itertools.product(("linear", "mlp"), SHARINGS)]
"""The combinations that differ."""
EACH_COMBINATION = pytest.mark.parametrize(("reparameterization", "sharing"), COMBINATIONS)
EACH_ENCODER = pytest.mark.parametrize(("reparameterization", "sharing"), ENCODERS)

DECODER_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": PAD_TOKEN,
    "bos_token_id": 2,
    "eos_token_id": None,
}
ENCODER_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": PAD_TOKEN,
}


@dataclass(frozen=True)
class Architecture:
    """
    How to build a tiny model of an architecture.

    Attributes:
        name: The prefix of its classes' names.
        sizes: The arguments of its config.
        classes: The names of its classes that do not follow the rule, by task type, and of its config.
        implementations: The attention implementations that it has.
    """

    name: str
    sizes: dict[str, Any]
    classes: dict[str | None, str] = field(default_factory=dict)
    implementations: tuple[str, ...] = ("eager", "sdpa")


def decoder(name: str, **sizes: Any) -> Architecture:
    return Architecture(name, {**DECODER_SIZES, **sizes})


def encoder(name: str, **sizes: Any) -> Architecture:
    return Architecture(name, {**ENCODER_SIZES, **sizes})


ARCHITECTURES = {
    "llama": decoder("Llama"),
    "mistral": decoder("Mistral", sliding_window=4),
    "qwen2": decoder("Qwen2"),
    "qwen3": decoder("Qwen3", head_dim=8),
    "gemma2": Architecture(
        "Gemma2",
        {**DECODER_SIZES, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
        implementations=("eager",),  # its scores are capped
    ),
    "gemma3": Architecture(
        "Gemma3",
        {
            **DECODER_SIZES,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        {"CAUSAL_LM": "Gemma3ForCausalLM", None: "Gemma3TextModel", "config": "Gemma3TextConfig"},
    ),
    "phi3": decoder("Phi3"),
    "starcoder2": decoder("Starcoder2", residual_dropout=0.0, embedding_dropout=0.0),
    "gpt2": Architecture(
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.2,
            "pad_token_id": PAD_TOKEN,
            "bos_token_id": 2,
            "eos_token_id": None,
        },
        {"CAUSAL_LM": "GPT2LMHeadModel"},
    ),
    "gpt_neox": decoder("GPTNeoX"),
    "opt": Architecture(
        "OPT",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "init_std": 0.2,
            "pad_token_id": PAD_TOKEN,
            "bos_token_id": 2,
            "eos_token_id": None,
        },
    ),
    "t5": Architecture(
        "T5",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": PAD_TOKEN,
            "decoder_start_token_id": 2,
            "eos_token_id": None,
        },
    ),
    "bart": Architecture(
        "Bart",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "init_std": 0.2,
            "pad_token_id": PAD_TOKEN,
            "bos_token_id": 2,
            "decoder_start_token_id": 2,
            "eos_token_id": 3,
            "forced_eos_token_id": None,
        },
    ),
    "bert": encoder("Bert"),
    "roberta": encoder("Roberta"),
    "distilbert": Architecture(
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "pad_token_id": PAD_TOKEN,
        },
    ),
    "modernbert": encoder(
        "ModernBert", local_attention=4, global_attn_every_n_layers=2, cls_token_id=2, sep_token_id=3
    ),
}

HEADS = {
    None: "Model",
    "FEATURE_EXTRACTION": "Model",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


INLINE_MODELS: dict[str, Callable[[], Any]] = {
    "GPT-J": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64)
    ),
    "Bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)),
    "Falcon": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ),
}
"""Models whose attention modules compute attention themselves."""


def tiny_model(
    architecture: str = "llama",
    task_type: str | None = "CAUSAL_LM",
    implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **sizes: Any,
) -> Any:
    """Build a tiny random model, in evaluation mode. The same arguments give the same model."""
    recipe = ARCHITECTURES[architecture]
    config_class = getattr(transformers, recipe.classes.get("config", f"{recipe.name}Config"))
    config = config_class(**{**copy.deepcopy(recipe.sizes), **sizes})
    model_class = getattr(transformers, recipe.classes.get(task_type, f"{recipe.name}{HEADS[task_type]}"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        implementation = implementation or recipe.implementations[-1]
        model = model_class._from_config(config, attn_implementation=implementation, dtype=dtype)
    return model.eval()


def latent_model() -> Any:
    """A tiny DeepSeek V3, whose keys have twelve numbers and whose values have six."""
    latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6)
    sizes = {**DECODER_SIZES, "num_key_value_heads": 4, "first_k_dense_replace": 3}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes, **latent)).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One word, w0 … w63, for each token of the tiny models; it adds nothing."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def save_base(directory: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a tiny random Llama and its tokenizer, as a user finds a base model, and return the directory."""
    sizes = {name: DECODER_SIZES[name] for name in ("hidden_size", "intermediate_size", "initializer_range")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def joint_config(**fields: Any) -> PrefixPlusConfig:
    """A configuration of the joint form, unless the fields name another."""
    return PrefixPlusConfig(**{"decoupled": False, **fields})


def prefix_config(**fields: Any) -> PrefixPlusConfig:
    """A configuration of a short prefix that visibly changes the output."""
    return joint_config(**{"num_virtual_tokens": 3, "encoder_dim": 5, "init_weights": False, **fields})


def prefixed(model: nn.Module, **fields: Any) -> PeftModel:
    """Wrap a model with an adapter of [`prefix_config`], in the model's own mode (training or evaluation)."""
    return get_peft_model(model, prefix_config(**fields)).train(model.training)


def token_ids(batch: int = 2, tokens: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, tokens) without padding or other special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (batch, tokens), generator=generator)


def task_inputs(task_type: str | None, batch: int = 2, tokens: int = 7) -> dict[str, torch.Tensor]:
    """Inputs of a task, with labels where it has some."""
    ids = token_ids(batch, tokens)
    inputs = {"input_ids": ids}
    if task_type == "CAUSAL_LM":
        inputs["labels"] = ids
    elif task_type == "SEQ_2_SEQ_LM":
        inputs["labels"] = token_ids(batch, tokens - 2, seed=1)
    elif task_type == "SEQ_CLS":
        inputs["labels"] = torch.arange(batch) % 2
    elif task_type == "TOKEN_CLS":
        inputs["labels"] = ids % 2
    elif task_type == "QUESTION_ANS":
        inputs.update(start_positions=torch.full((batch,), 1), end_positions=torch.full((batch,), 3))
    return inputs


def output_of(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """The main output of a model: logits, start and end logits, or hidden states."""
    with torch.no_grad():
        return main_output(model(**inputs))


def main_output(outputs: Any) -> torch.Tensor:
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def loss_of(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """The loss of a model's task, or one that asks for certain hidden states."""
    outputs = model(**inputs)
    if getattr(outputs, "loss", None) is not None:
        return outputs.loss
    hidden = main_output(outputs)
    return (hidden - torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).square().mean()


def cached_prefix(model: Any, leaves: dict[str, torch.Tensor], rows: int, tokens: int) -> dict[str, Any]:
    """
    The arguments by which a plain decoder attends to prefixes as to keys and values that are in its cache beforehand,
    at the positions of the real tokens alone.

    Args:
        model: The plain model.
        leaves: The keys and values (heads, prefix_tokens, dim), by the names of their parameters in the adapted model.
        rows: Rows of the input.
        tokens: Tokens of the input.
    """
    cache = DynamicCache(config=model.config)
    for index in range(model.config.num_hidden_layers):
        key, value = (
            next(leaf for name, leaf in leaves.items() if f"layers.{index}." in name and name.endswith(f".{part}"))
            for part in ("key", "value")
        )
        dtype = next(model.parameters()).dtype
        cache.update(key.to(dtype).expand(rows, -1, -1, -1), value.to(dtype).expand(rows, -1, -1, -1), index)
    return {"past_key_values": cache, "position_ids": torch.arange(tokens).expand(rows, -1)}


def prefix_layers(model: nn.Module) -> dict[str, PrefixPlusLayer]:
    """The prefix layers of a model by the name of their attention module in the base model."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".prefix_plus"): module
        for name, module in model.named_modules()
        if isinstance(module, PrefixPlusLayer)
    }


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of an adapter's prefixes by name, less those that never change: the scaling."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if {"prefix_plus", adapter_name} <= set(name.split(".")) and "prefix_plus_scaling" not in name
    }


@dataclass(frozen=True)
class State:
    """All of a model that adding an adapter may touch."""

    modules: dict[str, int]
    configs: dict[str, int]
    trainable: dict[str, bool]
    tensors: dict[str, torch.Tensor]
    adapters: dict[str, int] | None
    active: dict[str, list[str]]


def state_of(model: nn.Module) -> State:
    """Record a model: the identity of its modules and configs, its tensors, what is trainable, its adapters."""
    adapters = getattr(model, "peft_config", None)
    return State(
        modules={name: id(module) for name, module in model.named_modules()},
        configs={
            name: id(vars(module)["config"]) for name, module in model.named_modules() if "config" in vars(module)
        },
        trainable={name: parameter.requires_grad for name, parameter in model.named_parameters()},
        tensors={name: tensor.clone() for name, tensor in model.state_dict().items()},
        adapters=None if adapters is None else {name: id(config) for name, config in adapters.items()},
        active={name: list(layer.active_adapters) for name, layer in prefix_layers(model).items()},
    )


def assert_unchanged(model: nn.Module, before: State) -> None:
    """Assert that a model is as it was recorded."""
    after = state_of(model)
    for name in ("modules", "configs", "trainable", "adapters", "active"):
        assert getattr(after, name) == getattr(before, name), name
    assert list(after.tensors) == list(before.tensors)
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name], tensor), name


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that a model is after the block as it was before it."""
    before = state_of(model)
    yield
    assert_unchanged(model, before)
