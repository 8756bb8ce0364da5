"""What is folded of an adapter is what the model's cache would hold, and what cannot be served is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from served import Reference, save_adapter, save_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
)

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.serving import store as store_module
from peft_prefix_plus.serving.folding import UnservableError, fold, served_model, why_not_served
from peft_prefix_plus.serving.store import FoldedPrefix, PrefixStore, Turning


def logits_with_cache(base: PreTrainedModel, prefix: FoldedPrefix, tokens: torch.Tensor) -> torch.Tensor:
    """The base model's logits of a text that stands behind keys and values in a cache, as in another engine."""
    cache = DynamicCache()
    for layer, (key, value) in prefix.key_values.items():
        cache.update(key[None].to(base.dtype), value[None].to(base.dtype), layer)
    length = cache.get_seq_length()
    positions = torch.arange(length, length + tokens.shape[1])[None]
    with torch.no_grad():
        return base(input_ids=tokens, past_key_values=cache, position_ids=positions).logits


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ],
    ids=["plain", "yarn", "llama3"],
)  # fmt: skip
@pytest.mark.parametrize(
    "fields",
    [{}, {"reparameterization": "mlp", "sharing": "all"}, {"reparameterization": "log", "init_weights": True}],
    ids=["none", "mlp", "log"],
)
def test_a_text_behind_the_cached_prefix_has_the_adapters_logits(
    tmp_path: Path, sizes: dict[str, Any], fields: dict[str, Any]
) -> None:
    save_model(tmp_path / "model", **sizes)
    save_adapter(tmp_path / "model", tmp_path / "adapter", 1, num_virtual_tokens=9, **fields)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    tokens = torch.randint(0, 300, (1, 40))
    found = logits_with_cache(base, fold(str(tmp_path / "adapter"), served_model(str(tmp_path / "model"))), tokens)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
    # the rotary module computes in float32, in both
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("projects", [False, True])
def test_an_adapter_of_prefix_tuning_is_folded_too(tmp_path: Path, projects: bool) -> None:
    save_model(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=9, prefix_projection=projects, encoder_hidden_size=64
    )
    adapted: Any = get_peft_model(base, config).eval()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokens = torch.randint(0, 300, (1, 40))
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
    prefix = fold(str(tmp_path / "adapter"), served_model(str(tmp_path / "model")))
    torch.testing.assert_close(logits_with_cache(base, prefix, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"position_free": True}, "position-free"),
        ({"layers_to_transform": [0]}, "chooses layers"),
        ({"exclude_modules": ["0.self_attn"]}, "chooses layers"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ],
)
def test_a_form_that_no_cache_can_hold_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    save_model(tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "adapter", 1, num_virtual_tokens=4, **fields)
    served = served_model(str(tmp_path / "model"))
    with pytest.raises(UnservableError, match=f"{reason}.*servable"):
        fold(str(tmp_path / "adapter"), served)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), "learned"),
        (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "biases"),
        (GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4), "rotation"),
        (MistralConfig(**SMALL, sliding_window=16, num_key_value_heads=2, intermediate_size=48), "sliding_window"),
        (LlamaConfig(**SMALL, intermediate_size=48, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
         "dynamic"),
    ],
)  # fmt: skip
def test_a_model_whose_cache_cannot_take_a_prefix_is_refused(tmp_path: Path, config: Any, reason: str) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "adapter", 1, num_virtual_tokens=4)
    with pytest.raises(UnservableError, match=rf"{reason}.*(decoupled=True|latent)"):
        fold(str(tmp_path / "adapter"), served_model(str(tmp_path / "model")))
    save_adapter(tmp_path / "model", tmp_path / "added", 1, num_virtual_tokens=4, decoupled=True)  # the way out
    assert fold(str(tmp_path / "added"), served_model(str(tmp_path / "model"))).num_cached_tokens == 0
    obstacle = why_not_served(config, PrefixPlusConfig.servable(task_type="CAUSAL_LM"))
    assert obstacle is not None and reason in obstacle


def test_short_texts_of_a_model_with_a_window_are_served(tmp_path: Path) -> None:
    config = MistralConfig(**SMALL, sliding_window=16, num_key_value_heads=2, intermediate_size=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "adapter", 1, num_virtual_tokens=4)
    assert set(
        fold(str(tmp_path / "adapter"), served_model(str(tmp_path / "model"), max_model_len=16)).key_values
    ) == {0, 1}
    save_adapter(tmp_path / "model", tmp_path / "long", 1, num_virtual_tokens=16)
    with pytest.raises(UnservableError, match="no room"):
        fold(str(tmp_path / "long"), served_model(str(tmp_path / "model"), max_model_len=16))


