"""A tiny chat model, its tokenizer, and a document, for the tests of distillation."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)


SPECIAL = ("<end>", "<system>", "<user>", "<assistant>")
DOCUMENT = "the red cup is on the table . the blue box is under the chair . the green chair is on a box ."
VOCABULARY = [
    *SPECIAL,
    *dict.fromkeys([*DOCUMENT.split(), "what", "where", "which", "says", "text", ":", "?", *"12345"]),
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHAT_TEMPLATE
)

SIZES: dict[str, Any] = dict(vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
GROUPED: dict[str, Any] = dict(SIZES, intermediate_size=48, num_key_value_heads=2, initializer_range=0.3)
SPECIAL_IDS: dict[str, Any] = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)

MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, **SPECIAL_IDS)),
    # dropout, and learned positions
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**SIZES, **SPECIAL_IDS, n_inner=48, n_positions=128, initializer_range=0.3)
    ),
    # a window that is shorter than the document
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, **SPECIAL_IDS, sliding_window=6)),
    # a soft cap on the logits
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GROUPED, **SPECIAL_IDS, head_dim=8, final_logit_softcapping=2.0, sliding_window=6)
    ),
}


def chat_model(name: str = "llama") -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def chat_tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of words."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", additional_special_tokens=list(SPECIAL[1:])
    )
    tokenizer.chat_template = template
    return tokenizer
