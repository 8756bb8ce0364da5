"""A configuration belongs to its user and to the weights that it was saved with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import output_of, prefix_config, prefixed, tiny_model, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_threads import MODELS

from peft_prefix_plus import PrefixPlusConfig, initialize_from_key_values, initialize_from_text, prefix_key_values


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INPUTS = {"input_ids": token_ids()}


def fields_of(path: Path) -> dict[str, Any]:
    return json.loads((path / CONFIG).read_text(encoding="utf-8"))


def edit(path: Path, **fields: Any) -> None:
    (path / CONFIG).write_text(json.dumps({**fields_of(path), **fields}), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the user's own


@pytest.mark.parametrize("names", [("llama", "GPT-J"), ("GPT-J", "llama")])
def test_one_configuration_serves_two_models_as_two_serve_them(names: tuple[str, str], tmp_path: Path) -> None:
    config = prefix_config(task_type="CAUSAL_LM")
    before = copy.deepcopy(config)
    for index, name in enumerate(names):
        base = tiny_model() if name == "llama" else MODELS[name]().eval()
        models = [copy.deepcopy(base) for _ in range(2)]
        torch.manual_seed(0)
        model: Any = get_peft_model(models[0], config).eval()
        torch.manual_seed(0)
        alone: Any = get_peft_model(models[1], copy.deepcopy(before)).eval()
        assert torch.equal(output_of(model, **INPUTS), output_of(alone, **INPUTS))
        assert model.resolved_config().position_free is (name == "llama")
        model.save_pretrained(tmp_path / str(index))
        assert fields_of(tmp_path / str(index))["position_free"] is (name == "llama")
    assert config.to_dict() == before.to_dict()


def test_targets_are_left_as_the_user_wrote_them() -> None:
    targets = [f"layers.{index}.self_attn" for index in range(24)]  # so many that PEFT shortens the list
    config = prefix_config(target_modules=list(targets))
    model: Any = get_peft_model(tiny_model(num_hidden_layers=24), config)
    assert config.target_modules == targets
    assert model.peft_config["default"].target_modules == targets


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "SEQ_CLS"])
def test_the_classifier_that_peft_adds_to_a_configuration_is_saved(task_type: str, tmp_path: Path) -> None:
    base = tiny_model("bert", task_type)
    model: Any = prefixed(base, task_type=task_type).eval()
    model.save_pretrained(tmp_path)
    assert "classifier" in fields_of(tmp_path)["modules_to_save"]
    loaded = PeftModel.from_pretrained(tiny_model("bert", task_type), tmp_path)
    assert torch.equal(output_of(loaded, **INPUTS), output_of(model, **INPUTS))


def test_a_start_from_a_text_does_not_write_on_the_users_configuration(monkeypatch, tmp_path: Path) -> None:
    config = prefix_config(task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_model(), config).eval()

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [5, 6, 7]}

    with pytest.warns(UserWarning, match="not position-free any more"):
        initialize_from_text(model, tokenizer, "three words here")
    assert config.position_free is None
    model.save_pretrained(tmp_path)
    assert fields_of(tmp_path)["position_free"] is False
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(output_of(loaded, **INPUTS), output_of(model, **INPUTS))


# ------------------------------------------------------------------------------------------------ onto an adapter

OTHER_SETTINGS = [
    ({}, {"position_free": False}, "position_free"),
    ({}, {"decoupled": True}, "decoupled"),
    ({"reparameterization": "mlp"}, {"reparameterization": "mlp", "encoder_activation": "relu"}, "encoder_activation"),
]


@pytest.mark.parametrize("has_note", [True, False], ids=["noted", "older file"])
@pytest.mark.parametrize(
    ("own", "saved", "setting"), OTHER_SETTINGS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_weights_of_other_settings_are_not_loaded_onto_an_adapter(own, saved, setting, has_note, tmp_path) -> None:
    prefixed(tiny_model(), **saved).save_pretrained(tmp_path)
    if not has_note:
        save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata={"format": "pt"})
    model: Any = prefixed(tiny_model(), **own)
    expected = output_of(model, **INPUTS)
    with pytest.raises(ValueError, match=rf"'default' of the model has `{setting}`.*another name"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(output_of(model, **INPUTS), expected)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert torch.equal(
        output_of(model, **INPUTS), output_of(PeftModel.from_pretrained(tiny_model(), tmp_path), **INPUTS)
    )


def test_weights_alone_are_loaded_onto_an_adapter_of_their_settings_only(tmp_path: Path) -> None:
    source = prefixed(tiny_model(), position_free=False).eval()
    source.save_pretrained(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(ValueError, match="position_free"):
        prefixed(tiny_model()).load_adapter(tmp_path, "default")
    model = prefixed(tiny_model(), position_free=False)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(output_of(model, **INPUTS), output_of(source, **INPUTS))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_checkpoint_is_loaded_onto_the_adapter_that_it_is_of(is_trainable: bool, tmp_path: Path) -> None:
    """As the Trainer does at the end, with the best one."""
    model: Any = prefixed(tiny_model(), task_type="CAUSAL_LM")
    expected = output_of(model, **INPUTS)
    model.save_pretrained(tmp_path)
    initialize_from_key_values(
        model, {name: (key + 1.0, value) for name, (key, value) in prefix_key_values(model).items()}
    )
    assert not torch.equal(output_of(model, **INPUTS), expected)
    model.load_adapter(tmp_path, "default", is_trainable=is_trainable)
    assert torch.equal(output_of(model, **INPUTS), expected)


# ------------------------------------------------------------------------------------------------ the file's own


@pytest.mark.parametrize(
    ("fields", "edited"),
    [
        ({}, {"position_free": False}),
        ({"position_free": False}, {"position_free": True}),
        ({}, {"decoupled": True}),
        ({"reparameterization": "mlp"}, {"encoder_activation": "relu"}),
        ({"reparameterization": "mlp", "sharing": "all"}, {"encoder_activation": "gelu"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "config"])
def test_weights_and_configuration_of_two_saves_are_told_apart(way, fields, edited, tmp_path) -> None:
    prefixed(tiny_model(), task_type="CAUSAL_LM", **fields).save_pretrained(tmp_path)
    edit(tmp_path, **edited)
    base, model = tiny_model(), prefixed(tiny_model(), task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=rf"not saved together: `{next(iter(edited))}` is .* interrupted"):
        if way == "from_pretrained":
            PeftModel.from_pretrained(base, tmp_path)
        elif way == "load_adapter":
            model.load_adapter(tmp_path, "other")
        else:
            PrefixPlusConfig.from_pretrained(tmp_path)


EDITS: list[dict[str, Any]] = [
    {"base_model_name_or_path": "/elsewhere", "revision": "main", "inference_mode": False, "task_type": None},
    {"encoder_dropout": 0.1, "prefix_scaling": 2.0, "init_weights": "zero", "peft_version": "0.1"},
    {"target_modules": ["self_attn"]},
    {"layers_to_transform": [0, 1, 2]},
    {"position_free": None},
]


@pytest.mark.parametrize("edited", EDITS, ids=str)
def test_a_configuration_may_be_edited_where_the_weights_mean_the_same(edited: dict[str, Any], tmp_path: Path) -> None:
    model = prefixed(tiny_model(), task_type="CAUSAL_LM").eval()
    model.save_pretrained(tmp_path)
    edit(tmp_path, **edited)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(output_of(loaded, **INPUTS), output_of(model, **INPUTS))


def test_files_without_a_note_of_their_settings_load(tmp_path: Path) -> None:
    model = prefixed(tiny_model(), task_type="CAUSAL_LM", position_free=False).eval()
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(output_of(loaded, **INPUTS), output_of(model, **INPUTS))


@pytest.mark.parametrize("way", ["safetensors", "pickle"])
@pytest.mark.parametrize(
    ("fields", "edited"),
    [
        ({}, {"num_virtual_tokens": 20_000_000}),
        ({"reparameterization": "linear"}, {"num_virtual_tokens": 20_000_000}),
        ({"reparameterization": "linear"}, {"encoder_dim": 20_000_000}),
        ({"reparameterization": "mlp", "sharing": "all"}, {"encoder_hidden_size": 20_000_000}),
        ({}, {"reparameterization": "linear", "encoder_dim": 20_000_000}),
    ],
    ids=str,
)
def test_a_configuration_cannot_ask_for_more_than_the_weights_have(fields, edited, way, tmp_path, monkeypatch) -> None:
    prefixed(tiny_model(), task_type="CAUSAL_LM", **fields).save_pretrained(
        tmp_path, safe_serialization=way == "safetensors"
    )
    edit(tmp_path, **edited)
    monkeypatch.setattr("peft_prefix_plus.model.attach", None)  # nothing is built
    with pytest.raises(ValueError, match="does not fit its configuration"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="does not fit its configuration"):
        PrefixPlusConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{",
        "",
        "[1, 2]",
        '"text"',
        '{"peft_type": 3}',
        '{"peft_type": "PREFIX_PLUS", "encoder_dropout": 1' + "0" * 400 + "}",
    ],
)
def test_a_broken_configuration_is_named(text: str, tmp_path: Path) -> None:
    prefixed(tiny_model(), task_type="CAUSAL_LM").save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError):
        PrefixPlusConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError):
        prefixed(tiny_model(), task_type="CAUSAL_LM").load_adapter(tmp_path, "other")


def test_a_model_with_a_prefix_is_told_to_load_a_further_one(tmp_path: Path) -> None:
    model = prefixed(tiny_model(), task_type="CAUSAL_LM").eval()
    model.save_pretrained(tmp_path)
    expected = output_of(model, **INPUTS)
    with pytest.raises(ValueError, match=r"model\.load_adapter\(directory, adapter_name='other'\)"):
        PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(output_of(model, **INPUTS), expected)


def test_a_configuration_of_another_method_is_that_methods(tmp_path: Path) -> None:
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert isinstance(PrefixPlusConfig.from_pretrained(tmp_path), LoraConfig)


def test_a_configuration_handed_over_must_mean_the_same_by_the_weights(tmp_path: Path) -> None:
    model = prefixed(tiny_model(), position_free=False).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="position_free"):
        PeftModel.from_pretrained(tiny_model(), tmp_path, config=prefix_config())
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, config=prefix_config(position_free=False))
    assert torch.equal(output_of(loaded, **INPUTS), output_of(model, **INPUTS))
