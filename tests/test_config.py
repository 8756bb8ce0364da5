"""The configuration: what it accepts, what it refuses and says, and that it survives being saved."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import numpy
import pytest
from models import prefix_config, prefix_layers, tiny_model, unchanged
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model

from peft_prefix_plus import PrefixPlusConfig


WRONG_VALUES = [
    ("reparameterization", "lora", ["'none'", "'log'", "'linear'", "'mlp'"]),
    ("sharing", "layers", ["'none'", "'input'", "'projection'", "'all'"]),
    ("encoder_activation", "tahn", ["tanh", "gelu", "silu"]),
    ("num_virtual_tokens", 0, ["at least 1"]),
    ("num_virtual_tokens", -3, ["at least 1"]),
    ("encoder_dim", 0, ["at least 1"]),
    ("encoder_dropout", 1.0, ["[0, 1)"]),
    ("encoder_dropout", -0.1, ["[0, 1)"]),
    ("encoder_dropout", math.nan, ["[0, 1)"]),
    ("prefix_scaling", 0.0, ["positive"]),
    ("prefix_scaling", -1.0, ["positive"]),
    ("prefix_scaling", math.inf, ["finite"]),
    ("init_weights", "zeros", ["True", "False", "'random'", "'zero'"]),
    ("init_weights", 1, ["True", "False", "'random'", "'zero'"]),
    ("init_weights", None, ["True", "False", "'random'", "'zero'"]),
    ("layers_to_transform", [], ["None"]),
    ("target_modules", [], ["None"]),
    ("target_modules", "(", ["regular expression"]),
    ("exclude_modules", "*attn", ["regular expression"]),
    ("task_type", "CAUSAL", ["CAUSAL_LM"]),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG_VALUES)
def test_a_wrong_value_is_refused_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as error:
        PrefixPlusConfig(**{name: value})

    assert name.replace("task_type", "task type") in str(error.value)
    for expected in [repr(value).strip("'"), *allowed] if value != [] else allowed:
        assert expected in str(error.value)


WRONG_TYPES = [
    ("num_virtual_tokens", "20", "int"),
    ("num_virtual_tokens", 20.0, "int"),
    ("num_virtual_tokens", True, "int"),
    ("num_virtual_tokens", None, "int"),
    ("encoder_dim", 8.5, "int"),
    ("encoder_hidden_size", "8", "int"),
    ("encoder_dropout", "0.1", "float"),
    ("encoder_dropout", None, "float"),
    ("prefix_scaling", [1.0], "float"),
    ("reparameterization", 3, "string"),
    ("sharing", ["all"], "string"),
    ("encoder_activation", 3, "string"),
    ("encoder_prefix", 1, "True or False"),
    ("cross_prefix", None, "True or False"),
    ("gating", "yes", "True or False"),
    ("decoupled", 1, "True, False or None"),
    ("layers_to_transform", "all", "list of ints"),
    ("layers_to_transform", [0, "1"], "list of ints"),
    ("layers_to_transform", 1.0, "list of ints"),
    ("layers_to_transform", True, "list of ints"),
    ("layers_pattern", 3, "list of strings"),
    ("target_modules", 3, "list of strings"),
    ("target_modules", [3], "list of strings"),
    ("exclude_modules", {"a": "b"}, "list of strings"),
    ("modules_to_save", "lm_head", "list of names"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG_TYPES)
def test_a_wrong_type_is_refused_with_the_right_one(name, value, expected):
    with pytest.raises(TypeError) as error:
        PrefixPlusConfig(**{name: value})

    for part in (f"`{name}`", repr(value), expected):
        assert part in str(error.value)


CONTRADICTIONS = [
    ({"layers_pattern": "layers"}, ["layers_pattern", "layers_to_transform"]),
    ({"layers_to_transform": 0, "target_modules": ".*attn"}, ["layers_to_transform", "target_modules", "string"]),
    ({"encoder_hidden_size": 8}, ["encoder_hidden_size", "8", "'log'", "mlp"]),
    ({"encoder_hidden_size": 8, "reparameterization": "linear"}, ["encoder_hidden_size", "'linear'", "mlp"]),
    ({"gating": True, "init_weights": "zero"}, ["gating", "init_weights", "'zero'"]),
    ({"decoupled": True, "init_weights": "zero"}, ["decoupled", "init_weights", "'zero'", "init_weights=True"]),
    ({"decoupled": True, "gating": True}, ["`gating`", "`decoupled`", "Choose one"]),
]


@pytest.mark.parametrize(("fields", "expected"), CONTRADICTIONS)
def test_contradicting_fields_are_refused_with_both_names(fields, expected):
    with pytest.raises(ValueError) as error:
        PrefixPlusConfig(**fields)

    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize("layers", [3, -4, [0, 3], [-4], 99])
def test_a_layer_out_of_range_is_refused_with_the_range(layers):
    model = tiny_model(num_hidden_layers=3)

    with unchanged(model), pytest.raises(ValueError, match=r"layers_to_transform.*\[0, 1, 2\]") as error:
        get_peft_model(model, prefix_config(layers_to_transform=layers))

    assert str(layers[-1] if isinstance(layers, list) else layers) in str(error.value)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2, 3]),
        (0, [0]),
        (-1, [3]),
        ([0, -1], [0, 3]),
        ((1, 2), [1, 2]),
        (range(1, 3), [1, 2]),
        ({2, 0}, [0, 2]),
        ([-2, 2], [2]),
        (numpy.int64(1), [1]),
        (list(numpy.arange(2)), [0, 1]),
    ],
)
def test_layers_to_transform_chooses_layers(layers, expected, tmp_path):
    model = get_peft_model(tiny_model(num_hidden_layers=4), prefix_config(layers_to_transform=layers))

    assert list(prefix_layers(model)) == [f"model.layers.{layer}.self_attn" for layer in expected]
    model.peft_config["default"].save_pretrained(tmp_path)
    assert (
        PrefixPlusConfig.from_pretrained(tmp_path).layers_to_transform
        == model.peft_config["default"].layers_to_transform
    )


@pytest.mark.parametrize("pattern", ["layers", ["layers"], ["h", "layers"]])
def test_layers_pattern_names_the_list_of_layers(pattern):
    model = get_peft_model(tiny_model(), prefix_config(layers_to_transform=[1], layers_pattern=pattern))

    assert list(prefix_layers(model)) == ["model.layers.1.self_attn"]


def test_layers_of_an_encoder_decoder_count_in_each_stack():
    model = get_peft_model(tiny_model("bart", "SEQ_2_SEQ_LM"), prefix_config(layers_to_transform=-1))

    assert set(prefix_layers(model)) == {
        "model.encoder.layers.1.self_attn",
        "model.decoder.layers.1.self_attn",
        "model.decoder.layers.1.encoder_attn",
    }


def test_the_defaults_are_those_of_the_design():
    config = PrefixPlusConfig()

    assert config.peft_type is PeftType.PREFIX_PLUS
    assert config.is_prompt_learning is False
    assert config.is_adaption_prompt is False
    own = {field.name: field.default for field in dataclasses.fields(PrefixPlusConfig)}
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    assert {name: default for name, default in own.items() if name not in inherited} == {
        "num_virtual_tokens": 20,
        "reparameterization": None,
        "sharing": "projection",
        "encoder_dim": 64,
        "encoder_hidden_size": None,
        "encoder_activation": "tanh",
        "encoder_dropout": 0.0,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": None,
        "exclude_modules": None,
        "encoder_prefix": True,
        "cross_prefix": True,
        "prefix_scaling": None,
        "gating": False,
        "decoupled": None,
        "position_free": None,
        "init_weights": True,
        "modules_to_save": None,
    }
    assert all(
        field.metadata.get("help") for field in dataclasses.fields(PrefixPlusConfig) if field.name not in inherited
    )


@pytest.mark.parametrize(
    ("fields", "reparameterization"),
    [
        ({}, "log"),
        ({"decoupled": True}, "log"),
        ({"decoupled": False}, "none"),
        ({"gating": True}, "none"),
        ({"init_weights": "activations"}, "none"),
        ({"init_weights": False}, "none"),
        ({"reparameterization": "none"}, "none"),
        ({"reparameterization": "mlp"}, "mlp"),
        ({"reparameterization": "log", "decoupled": False}, "log"),
    ],
)
def test_a_quiet_start_of_the_decoupled_form_has_steps_that_shrink(fields, reparameterization):
    assert PrefixPlusConfig(**fields).reparameterization == reparameterization


@pytest.mark.parametrize(
    ("fields", "decoupled"),
    [({}, True), ({"gating": True}, False), ({"init_weights": "zero"}, False), ({"decoupled": False}, False)],
)
def test_the_form_is_decoupled_unless_another_is_asked_for(fields, decoupled, tmp_path):
    config = PrefixPlusConfig(**fields)
    assert config.decoupled is decoupled
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["decoupled"] is decoupled


FULL = {
    "task_type": "SEQ_CLS",
    "num_virtual_tokens": 7,
    "reparameterization": "mlp",
    "sharing": "all",
    "encoder_dim": 9,
    "encoder_hidden_size": 11,
    "encoder_activation": "gelu",
    "encoder_dropout": 0.25,
    "layers_to_transform": [0, -1],
    "layers_pattern": "layers",
    "target_modules": ["self_attn", "encoder_attn"],
    "exclude_modules": ["layers.3.self_attn"],
    "encoder_prefix": False,
    "cross_prefix": False,
    "prefix_scaling": 0.5,
    "gating": True,
    "decoupled": False,
    "init_weights": "activations",
    "modules_to_save": ["score"],
}


@pytest.mark.parametrize("fields", [{}, FULL, {"target_modules": r".*attn", "layers_to_transform": None}])
def test_a_config_survives_json(fields, tmp_path):
    config = PrefixPlusConfig(**fields)

    config.save_pretrained(tmp_path)

    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "PREFIX_PLUS"
    assert set(stored) == {field.name for field in dataclasses.fields(PrefixPlusConfig)}
    assert PrefixPlusConfig.from_pretrained(tmp_path) == PeftConfig.from_pretrained(tmp_path) == config


def test_collections_and_numbers_of_other_types_are_stored_as_plain_ones(tmp_path):
    config = PrefixPlusConfig(
        num_virtual_tokens=numpy.int64(4),
        encoder_dropout=numpy.float32(0.5),
        prefix_scaling=2,
        target_modules=("self_attn",),
        exclude_modules={"layers.0.self_attn"},
        modules_to_save=("lm_head",),
    )

    config.save_pretrained(tmp_path)

    assert PrefixPlusConfig.from_pretrained(tmp_path) == config
    assert config.target_modules == ["self_attn"]
    assert (config.num_virtual_tokens, config.encoder_dropout, config.prefix_scaling) == (4, 0.5, 2.0)


def config_with_unknown_key(config: PeftConfig, path, **changes) -> PeftConfig:
    config.save_pretrained(path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return PeftConfig.from_pretrained(path)


@pytest.mark.parametrize("config_class", [LoraConfig, PrefixPlusConfig])
def test_keys_of_a_newer_version_are_ignored_with_a_warning_as_in_lora(config_class, tmp_path):
    config = config_class(target_modules=["self_attn"])

    with pytest.warns(UserWarning, match=rf"\['from_the_future'\] for class {config_class.__name__}"):
        loaded = config_with_unknown_key(config, tmp_path, from_the_future=3)

    if config_class is PrefixPlusConfig:
        assert loaded == config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_with_unknown_key(config, tmp_path)


def test_a_stored_value_of_a_newer_version_is_refused_not_ignored(tmp_path):
    with pytest.raises(ValueError, match=r"`sharing` must be one of .* got 'heads'"):
        config_with_unknown_key(PrefixPlusConfig(), tmp_path, sharing="heads")


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="num_virtual_token"):
        PrefixPlusConfig(num_virtual_token=3)
