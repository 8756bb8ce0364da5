"""
Conversions from and to AdapterHub's `prefix_tuning`. The reference is its layout, written out below, and transformers' own
attention over a cache that holds the prefix, with the text at the positions that it has without one.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_prefix_plus import PrefixPlusConfig, from_adapterhub, prefix_key_values, to_adapterhub


LENGTH, VOCABULARY, HIDDEN, HEADS, DIM = 5, 64, 32, 4, 8
SIZES = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_attention_heads=HEADS)
BART = dict(vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=2, decoder_layers=3, max_position_embeddings=32)
BART |= dict(encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=48, decoder_ffn_dim=48)

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=3, n_head=HEADS, n_positions=32, eos_token_id=1)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, num_hidden_layers=3, max_position_embeddings=32)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
}
KV_HEADS = {"llama": 2, "gpt2": HEADS, "bert": HEADS, "bart": HEADS}
LOCATIONS = {
    "llama": {"self_prefix": [f"model.layers.{layer}.self_attn" for layer in range(3)]},
    "gpt2": {"self_prefix": [f"transformer.h.{layer}.attn" for layer in range(3)]},
    "bert": {"self_prefix": [f"bert.encoder.layer.{layer}.attention.self" for layer in range(3)]},
    "bart": {
        "encoder_prefix": [f"model.encoder.layers.{layer}.self_attn" for layer in range(2)],
        "self_prefix": [f"model.decoder.layers.{layer}.self_attn" for layer in range(3)],
        "cross_prefix": [f"model.decoder.layers.{layer}.encoder_attn" for layer in range(3)],
    },
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def layout(name: str, *, flat: bool, counts: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
    """An adapter's tensors by location and part, drawn at random."""
    torch.manual_seed(1)
    tensors = {}
    for location, modules in LOCATIONS[name].items():
        size = (counts or {}).get(location, len(modules)) * 2 * KV_HEADS[name] * DIM
        if flat:
            tensors[f"{location}.control_trans"] = torch.randn(LENGTH * size)
        else:
            tensors[f"{location}.wte.weight"] = torch.randn(LENGTH, HIDDEN)
            for index, (rows, columns) in enumerate([(6, HIDDEN), (size, 6)]):
                tensors[f"{location}.control_trans.{2 * index}.weight"] = torch.randn(rows, columns) / columns**0.5
                tensors[f"{location}.control_trans.{2 * index}.bias"] = torch.randn(rows)
    return tensors


