"""The adapters of several methods, saved by one call and loaded by one: LoRA and PREFIX_PLUS."""

from __future__ import annotations

import json

import pytest
import torch
from models import assert_unchanged, output_of, prefix_config, state_of, task_inputs, tiny_model, token_ids
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from peft_prefix_plus import load_adapters


pytestmark = [
    # what PEFT says of every second method
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter name '.*' should not be contained in the prefix"),
]

INPUTS = task_inputs("CAUSAL_LM")
BOTH_ORDERS = pytest.mark.parametrize(
    "order", [("low", "prefix"), ("prefix", "low")], ids=["LoRA first", "prefix first"]
)


def config_of(name, **fields):
    if name == "low":
        return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return prefix_config(task_type="CAUSAL_LM", **fields)


def wrapped(order=("low", "prefix"), names=None):
    """A model with an adapter of each method; the wrappers by method. `names` are those that are not the method's."""
    base, wrappers = tiny_model(), {}
    for name in order:
        torch.manual_seed(len(name))
        wrappers[name] = get_peft_model(base, config_of(name), adapter_name=(names or {}).get(name, name)).eval()
    return wrappers


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trainer_of(model, folder, **arguments):
    rows = [{"input_ids": row, "labels": row} for row in token_ids(16, 6).tolist()]
    values = dict(max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none")
    values.update(use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, **arguments)
    return Trainer(model=model, args=TrainingArguments(str(folder), **values), train_dataset=rows)


@BOTH_ORDERS
@pytest.mark.parametrize("names", [{}, {"low": "default"}, {"prefix": "default"}], ids=["named", "LoRA", "prefix"])
def test_one_call_saves_both_and_one_loads_both(order, names, tmp_path):
    wrappers = wrapped(order, names)
    expected = output_of(wrappers["prefix"], **INPUTS)
    options = {"input_ids": INPUTS["input_ids"], "max_new_tokens": 6, "do_sample": False}
    written = wrappers["prefix"].generate(**options)

    wrappers["prefix"].save_pretrained(tmp_path)
    base = tiny_model()
    loaded = load_adapters(base, tmp_path)

    low, prefix = (names.get(name, name) for name in ("low", "prefix"))
    assert loaded.keys() == {low, prefix} and loaded[low] is not loaded[prefix]
    for model in loaded.values():
        assert isinstance(model, PeftModel) and model.get_base_model() is base
        assert torch.equal(output_of(model, **INPUTS), expected)
        assert torch.equal(model.generate(**options), written)
        assert not trained(model)
    # each wrapper switches the adapters of its method, and the other's stay
    loaded[prefix].base_model.set_adapter([])
    alone = PeftModel.from_pretrained(tiny_model(), tmp_path / low if low != "default" else tmp_path)
    assert torch.equal(output_of(loaded[low], **INPUTS), output_of(alone, **INPUTS))


@BOTH_ORDERS
def test_each_file_is_as_its_own_wrapper_saves_it(order, tmp_path):
    wrappers = wrapped(order)
    wrappers["prefix"].save_pretrained(tmp_path / "both")
    for name, model in wrappers.items():
        model.save_pretrained(tmp_path / name, selected_adapters=[name])
        file = f"{name}/adapter_model.safetensors"
        found, expected = load_file(tmp_path / "both" / file), load_file(tmp_path / name / file)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        configs = [json.loads((tmp_path / each / name / "adapter_config.json").read_text()) for each in ("both", name)]
        assert configs[0] == configs[1]


@BOTH_ORDERS
@pytest.mark.parametrize("under", ["low", "prefix"])
def test_both_train_under_the_trainer_and_resume_to_the_same_weights(order, under, tmp_path):
    model = wrapped(order)[under]
    start = trained(model)
    trainer_of(model, tmp_path).train()
    expected = trained(model)
    changed = {name for name in start if not torch.equal(expected[name], start[name])}
    assert all(any(marker in name for name in changed) for marker in ("lora_A", "lora_B", ".key", ".value"))

    resumed = wrapped(order)[under]
    trainer_of(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = trained(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_loaded_to_be_trained_both_are_trained(tmp_path):
    wrappers = wrapped()
    wrappers["prefix"].save_pretrained(tmp_path / "saved")
    loaded = load_adapters(tiny_model(), tmp_path / "saved", is_trainable=True)
    assert trained(loaded["prefix"]).keys() == trained(wrappers["prefix"]).keys()
    trainer_of(wrappers["prefix"], tmp_path / "one", save_strategy="no").train()
    trainer_of(loaded["prefix"], tmp_path / "two", save_strategy="no").train()
    expected = trained(wrappers["prefix"])
    assert all(torch.equal(value, expected[name]) for name, value in trained(loaded["prefix"]).items())


def test_several_adapters_of_a_method_share_a_wrapper_and_the_first_is_active(tmp_path):
    model = wrapped()["prefix"]
    model.add_adapter("another", config_of("prefix", num_virtual_tokens=2))
    model.save_pretrained(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()  # which has a card of its own
    wrapped()["prefix"].save_pretrained(tmp_path / "checkpoint-1", selected_adapters=["prefix"])

    loaded = load_adapters(tiny_model(), str(tmp_path))

    assert list(loaded) == ["another", "low", "prefix"]
    assert loaded["another"] is loaded["prefix"] and loaded["prefix"].active_adapters == ["another"]
    loaded["prefix"].set_adapter("prefix")
    assert torch.equal(output_of(loaded["prefix"], **INPUTS), output_of(wrapped()["prefix"], **INPUTS))


def damage_prefix(folder):
    (folder / "prefix" / "adapter_model.safetensors").write_bytes(b"nothing")


def without_weights(folder):
    (folder / "prefix" / "adapter_model.safetensors").unlink()


def name_unknown_method(folder):
    (folder / "prefix" / "adapter_config.json").write_text('{"peft_type": "NOTHING"}')


def damage_config(folder):
    (folder / "low" / "adapter_config.json").write_text('{"peft_type"')


def with_prompt(folder):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(tiny_model(), config, adapter_name="prompt").save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_prefix, "prefix.*It is incomplete or broken"),
        (without_weights, r"prefix/? has no weights"),
        (name_unknown_method, r"prefix.adapter_config\.json is of the method 'NOTHING', which PEFT does not know"),
        (damage_config, r"low.adapter_config\.json cannot be read"),
        (with_prompt, "'prompt' is one of PROMPT_TUNING"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(damage, message, tmp_path):
    wrapped()["prefix"].save_pretrained(tmp_path)
    damage(tmp_path)
    base = tiny_model()
    before, attributes = state_of(base), dict(vars(base))
    with pytest.raises(ValueError, match=message):
        load_adapters(base, tmp_path)
    assert_unchanged(base, before)
    assert vars(base) == attributes


def test_nothing_to_load_and_a_model_that_is_wrapped_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter.*adapter_config\.json"):
        load_adapters(tiny_model(), tmp_path)
    model = wrapped()["low"]
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"model\.unload\(\)"):
        load_adapters(model, tmp_path)
