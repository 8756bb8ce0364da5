"""Conversions from and to PEFT's CARTRIDGE: PEFT's own forward is the reference."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peft_prefix_plus import (
    PrefixPlusConfig,
    from_cartridge,
    from_prefix_tuning,
    prefix_key_values,
    to_cartridge,
)


LENGTH, VOCABULARY = 5, 64
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
GROUPED = dict(SIZES, num_key_value_heads=2)

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen3, keys normalised": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "gpt-neox, a quarter rotated": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, "hidden_size": 64})),
}


def build(name: str = "llama"):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def with_cartridge(base, num_frozen_tokens: int = 2):
    """PEFT's model, whose keys and values are standard normal at the start."""
    torch.manual_seed(2)
    fields = dict(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_frozen_tokens=num_frozen_tokens)
    return get_peft_model(copy.deepcopy(base), CartridgeConfig(**fields)).eval()


@torch.no_grad()
def logits(model):
    torch.manual_seed(1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    output = model(input_ids=torch.randint(3, VOCABULARY, (2, 9)), attention_mask=mask)
    return output.logits[mask.bool()]


@pytest.mark.parametrize("name", MODELS)
def test_a_cartridge_gives_the_same_output_and_comes_back_the_same(name, tmp_path):
    base = build(name)
    theirs = with_cartridge(base)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_cartridge(tmp_path / "theirs", copy.deepcopy(base)).eval()
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)  # rounding, at logits of about 1
    assert (logits(base) - expected).abs().max() > 1e-2

    to_cartridge(ours, save_directory=tmp_path / "back", num_frozen_tokens=2)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").eval()
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    old, new = (
        load_file(tmp_path / each / "adapter_model.safetensors")["prompt_embeddings"] for each in ("theirs", "back")
    )
    torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
    configs = [json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("theirs", "back")]
    fields = ("peft_type", "num_virtual_tokens", "num_frozen_tokens", "num_layers", "token_dim", "num_attention_heads")
    assert [configs[1][field] for field in fields] == [configs[0][field] for field in fields]


def test_a_model_that_carries_a_cartridge_is_converted_in_place_and_trains_all_of_its_tokens():
    theirs = with_cartridge(build(), num_frozen_tokens=LENGTH)
    expected = logits(theirs)
    ours = from_cartridge(theirs, adapter_name="manual")
    torch.testing.assert_close(logits(ours.eval()), expected, rtol=0, atol=1e-5)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    ours.train()(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in ours.named_parameters():
        if name.endswith("encoder.manual.key"):
            assert parameter.grad.abs().sum(dim=(0, 2)).min() > 0


def test_a_reparameterized_adapter_becomes_a_cartridge_with_the_first_token_frozen():
    torch.manual_seed(0)
    fields = dict(num_virtual_tokens=LENGTH, reparameterization="mlp", position_free=False, init_weights=False)
    ours = get_peft_model(build(), PrefixPlusConfig(task_type="CAUSAL_LM", decoupled=False, **fields)).eval()
    config, tensors = to_cartridge(ours)
    assert (config.peft_type.value, config.num_frozen_tokens) == ("CARTRIDGE", 1)
    theirs = get_peft_model(build(), config).eval()
    theirs.prompt_encoder["default"].load_prompt_embeddings(tensors["prompt_embeddings"])
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    assert len(prefix_key_values(ours)) == 3


def test_the_methods_are_told_apart():
    base = build()
    with pytest.raises(ValueError, match="must be one of PREFIX_TUNING, got CARTRIDGE"):
        from_prefix_tuning(with_cartridge(base))
    theirs = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    with pytest.raises(ValueError, match="must be one of CARTRIDGE, got PREFIX_TUNING"):
        from_cartridge(theirs)


def test_what_is_not_exact_is_refused():
    torch.manual_seed(0)
    learned_positions = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(ValueError, match="not exact for GPT2LMHeadModel: CARTRIDGE moves"):
        from_cartridge(with_cartridge(learned_positions))
    model = get_peft_model(
        build(), PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, decoupled=False)
    )
    with pytest.raises(ValueError, match="In CARTRIDGE the prefix is at fixed positions"):
        to_cartridge(model)
    with pytest.raises(ValueError, match="`num_frozen_tokens` must be <= `num_virtual_tokens`"):
        to_cartridge(
            get_peft_model(
                build(),
                PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, decoupled=False, position_free=False),
            ),
            num_frozen_tokens=3,
        )
