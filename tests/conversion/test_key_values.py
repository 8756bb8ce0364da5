"""The file of keys and values: the attention that it describes, written out in float64, is the reference."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_prefix_plus import PrefixPlusConfig, from_key_values, prefix_key_values, to_key_values


LENGTH, VOCABULARY = 5, 64
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=1)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
}

FORMS: dict[str, dict[str, Any]] = {
    "decoupled": {},
    "joint": {"decoupled": False},
    "joint, fixed positions": {"decoupled": False, "position_free": False},
    "decoupled, fixed positions": {"position_free": False},
    "gated": {"gating": True},
    "mlp, scaled": {"reparameterization": "mlp", "encoder_dim": 8, "prefix_scaling": 3.0},
    "one layer": {"layers_to_transform": [1]},
}


def build(name: str = "llama") -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def adapted(name: str = "llama", **fields: Any) -> Any:
    """An adapter away from its start, so that nothing in it is zero."""
    model = get_peft_model(build(name), PrefixPlusConfig(**{"num_virtual_tokens": LENGTH, **fields})).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    output: torch.Tensor = model(input_ids=ids, **more).logits
    return output


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_comes_back_with_the_same_output(name: str, form: str, tmp_path: Path) -> None:
    model = adapted(name, **FORMS[form])
    expected = logits(model)
    to_key_values(model, path=tmp_path / "prefix.safetensors")
    again = from_key_values(tmp_path / "prefix.safetensors", build(name)).eval()
    found = prefix_key_values(again)
    for module, pair in prefix_key_values(model).items():
        assert all(torch.equal(one, other) for one, other in zip(pair, found[module], strict=True))
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)  # a gate is rounded when it is unscaled
    assert (logits(build(name)) - expected).abs().max() > 1e-4
    assert again.peft_config["default"].reparameterization == "none"


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> Any:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(mask, -torch.inf)).softmax(-1) @ value


@pytest.mark.parametrize(
    "form", ["decoupled", "joint", "joint, fixed positions", "decoupled, fixed positions", "gated"]
)
@torch.no_grad()
def test_the_file_alone_says_what_an_attention_module_computes(form: str, tmp_path: Path) -> None:
    """From the numbers and the metadata of the file, the base model's own weights and the formula of each form."""
    model = adapted(**FORMS[form])
    to_key_values(model, path=tmp_path)
    with safe_open(tmp_path / "key_values.safetensors", framework="pt") as file:
        said = file.metadata()
        name = json.loads(said["modules"])[0]
        key, value = (
            file.get_tensor(f"{name}.{part}").double().repeat_interleave(2, dim=0) for part in ("key", "value")
        )
        gate = file.get_tensor(f"{name}.gate").double().tanh() if said["form"] == "gated" else None

    module, hidden = build().get_submodule(name).double(), torch.randn(1, 7, 32, dtype=torch.float64)
    unrotated, ours, own_value = (
        each(hidden).view(7, -1, 8).transpose(0, 1).repeat_interleave(4 // heads, dim=0)
        for each, heads in ((module.q_proj, 4), (module.k_proj, 2), (module.v_proj, 2))
    )
    angles = torch.arange(7)[:, None] * 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)

    def rotate(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    query, own_key = rotate(unrotated), rotate(ours)
    reads = unrotated if said["queries"] == "unrotated" else query
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    if said["form"] == "joint":
        scores = torch.cat([reads @ key.transpose(-1, -2), query @ own_key.transpose(-1, -2)], dim=-1) / 8**0.5
        mask = torch.cat([torch.zeros(7, LENGTH, dtype=torch.bool), later], dim=-1)
        heads_out = scores.masked_fill(mask, -torch.inf).softmax(-1) @ torch.cat([value, own_value], dim=1)
    else:
        if gate is None:
            cap = float(said["score_cap"])
            capped = cap * (reads @ key.transpose(-1, -2) / 8**0.5 / cap).tanh()
            added = capped * capped.sigmoid() @ value
        else:
            added = gate[:, None, None] * attention(reads, key, value, None)
        heads_out = attention(query, own_key, own_value, later) + added
    expected = module.o_proj(heads_out.transpose(0, 1).flatten(1))

    base = model.get_base_model().double()
    embeddings = base.model.rotary_emb(hidden, torch.arange(7)[None])
    causal = torch.zeros(1, 1, 7, 7, dtype=torch.float64).masked_fill(later, -torch.inf)
    found = base.get_submodule(name)(hidden, position_embeddings=embeddings, attention_mask=causal)[0][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # rotary angles are float32 in any dtype


def test_the_metadata_say_where_the_prefix_belongs(tmp_path: Path) -> None:
    model = adapted(task_type="CAUSAL_LM", revision="abc", **FORMS["one layer"])
    model.peft_config["default"].base_model_name_or_path = "org/base"
    metadata, tensors = to_key_values(model, path=tmp_path / "prefix.safetensors")
    assert metadata == {
        "format": "pt",
        "layout": "prefix-key-values/1",
        "form": "decoupled",
        "score_cap": "6.0",
        "queries": "unrotated",
        "num_virtual_tokens": "5",
        "modules": '["model.layers.1.self_attn"]',
        "base_model": "org/base",
        "revision": "abc",
        "task_type": "CAUSAL_LM",
    }
    with safe_open(tmp_path / "prefix.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "model.layers.1.self_attn.key": (2, 5, 8),
        "model.layers.1.self_attn.value": (2, 5, 8),
    }
    base = build()
    base.name_or_path = "org/base"
    config: Any = from_key_values(tmp_path / "prefix.safetensors", base).peft_config["default"]
    known = (config.task_type, config.base_model_name_or_path, config.revision, config.target_modules)
    assert known == ("CAUSAL_LM", "org/base", "abc", ["model.layers.1.self_attn"])


def test_no_reparameterization_is_one_that_holds_any_keys(tmp_path: Path) -> None:
    model = adapted(decoupled=True)
    to_key_values(model, path=tmp_path)
    loaded = from_key_values(tmp_path, build(), reparameterization=None).eval()
    config: Any = loaded.peft_config["default"]
    assert config.reparameterization == "none" and torch.equal(logits(loaded), logits(model))


def test_a_reparameterization_is_fitted_and_refused_where_it_is_not_exact(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model)
    to_key_values(model, path=tmp_path)
    wide = dict(reparameterization="linear", encoder_dim=LENGTH, sharing="none")
    exact = from_key_values(tmp_path, build(), **wide).eval()
    torch.testing.assert_close(logits(exact), expected, rtol=0, atol=1e-5)  # rounding of the fit

    narrow, base = {**wide, "encoder_dim": 2}, build()
    with pytest.raises(ValueError, match=r"would be off by [\d.]+% .*allow_approximate=True"):
        from_key_values(tmp_path, base, **narrow)
    assert torch.equal(logits(base), logits(build())) and not hasattr(base, "peft_config")
    with pytest.warns(UserWarning, match="not exactly those of"):
        close = from_key_values(tmp_path, base, allow_approximate=True, **narrow).eval()
    assert 1e-4 < (logits(close) - expected).abs().max() < (logits(build()) - expected).abs().max()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 7}, "`num_virtual_tokens` is 7, but the file's keys and values are of one with 5"),
        ({"gating": True}, "`gating` is True, but"),
        ({"position_free": False}, "`position_free` is False, but"),
        ({"layers_to_transform": [0]}, "`layers_to_transform` cannot be chosen here"),
    ],
)
def test_fields_that_contradict_the_file_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    to_key_values(adapted(), path=tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        from_key_values(tmp_path, build(), **fields)


def broken(folder: Path, **changes: Any) -> Path:
    """A file in which metadata or tensors are others; `None` removes one."""
    to_key_values(adapted(), path=folder)
    path = folder / "key_values.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, value in changes.items():
        kept: dict[str, Any] = metadata if name in metadata else tensors
        name = name.replace("__", ".")
        kept[name] = value
    save_file({k: v for k, v in tensors.items() if v is not None}, path, {k: v for k, v in metadata.items() if v})
    return path


NAME = "model.layers.0.self_attn"
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another layout": ({"layout": "other/2"}, "`layout` in its metadata must be 'prefix-key-values/1', got 'other/2'"),
    "another cap": ({"score_cap": "5.0"}, "`score_cap` in its metadata must be '6.0', got '5.0'"),
    "an unknown form": (
        {"form": "sum"},
        "`form` in its metadata must be 'joint' or 'decoupled' or 'gated', got 'sum'",
    ),
    "no queries": ({"queries": None}, "`queries` in its metadata must be"),
    "no modules": ({"modules": "[]"}, "`modules` in its metadata must be a JSON list"),
    "a missing tensor": ({f"{NAME}.key": None}, "model.layers.0.self_attn.key is missing or too many"),
    "a gate too many": ({f"{NAME}.gate": torch.ones(4)}, "model.layers.0.self_attn.gate is missing or too many"),
    "too few dims": ({f"{NAME}.key": torch.ones(5, 8)}, "must be a tensor of 3 dims of finite real numbers"),
    "whole numbers": (
        {f"{NAME}.key": torch.ones(2, 5, 8, dtype=torch.int)},
        "of finite real numbers, got torch.int32",
    ),
    "NaN": ({f"{NAME}.value": torch.full((2, 5, 8), torch.nan)}, "must be a tensor of 3 dims of finite real numbers"),
    "other heads": ({f"{NAME}.key": torch.ones(4, 5, 8)}, "must have shape (2, 5, 8)"),
    "modules of another model": ({"modules": '["h.0.attn", "h.1.attn"]'}, "missing or too many"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused_and_the_model_stays_as_it_was(fault: str, tmp_path: Path) -> None:
    changes, message = BROKEN[fault]
    base = build()
    with pytest.raises(ValueError, match=re.escape(message)):
        from_key_values(broken(tmp_path, **changes), base)
    assert torch.equal(logits(base), logits(build()))
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_no_file_and_a_file_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"key_values\.safetensors does not exist"):
        from_key_values(tmp_path, build())
    (tmp_path / "key_values.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="cannot be read as an adapter"):
        from_key_values(tmp_path, build())
    with pytest.raises(TypeError, match="must be the base model"):
        from_key_values(tmp_path, get_peft_model(build(), LoraConfig()))


def test_modules_that_are_saved_in_full_are_no_part_of_a_prefix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="modules of its own, lm_head"):
        to_key_values(adapted(modules_to_save=["lm_head"]), path=tmp_path / "prefix.safetensors")
    assert list(tmp_path.iterdir()) == []
