"""A warning for attention that a user would expect to have a prefix and that cannot have one, and for nothing else."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tiny_models import cases, tiny_model

from peft_prefix_plus import PrefixPlusConfig


def model_of(class_name: str):
    return tiny_model(next(case for case in cases() if case.class_name == class_name))


def warnings_of(class_name: str, **fields) -> list[str]:
    """What adding an adapter to a tiny model warns of."""
    model = model_of(class_name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, PrefixPlusConfig(**fields))
    return [str(warning.message) for warning in caught if "no prefix" in str(warning.message)]


PARTIAL = {
    "LEDForConditionalGeneration": ("LEDEncoderSelfAttention", "led.encoder.layers.0.self_attn.longformer_self_attn"),
    "LongT5ForConditionalGeneration": ("LongT5LocalAttention", "encoder.block.0.layer.0.LocalSelfAttention"),
    "PegasusXForConditionalGeneration": ("PegasusXGlobalLocalAttention", "model.encoder.layers.0.self_attn"),
}


@pytest.mark.parametrize("class_name", PARTIAL)
def test_local_attention_that_stays_without_a_prefix_is_named_once(class_name):
    (message,) = warnings_of(class_name)

    for part in (*PARTIAL[class_name], class_name, "2 attention modules", "local blocks", "`exclude_modules`"):
        assert part in message


@pytest.mark.parametrize(
    "fields",
    [
        {"encoder_prefix": False},
        {"exclude_modules": ["longformer_self_attn"]},
        {"target_modules": r".*decoder.*attn"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_nothing_is_said_of_attention_that_was_not_asked_for(fields):
    assert warnings_of("LEDForConditionalGeneration", **fields) == []


def test_only_the_chosen_layers_are_named():
    (message,) = warnings_of("LEDForConditionalGeneration", layers_to_transform=[-1])

    assert "1 attention modules" in message
    assert "layers.1." in message
    assert "layers.0." not in message


@pytest.mark.parametrize(
    "class_name",
    [
        "LlamaForCausalLM",
        "MixtralForCausalLM",  # routers
        "Qwen3NextForCausalLM",  # linear attention
        "JambaForCausalLM",  # state spaces, routers
        "Gemma3ForConditionalGeneration",  # a vision tower
        "T5ForConditionalGeneration",
        "ConvBertForSequenceClassification",  # a softmax beside that of attention
    ],
)
def test_where_no_attention_is_left_out_nothing_is_said(class_name):
    assert warnings_of(class_name) == []


def test_loading_an_adapter_does_not_say_it_again(tmp_path):
    with pytest.warns(UserWarning, match="get no prefix"):
        model = get_peft_model(model_of("LEDForConditionalGeneration"), PrefixPlusConfig())
    model.save_pretrained(tmp_path)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*get no prefix")
        PeftModel.from_pretrained(model_of("LEDForConditionalGeneration"), tmp_path)


def test_the_part_of_canine_that_its_classifier_does_not_read_gets_no_prefix():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_hash_buckets=64)
    base = transformers.CanineForSequenceClassification(transformers.CanineConfig(**sizes))
    model = get_peft_model(base, PrefixPlusConfig(num_virtual_tokens=3, init_weights=False))
    assert not any("final_char_encoder" in name for name, _ in model.base_model.prefix_layers())
    model(input_ids=torch.randint(5, 60, (2, 64)), labels=torch.tensor([0, 1])).loss.backward()
    unused = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    assert not unused
