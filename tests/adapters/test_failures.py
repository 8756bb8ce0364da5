"""What fails says why, and leaves the model, its configs and its adapters as they were."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from models import (
    State,
    adapter_parameters,
    assert_unchanged,
    output_of,
    prefix_config,
    prefixed,
    state_of,
    tiny_model,
    token_ids,
    unchanged,
)
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from peft_prefix_plus import PrefixPlusConfig


INPUTS = {"input_ids": token_ids()}

WRONG_TARGETS = [
    ({"target_modules": ["q_proj"]}, ["target_modules", "'q_proj'", "model.layers.0.self_attn"]),
    ({"target_modules": ["self_attn", "cross_attn"]}, ["target_modules", "'cross_attn'", "model.layers.0.self_attn"]),
    ({"target_modules": r"model\.layers\.9\.self_attn"}, ["target_modules", "layers", "model.layers.0.self_attn"]),
    ({"target_modules": "self_attn"}, ["target_modules", "'self_attn'", "regular expression"]),
    ({"exclude_modules": ["mlp"]}, ["exclude_modules", "'mlp'", "model.layers.0.self_attn"]),
    ({"exclude_modules": ["self_attn"]}, ["exclude_modules", "leaves no attention module"]),
    ({"exclude_modules": ".*attn"}, ["exclude_modules", "leaves no attention module"]),
    (
        {"target_modules": ["layers.1.self_attn"], "exclude_modules": ["1.self_attn"]},
        ["exclude_modules", "leaves no attention module"],
    ),
    ({"layers_to_transform": 3}, ["layers_to_transform", "layer 3", "[0, 1, 2]"]),
    ({"layers_to_transform": [0, -4]}, ["layers_to_transform", "layer -4", "[0, 1, 2]"]),
    (
        {"layers_to_transform": 2, "target_modules": ["layers.0.self_attn"]},
        ["layers_to_transform", "layer 2", "[0]"],
    ),
    ({"layers_to_transform": 0, "layers_pattern": "h"}, ["layers_to_transform", "layers_pattern", "'h'"]),
]


@pytest.mark.parametrize(("fields", "expected"), WRONG_TARGETS, ids=str)
@pytest.mark.parametrize("way", ["wrap", "add", "inject", "inject second"])
def test_a_selection_that_fits_nothing_is_refused_and_changes_nothing(way, fields, expected):
    base = tiny_model()
    config = prefix_config(**fields)
    fields_before = dataclasses.asdict(config)
    model = prefixed(base) if way == "add" else base
    if way == "inject second":
        inject_adapter_in_model(prefix_config(), base, "first")
    before = state_of(model)

    with pytest.raises(ValueError) as error:
        if way == "wrap":
            get_peft_model(base, config)
        elif way == "add":
            model.add_adapter("other", config)
        else:
            inject_adapter_in_model(config, base, "other")

    for part in expected:
        assert part in str(error.value)
    assert_unchanged(model, before)
    assert dataclasses.asdict(config) == fields_before
    if way == "add":
        model.add_adapter("other", prefix_config())
        assert model.active_adapters == ["default"]
    else:
        assert get_peft_model(tiny_model(), prefix_config()) is not None


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("init_weights", "zero", "never learns"),
        ("num_virtual_tokens", 0, "num_virtual_tokens"),
        ("target_modules", 3, "target_modules"),
        ("reparameterization", "asinh", "'log', 'linear', 'mlp'"),
    ],
)
def test_a_field_set_later_is_checked_when_the_adapter_is_made(field, value, expected):
    model, config = tiny_model("llama"), PrefixPlusConfig()
    setattr(config, field, value)
    with unchanged(model), pytest.raises((TypeError, ValueError), match=expected):
        get_peft_model(model, config)


def test_a_field_set_later_to_its_default_means_what_it_means_in_a_new_configuration():
    config = PrefixPlusConfig(reparameterization="mlp")
    config.reparameterization = None
    model = get_peft_model(tiny_model("llama"), config)
    assert model.base_model.resolved_config().reparameterization == PrefixPlusConfig().reparameterization == "log"
    assert (
        adapter_parameters(model).keys()
        == adapter_parameters(get_peft_model(tiny_model("llama"), PrefixPlusConfig())).keys()
    )


def test_encoder_and_cross_attention_switched_off_can_leave_nothing():
    model = tiny_model("t5", "SEQ_2_SEQ_LM")
    fields = {"target_modules": ["EncDecAttention"], "cross_prefix": False}

    with unchanged(model), pytest.raises(ValueError, match=r"`cross_prefix` is False.*leaves no attention module"):
        get_peft_model(model, prefix_config(**fields))


MAMBA_SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "expand": 2}
WITHOUT_ATTENTION = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA_SIZES)),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**MAMBA_SIZES, num_heads=4, head_dim=8, n_groups=1)
    ),
    "rwkv": lambda: transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)
    ),
    "a plain module": lambda: torch.nn.Sequential(torch.nn.Linear(3, 3)),
}


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
@pytest.mark.parametrize("fields", [{}, {"target_modules": ["mixer"]}, {"layers_to_transform": 0}])
def test_a_model_without_attention_is_refused(name, fields):
    model = WITHOUT_ATTENTION[name]()

    with unchanged(model), pytest.raises(ValueError, match=f"{type(model).__name__} has no attention module"):
        get_peft_model(model, prefix_config(**fields))


@pytest.fixture
def implementation_of_ones_own() -> Iterator[str]:
    """An attention implementation that transformers knows, and this package does not."""
    name = "made_up_attention"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    yield name
    AttentionInterface._global_mapping.pop(name)
    AttentionMaskInterface._global_mapping.pop(name)


NOT_KNOWN = r"attention implementation 'made_up_attention'.*Use 'sdpa'"


def test_an_attention_implementation_that_is_not_known_is_refused(implementation_of_ones_own):
    model = tiny_model(implementation=implementation_of_ones_own)
    assert torch.equal(output_of(model, **INPUTS), output_of(tiny_model(), **INPUTS))

    with unchanged(model), pytest.raises(ValueError, match=NOT_KNOWN):
        get_peft_model(model, prefix_config())


def test_an_attention_implementation_set_later_is_refused_when_it_runs(implementation_of_ones_own):
    model = prefixed(tiny_model())
    expected = output_of(model, **INPUTS)

    model.set_attn_implementation(implementation_of_ones_own)
    with pytest.raises(ValueError, match=NOT_KNOWN):
        output_of(model, **INPUTS)

    model.set_attn_implementation("sdpa")
    assert torch.equal(output_of(model, **INPUTS), expected)


@pytest.mark.parametrize("way", ["wrap", "add", "inject second"])
def test_a_failure_half_way_is_undone(way, monkeypatch):
    base = tiny_model()
    config = prefix_config(task_type="CAUSAL_LM", modules_to_save=["lm_head", "layers"])  # a ModuleList has no forward
    model = base
    if way == "add":
        model = prefixed(base, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    elif way == "inject second":
        inject_adapter_in_model(prefix_config(), base, "first")
    before = state_of(model)

    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        if way == "wrap":
            get_peft_model(base, config)
        elif way == "add":
            model.add_adapter("other", config)
        else:
            inject_adapter_in_model(config, base, "other")

    assert_unchanged(model, before)


# ------------------------------------------------------------------------------------------------ loading


def save_adapter(path: Path, model: torch.nn.Module | None = None, **fields: object) -> Path:
    prefixed(tiny_model() if model is None else model, task_type="CAUSAL_LM", **fields).save_pretrained(path)
    return path


def change_tensors(path: Path, change) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def other_model_size(path: Path) -> None:
    save_adapter(path, tiny_model(hidden_size=48))


def more_layers(path: Path) -> None:
    save_adapter(path, tiny_model(num_hidden_layers=4))


def fewer_layers(path: Path) -> None:
    save_adapter(path, tiny_model(num_hidden_layers=2))


def missing_tensor(path: Path) -> None:
    change_tensors(save_adapter(path), lambda tensors: tensors.pop(min(tensors)))


def extra_tensor(path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors).replace("layers.0", "layers.7")] = torch.zeros(2)

    change_tensors(save_adapter(path), add)


def foreign_tensor(path: Path) -> None:
    change_tensors(save_adapter(path), lambda tensors: tensors.update({"something.else": torch.zeros(2)}))


def other_length(path: Path) -> None:
    file = save_adapter(path) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_virtual_tokens": 9}))


def other_encoder(path: Path) -> None:
    file = save_adapter(path, reparameterization="linear") / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "reparameterization": "none"}))


KEY = "self_attn.prefix_plus.prefix_plus_encoder"
FOUND_IN_THE_MODEL = [
    (other_model_size, ["model.layers.0.self_attn", "has shape (2, 3, 12)", "(2, 3, 8) in the model"]),
    (more_layers, ["model.layers.3.self_attn", "the model has none of that name"]),
    (fewer_layers, ["model.layers.2.self_attn", "it has no tensor for", "(2, 3, 8)"]),
    (missing_tensor, ["model.layers.0.self_attn", "it has no tensor for", "(2, 3, 8)"]),
    (extra_tensor, ["model.layers.7.self_attn", "the model has none of that name"]),
    (foreign_tensor, ["something.else", "the model has none of that name"]),
    (other_length, ["model.layers.0.self_attn", "has shape (2, 3, 8)", "(2, 9, 8) in the model"]),
    (other_encoder, [KEY, "it has no tensor for"]),
]
FOUND_IN_THE_FILES = {
    other_length: ["model.layers.0.self_attn", "has shape (2, 3, 8)", "`num_virtual_tokens` is 9"],
    other_encoder: ["`reparameterization` is 'none'", "has no tensor for prefix_plus_encoder.key"],
}
EACH_MISFIT = pytest.mark.parametrize(
    ("misfit", "expected"),
    [(misfit, FOUND_IN_THE_FILES.get(misfit, expected)) for misfit, expected in FOUND_IN_THE_MODEL],
    ids=lambda value: getattr(value, "__name__", ""),
)


def assert_says(error: pytest.ExceptionInfo[BaseException], expected: list[str]) -> None:
    for part in ("does not fit", *expected, "base_model_name_or_path", "adapter_config.json"):
        assert part in str(error.value)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@EACH_MISFIT
def test_from_pretrained_of_an_adapter_that_does_not_fit_leaves_the_base_model(
    misfit, expected, low_cpu_mem_usage, tmp_path
):
    misfit(tmp_path)
    base = tiny_model()

    with unchanged(base), pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    assert_says(error, expected)
    assert torch.equal(output_of(base, **INPUTS), output_of(tiny_model(), **INPUTS))


@pytest.mark.parametrize("is_trainable", [False, True])
@EACH_MISFIT
def test_load_adapter_of_one_that_does_not_fit_leaves_the_others(misfit, expected, is_trainable, tmp_path):
    misfit(tmp_path)
    model = prefixed(tiny_model(), task_type="CAUSAL_LM", layers_to_transform=[1], modules_to_save=["lm_head"])
    output = output_of(model, **INPUTS)

    with unchanged(model), pytest.raises(ValueError) as error:
        model.load_adapter(tmp_path, "other", is_trainable=is_trainable)

    assert_says(error, expected)
    assert torch.equal(output_of(model, **INPUTS), output)
    model.add_adapter("other", prefix_config(task_type="CAUSAL_LM"))  # the name is free


@EACH_MISFIT
def test_loading_into_an_adapter_of_ones_own_leaves_it_as_it_was(misfit, expected, tmp_path):
    misfit(tmp_path)
    length = 9 if misfit is other_length else 3
    model = prefixed(tiny_model(), task_type="CAUSAL_LM", num_virtual_tokens=length)

    with unchanged(model), pytest.raises(ValueError) as error:
        model.load_adapter(tmp_path, "default", is_trainable=True)

    assert_says(error, expected)


@pytest.mark.parametrize(("misfit", "expected"), FOUND_IN_THE_MODEL, ids=lambda value: getattr(value, "__name__", ""))
def test_a_state_dict_that_does_not_fit_is_refused_on_a_bare_model_too(misfit, expected, tmp_path):
    misfit(tmp_path)
    config = PrefixPlusConfig.from_peft_type(**PrefixPlusConfig.from_json_file(tmp_path / "adapter_config.json"))
    model = inject_adapter_in_model(config, tiny_model())

    with unchanged(model), pytest.raises(ValueError) as error:
        set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))

    assert_says(error, expected)


def test_an_adapter_with_further_modules_that_does_not_fit_leaves_those_modules(tmp_path):
    save_adapter(tmp_path, modules_to_save=["lm_head"])
    change_tensors(tmp_path, lambda tensors: tensors.pop(next(key for key in tensors if KEY in key)))
    base = tiny_model()
    model = prefixed(tiny_model(), task_type="CAUSAL_LM")

    with unchanged(base), pytest.raises(ValueError, match="does not fit"):
        PeftModel.from_pretrained(base, tmp_path)
    with unchanged(model), pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(tmp_path, "other")


def test_a_base_model_with_frozen_and_trainable_parameters_gets_both_back(tmp_path):
    other_model_size(tmp_path)
    base = tiny_model()
    base.model.layers[0].requires_grad_(False)
    base.lm_head.requires_grad_(False)

    with unchanged(base), pytest.raises(ValueError, match="does not fit"):
        PeftModel.from_pretrained(base, tmp_path)
    with unchanged(base), pytest.raises(ValueError, match="names no attention module"):
        get_peft_model(base, prefix_config(target_modules=["nothing"]))


def test_after_a_failed_load_the_right_adapter_loads(tmp_path):
    other_model_size(tmp_path / "wrong")
    source = prefixed(tiny_model(), task_type="CAUSAL_LM")
    source.save_pretrained(tmp_path / "right")
    base = tiny_model()
    with pytest.raises(ValueError, match="does not fit"):
        PeftModel.from_pretrained(base, tmp_path / "wrong")

    model = PeftModel.from_pretrained(base, tmp_path / "right")
    assert torch.equal(output_of(model, **INPUTS), output_of(source, **INPUTS))
    with pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(tmp_path / "wrong", "default")

    assert torch.equal(output_of(model, **INPUTS), output_of(source, **INPUTS))


def test_an_adapter_made_from_a_loaded_adapters_config_is_ones_own(tmp_path):
    save_adapter(tmp_path / "right")
    other_model_size(tmp_path / "wrong")
    config = PeftModel.from_pretrained(tiny_model(), tmp_path / "right").peft_config["default"]
    model = get_peft_model(tiny_model(), copy.deepcopy(config))

    with unchanged(model), pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(tmp_path / "wrong", "default")

    assert adapter_parameters(model)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["model.layers.9.self_attn.prefix_plus.prefix_plus_encoder.key"], "model.layers.9.self_attn"),
        (["model.layers.0.mlp.prefix_plus.prefix_plus_encoder.key"], "model.layers.0.mlp"),
        (["model.layers.0.self_attn.q_proj.lora_A.weight"], "no parameters of a PREFIX_PLUS adapter"),
        ([], "no parameters of a PREFIX_PLUS adapter"),
    ],
)
def test_a_state_dict_to_inject_that_fits_nothing_is_refused(keys, expected):
    model = tiny_model()

    with unchanged(model), pytest.raises(ValueError, match=expected):
        inject_adapter_in_model(prefix_config(), model, state_dict={key: torch.zeros(2) for key in keys})


def test_the_state_recorder_sees_what_it_is_for():
    base = tiny_model()
    before = state_of(base)

    def is_unchanged(before: State) -> bool:
        try:
            assert_unchanged(base, before)
        except AssertionError:
            return False
        return True

    assert is_unchanged(before)
    base.lm_head.weight.requires_grad_(False)
    assert not is_unchanged(before)
    before = state_of(base)
    model = prefixed(base)
    assert not is_unchanged(before)
    before = state_of(base)
    with torch.no_grad():
        next(iter(adapter_parameters(model).values())).add_(1.0)
    assert not is_unchanged(before)
    before = state_of(base)
    base.model.layers[0].self_attn.config = copy.copy(base.config)
    assert not is_unchanged(before)
    assert get_peft_model_state_dict(model)