def reference(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values by module, number by number in float64: token, module, key or value, head, dim."""
    found = {}
    for location, modules in LOCATIONS[name].items():
        own = {key.removeprefix(f"{location}."): value.double() for key, value in tensors.items() if location in key}
        if "control_trans" in own:
            numbers = own["control_trans"]
        else:
            hidden = torch.tanh(own["wte.weight"] @ own["control_trans.0.weight"].T + own["control_trans.0.bias"])
            numbers = (hidden @ own["control_trans.2.weight"].T + own["control_trans.2.bias"]).flatten()
        heads = KV_HEADS[name]
        for index, module in enumerate(modules):
            pair = torch.zeros(2, heads, LENGTH, DIM, dtype=torch.float64)
            for part in range(2):
                for head in range(heads):
                    for token in range(LENGTH):
                        start = (((token * len(modules) + index) * 2 + part) * heads + head) * DIM
                        pair[part, head, token] = numbers[start : start + DIM]
            found[module] = (pair[0], pair[1])
    return found


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], pickled: bool = False, **fields: Any) -> Path:
    """Save an adapter as that library does: pickled, with every tensor once more for each layer that can reach it."""
    folder.mkdir()
    start = "prefix_tuning.prefix_tunings.news."
    named = {f"model.{start}{key}": tensor for key, tensor in tensors.items()}
    if pickled:
        named |= {f"model.layers.0.pool.{start}{key}": tensor for key, tensor in tensors.items()}
        torch.save(named, folder / "pytorch_adapter.bin")
    else:
        save_file(named, folder / "adapter.safetensors")
    is_flat = not any(key.endswith("wte.weight") for key in tensors)
    config = {
        "architecture": "prefix_tuning",
        "prefix_length": LENGTH,
        "flat": is_flat,
        "bottleneck_size": 6,
        **fields,
    }
    model_type = {"llama": "llama", "gpt2": "gpt2", "bert": "bert", "bart": "bart", "t5": "t5"}[name]
    described = {"config": config, "name": "news", "model_type": model_type, "version": "adapters.1.3.0"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


@torch.no_grad()
def logits_with_cache(base: Any, prefixes: dict[str, tuple[torch.Tensor, torch.Tensor]], ids: torch.Tensor) -> Any:
    """The base model's own attention over a cache of the prefix, the text at positions 0, 1, 2, …"""
    cache = DynamicCache(config=base.config)
    for layer, (key, value) in enumerate(prefixes.values()):
        cache.update(*(each.float().expand(len(ids), *each.shape) for each in (key, value)), layer)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.ones(len(ids), LENGTH + ids.shape[1], dtype=torch.long)
    return base(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_keys_and_values_are_those_of_the_layout_and_come_back_the_same(name: str, flat: bool, tmp_path: Path) -> None:
    tensors = layout(name, flat=flat)
    ours = from_adapterhub(write(tmp_path / "theirs", name, tensors), build(name))
    expected = reference(name, tensors)
    found = prefix_key_values(ours)
    assert set(found) == set(expected)
    for module, pair in found.items():
        for got, wanted in zip(pair, expected[module], strict=True):
            torch.testing.assert_close(
                got.double(), wanted, rtol=0, atol=2e-6
            )  # rounding of float32, at numbers of about 1

    config, back = to_adapterhub(ours, save_directory=tmp_path / "back")
    assert json.loads((tmp_path / "back/adapter_config.json").read_text()) == config
    assert config["config"]["flat"] and config["config"]["architecture"] == "prefix_tuning"
    assert load_file(tmp_path / "back/adapter.safetensors").keys() == back.keys()
    again = from_adapterhub(tmp_path / "back", build(name))
    for module, pair in prefix_key_values(again).items():
        assert all(torch.equal(one, other) for one, other in zip(pair, found[module], strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_output_is_that_of_the_prefix_in_a_cache_before_text_whose_positions_stay(
    name: str, tmp_path: Path
) -> None:
    tensors = layout(name, flat=False)
    base = build(name)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    expected = logits_with_cache(base, reference(name, tensors), ids)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        ours = from_adapterhub(write(tmp_path / "theirs", name, tensors), base).eval()
        found = ours(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # rounding, at logits of about 1
    assert (plain - expected).abs().max() > 1e-2


def test_a_pickled_adapter_is_read_only_if_allowed(tmp_path: Path) -> None:
    tensors = layout("llama", flat=True)
    folder = write(tmp_path / "theirs", "llama", tensors, pickled=True)
    with pytest.raises(ValueError, match="allow_pickle=True"):
        from_adapterhub(folder, build("llama"))
    ours = from_adapterhub(folder, build("llama"), allow_pickle=True)
    wanted = reference("llama", tensors)
    for module, (key, _) in prefix_key_values(ours).items():
        torch.testing.assert_close(key.double(), wanted[module][0], rtol=0, atol=1e-6)


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_what_is_pickled_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "theirs", "llama", layout("llama", flat=True), pickled=True)
    torch.save({"weight": Harmful()}, folder / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match="cannot be read as an adapter"):
        from_adapterhub(folder, build("llama"), allow_pickle=True)
    assert not Path("harmed").exists()


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_layers_that_are_left_out_stay_those_of_the_base_model(name: str, tmp_path: Path) -> None:
    # in an encoder-decoder the encoder's layers are counted first: layers 1 and 3 are the encoder's second and the decoder's
    left_out = [1] if name == "llama" else [1, 3]
    counts = {"self_prefix": 2, "encoder_prefix": 1, "cross_prefix": 2}
    tensors = layout(name, flat=True, counts=counts)
    ours = from_adapterhub(write(tmp_path / "theirs", name, tensors, leave_out=left_out), build(name))
    without = {"llama": ["model.layers.1.self_attn"], "bart": ["model.encoder.layers.1.self_attn"]}[name]
    without += [f"model.decoder.layers.1.{each}" for each in ("self_attn", "encoder_attn") if name == "bart"]
    modules = [module for each in LOCATIONS[name].values() for module in each if module not in without]
    assert sorted(prefix_key_values(ours)) == sorted(modules)
    config, back = to_adapterhub(ours)
    assert config["config"]["leave_out"] == left_out
    assert {key.split(".default.")[1]: tensor.tolist() for key, tensor in back.items()} == {
        key: tensor.tolist() for key, tensor in tensors.items()
    }


def test_an_encoder_decoder_may_have_prefixes_in_its_decoder_alone(tmp_path: Path) -> None:
    tensors = {key: each for key, each in layout("bart", flat=True).items() if key.startswith("self_prefix")}
    folder = write(tmp_path / "theirs", "bart", tensors, encoder_prefix=False, cross_prefix=False)
    ours = from_adapterhub(folder, build("bart"))
    assert list(prefix_key_values(ours)) == LOCATIONS["bart"]["self_prefix"]
    config, back = to_adapterhub(ours)
    assert not config["config"]["encoder_prefix"] and not config["config"]["cross_prefix"] and len(back) == 1


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"architecture": "lora"}, "architecture 'prefix_tuning', got 'lora'"),
    "a gate of the input": ({"use_gating": True}, "its gate depends on the input"),
    "another length": ({"prefix_length": 6}, "do not fit its configuration"),
    "no length": ({"prefix_length": None}, "`prefix_length` of at least 1"),
    "other layers": ({"leave_out": [0]}, "do not fit its configuration"),
    "layers by name": ({"leave_out": ["0"]}, "`leave_out`, a list of the numbers of layers"),
    "layers that are none": ({"leave_out": [True, None]}, "`leave_out`, a list of the numbers of layers"),
    "weights of another form": ({"flat": False}, "do not fit its configuration"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_converted_is_refused_and_the_model_stays_as_it_was(fault: str, tmp_path: Path) -> None:
    fields, message = FAULTS[fault]
    base = build("llama")
    before, modules = copy.deepcopy(base.state_dict()), [type(each) for each in base.modules()]
    folder = write(tmp_path / "theirs", "llama", layout("llama", flat=True), **fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        from_adapterhub(folder, base)
    assert [type(each) for each in base.modules()] == modules
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_hub_that_cannot_be_reached_is_not_said_to_lack_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"'user/news' is not a directory, and its adapter_config\.json cannot be loaded from the Hub"
    ):
        from_adapterhub("user/news", build("llama"))


def test_other_models_other_tensors_and_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = layout("llama", flat=True)
    with pytest.raises(ValueError, match="one of a 'llama' model, and the base model is a 'gpt2' model"):
        from_adapterhub(write(tmp_path / "a", "llama", tensors), build("gpt2"))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=DIM, d_ff=48, num_layers=2))
    with pytest.raises(ValueError, match="Prefixes of 't5' models are not converted"):
        from_adapterhub(write(tmp_path / "b", "t5", tensors), t5)
    infinite = {key: tensor.clone().fill_(float("inf")) for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match="not finite"):
        from_adapterhub(write(tmp_path / "c", "llama", infinite), build("llama"))
    folder = write(tmp_path / "d", "llama", tensors)
    save_file({"model.layers.0.loras.news.lora_A": torch.ones(2)}, folder / "adapter.safetensors")
    with pytest.raises(ValueError, match="no part of the prefix 'news'"):
        from_adapterhub(folder, build("llama"))
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        from_adapterhub(tmp_path, build("llama"))
    tensors["nonsense.control_trans"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"a tensor nonsense\.control_trans, but .* only in self_prefix"):
        from_adapterhub(write(tmp_path / "extra", "llama", tensors), build("llama"))
    with pytest.raises(TypeError, match="must be the base model"):
        from_adapterhub(folder, get_peft_model(build("llama"), PrefixPlusConfig()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "decoupled=True cannot be expressed"),
        ({"gating": True}, "gating=True cannot be expressed"),
        ({"decoupled": False}, "which is position-free, cannot be expressed"),
        (
            {"decoupled": False, "position_free": False, "modules_to_save": ["lm_head"]},
            "has modules of its own, lm_head",
        ),
    ],
)
def test_what_adapterhub_cannot_express_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), PrefixPlusConfig(num_virtual_tokens=LENGTH, **fields))
    with pytest.raises(ValueError, match=message):
        to_adapterhub(model, save_directory=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_choice_of_modules_that_is_none_of_layers_is_refused() -> None:
    fields = dict(decoupled=False, position_free=False, target_modules=["decoder.layers.1.self_attn"])
    fields["target_modules"] += ["decoder.layers.0.encoder_attn"]
    model = get_peft_model(build("bart"), PrefixPlusConfig(num_virtual_tokens=LENGTH, **fields))
    with pytest.raises(ValueError, match="has a prefix in some of its attention modules only"):
        to_adapterhub(model)