def test_a_broken_adapter_or_one_of_another_model_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_model(tmp_path / "other", num_hidden_layers=2)
    served = served_model(str(tmp_path / "model"))
    save_adapter(tmp_path / "other", tmp_path / "of-other", 1, num_virtual_tokens=4)
    save_adapter(tmp_path / "model", tmp_path / "good", 1, num_virtual_tokens=4)
    folders = {}
    for name in ("nan", "cut", "no-config", "no-weights", "pickled", "bad-json"):
        folders[name] = shutil.copytree(tmp_path / "good", tmp_path / name)
    weights = load_file(tmp_path / "good" / "adapter_model.safetensors")
    first = next(iter(weights))
    save_file(
        {**weights, first: torch.full_like(weights[first], torch.nan)}, folders["nan"] / "adapter_model.safetensors"
    )
    (folders["cut"] / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    (folders["no-config"] / "adapter_config.json").unlink()
    (folders["no-weights"] / "adapter_model.safetensors").unlink()
    (folders["pickled"] / "adapter_model.safetensors").unlink()
    torch.save(weights, folders["pickled"] / "adapter_model.bin")
    (folders["bad-json"] / "adapter_config.json").write_text("{")
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), LoraConfig(task_type="CAUSAL_LM"))
    lora.save_pretrained(str(tmp_path / "lora"))
    for path in (tmp_path / "of-other", tmp_path / "lora", *folders.values()):
        with pytest.raises(ValueError, match=r"."):
            fold(str(path), served)
    with pytest.raises(ValueError, match="NaN"):
        fold(str(folders["nan"]), served)
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        fold(str(folders["pickled"]), served)


def test_a_store_knows_prefixes_by_name_and_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = PrefixStore(tmp_path), PrefixStore(tmp_path)  # of two processes
    first = FoldedPrefix({0: (torch.randn(2, 5, 4), torch.randn(2, 5, 4))})
    turning = Turning((1.0, 0.5), 1.5, True, False, False, (0, 3))
    gates = {3: torch.randn(4)}
    second = FoldedPrefix({3: (torch.randn(2, 6, 4), torch.randn(2, 6, 4))}, "gated", gates, turning)
    one, two = store.add("one", first, "somewhere"), store.add("two", first, "elsewhere")
    assert one.digest == two.digest and other.entries() == {"one": one, "two": two}
    replaced = other.add("one", second, "somewhere")
    assert store.entries()["one"] == replaced != one
    assert (store.about(one.digest), store.about(replaced.digest)) == (("joint", 5), ("gated", 0))
    loaded = store.load(replaced.digest)
    assert (loaded.form, loaded.turning) == ("gated", turning) and torch.equal(loaded.gates[3], gates[3])
    torch.testing.assert_close(loaded.key_values[3], second.key_values[3], rtol=0, atol=0)
    store.remove("two")  # the last name of the first prefix, which running requests may still need
    assert other.load(one.digest).num_virtual_tokens == 5
    monkeypatch.setattr(store_module, "KEPT_SECONDS", -1.0)
    store.add("three", second, "somewhere")
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {f"{replaced.digest}.safetensors"}
    with pytest.raises(ValueError, match="removed"):
        other.load(one.digest)
    with pytest.raises(ValueError, match="hexadecimal"):
        store.load("../" * 10)
    with pytest.raises(KeyError):
        store.remove("two")
    assert json.loads((tmp_path / "adapters.json").read_text())["one"]["form"] == "gated"
    with pytest.raises(ValueError, match="does not exist"):
        PrefixStore(tmp_path / "nowhere")


def test_the_servable_preset_is_served_and_contradicts_what_is_not(tmp_path: Path) -> None:
    config = PrefixPlusConfig.servable(task_type="CAUSAL_LM", num_virtual_tokens=7)
    assert why_not_served(LlamaConfig(**SMALL, intermediate_size=48), config) is None
    assert config.num_virtual_tokens == 7
    for fields in ({"decoupled": True}, {"layers_to_transform": [0]}, {"position_free": True}, {"gating": True}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            PrefixPlusConfig.servable(**fields)
    save_model(tmp_path / "model")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), config).save_pretrained(
        str(tmp_path / "a")
    )
    assert set(fold(str(tmp_path / "a"), served_model(str(tmp_path / "model"))).key_values) == {0, 1, 2}
    assert Reference(tmp_path / "model", {"a": tmp_path / "a"}).generate("a", [1, 2], 2)
