from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import EXAMPLES, WORDS, word_tokenizer, write_lines
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random model with a tokenizer of words."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "data.jsonl", EXAMPLES)
