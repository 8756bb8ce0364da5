"""Importing the package: what it registers, how often it may be imported, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import multiprocessing
import pickle
import pkgutil

import peft
import pytest
import torch
from models import output_of, prefix_config, prefixed, tiny_model, token_ids
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import AttentionInterface

import peft_prefix_plus
from peft_prefix_plus import PrefixPlusConfig, PrefixPlusModel


def assert_is_registered() -> None:
    member = PeftType.PREFIX_PLUS
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert member == "PREFIX_PLUS"
    assert member.value == member.name == "PREFIX_PLUS"
    assert PeftType("PREFIX_PLUS") is PeftType["PREFIX_PLUS"] is member
    assert list(PeftType).count(member) == 1
    assert "PREFIX_PLUS" in PeftType.__members__
    assert len({*PeftType}) == len(list(PeftType))
    package = importlib.import_module("peft_prefix_plus")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is package.PrefixPlusConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is package.PrefixPlusModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "prefix_plus_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING["PREFIX_PLUS"] is package.PrefixPlusConfig  # as PEFT looks it up for a file


def test_the_method_is_a_true_member_of_pefts_enum_and_in_its_mappings():
    assert_is_registered()
    assert {"prefix_plus", "prefix_plus_probe"} <= set(AttentionInterface().valid_keys())


@pytest.mark.parametrize("dumps", [pickle.dumps, copy.deepcopy, copy.copy])
def test_a_copied_member_is_the_member(dumps):
    copied = dumps(PeftType.PREFIX_PLUS)

    assert (pickle.loads(copied) if isinstance(copied, bytes) else copied) is PeftType.PREFIX_PLUS


@pytest.mark.parametrize("member", [PeftType.PREFIX_PLUS, PeftType.LORA])
def test_the_member_behaves_as_pefts_own(member):
    name = member.name

    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": name}
    assert {member: 1}[name] == 1
    assert hash(member) == hash(PeftType(name))
    assert repr(member) == f"<PeftType.{name}: '{name}'>"
    assert str(member) == f"PeftType.{name}"


RELOAD = """
import importlib, pkgutil, sys
import peft_prefix_plus
from models import output_of, prefixed, prefix_config, tiny_model, token_ids
from test_registration import assert_is_registered

model = prefixed(tiny_model())
before = output_of(model, input_ids=token_ids())
names = [module.name for module in pkgutil.walk_packages(peft_prefix_plus.__path__, "peft_prefix_plus.")]
submodules = [sys.modules[name] for name in names if name in sys.modules]
assert len(submodules) > 8
for module in [peft_prefix_plus, *submodules, peft_prefix_plus, peft_prefix_plus]:
    importlib.reload(module)
for name in [name for name in sys.modules if name.split(".")[0] == "peft_prefix_plus"]:
    del sys.modules[name]
importlib.import_module("peft_prefix_plus")
assert_is_registered()

assert (output_of(model, input_ids=token_ids()) == before).all()
from peft import get_peft_model
from peft_prefix_plus import PrefixPlusConfig
model = get_peft_model(tiny_model(), PrefixPlusConfig(num_virtual_tokens=3, init_weights=False))
base = tiny_model()
assert (output_of(model, input_ids=token_ids()) != output_of(base, input_ids=token_ids())).any()
"""


def test_importing_again_and_reloading_are_harmless(run_in_new_process):
    run_in_new_process(RELOAD)


@pytest.mark.parametrize(
    "name", [module.name for module in pkgutil.walk_packages(peft_prefix_plus.__path__, "peft_prefix_plus.")]
)
def test_a_submodule_can_be_imported_unless_its_extra_is_missing(name):
    try:
        if not name.endswith("__main__"):  # imported, it runs the command
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert name.split(".")[1] in ("cli", "serving"), name
        assert error.name in ("typer", "rich", "fastapi", "uvicorn", "vllm"), name


def output_in_worker(model: PeftModel, config: PrefixPlusConfig) -> tuple[torch.Tensor, PrefixPlusConfig]:
    assert isinstance(model, PeftModelForCausalLM)
    assert isinstance(model.base_model, PrefixPlusModel)
    assert_is_registered()
    return output_of(model, input_ids=token_ids()), config


def test_models_and_configs_travel_to_spawned_workers():
    model = prefixed(tiny_model(), task_type="CAUSAL_LM")
    config = prefix_config(reparameterization="mlp", layers_to_transform=[-1])

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        output, returned = pool.apply(output_in_worker, (model, config))

    assert torch.equal(output, output_of(model, input_ids=token_ids()))
    assert returned == config
    assert returned.peft_type is PeftType.PREFIX_PLUS


UNPICKLE = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    member = pickle.load(file)
from peft import PeftType
assert member is PeftType("PREFIX_PLUS") is PeftType.PREFIX_PLUS
from test_registration import assert_is_registered
assert_is_registered()
"""


def test_the_bare_member_unpickles_where_the_package_was_not_imported(run_in_new_process, tmp_path):
    path = tmp_path / "member.pickle"
    path.write_bytes(pickle.dumps(PeftType.PREFIX_PLUS))

    run_in_new_process(UNPICKLE, path)


UNTOUCHED = """
import inspect, sys
import torch
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.bert.modeling_bert
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface
import peft, peft.peft_model, peft.tuners.tuners_utils, peft.utils.save_and_load

WATCHED = ("transformers.models", "transformers.masking_utils", "transformers.modeling_utils", "transformers.cache_utils",
           "transformers.generation", "transformers.integrations", "torch.nn.functional", "torch.nn.modules", "peft")

def contents():
    found = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith(WATCHED):
            continue
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = id(value)
            if inspect.isclass(value) and value.__module__ == name:
                found.update({(name, attribute, key): id(item) for key, item in list(vars(value).items())})
    return found

def registries():
    attention, masks = AttentionInterface(), AttentionMaskInterface()
    return ({key: id(attention[key]) for key in attention.valid_keys()},
            {key: id(masks[key]) for key in masks.valid_keys()})

model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2)).eval()
ids = torch.arange(4)[None]
called = []

def trace(frame, event, argument):
    if event == "call":
        called.append(frame.f_code)

def run():
    called.clear()
    sys.setprofile(trace)
    with torch.no_grad():
        logits = model(ids).logits
    sys.setprofile(None)
    return logits, list(called)

run()  # fills caches
logits, codes = run()
before, (attention, masks) = contents(), registries()
import peft_prefix_plus
after, (attention_now, masks_now) = contents(), registries()
logits_now, codes_now = run()

changed = {key for key in before if key not in after or after[key] != before[key]}
assert changed == set(), changed
known = {key[:-1] for key in before}
added = {key for key in after if key not in before and key[:-1] in known}
assert added == {("peft.utils.peft_types", "PeftType", "PREFIX_PLUS")}, added
assert {key: attention_now[key] for key in attention} == attention
assert set(attention_now) - set(attention) == {"prefix_plus", "prefix_plus_probe"}
assert masks_now == masks
assert codes_now == codes and len(codes) > 20
assert torch.equal(logits_now, logits)
"""


def test_a_model_without_an_adapter_runs_the_very_same_functions_as_before_the_import(run_in_new_process):
    run_in_new_process(UNTOUCHED)


def test_peft_config_finds_the_method(tmp_path):
    config = prefix_config(task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)

    loaded = PeftConfig.from_pretrained(tmp_path)

    assert type(loaded) is PrefixPlusConfig
    assert loaded == config
    assert peft.get_peft_config({"peft_type": "PREFIX_PLUS", "num_virtual_tokens": 7}).num_virtual_tokens == 7


def test_the_auto_class_finds_the_method_and_the_base_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = prefixed(type(tiny_model()).from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")

    assert isinstance(loaded, PeftModelForCausalLM)
    assert isinstance(loaded.base_model, PrefixPlusModel)
    assert torch.equal(output_of(loaded, input_ids=token_ids()), output_of(model, input_ids=token_ids()))


def test_torch_is_watched_only_until_a_tuner_has_its_place():
    hooks = torch.nn.modules.module._global_module_registration_hooks
    before = dict(hooks)
    get_peft_model(tiny_model(), prefix_config())
    assert hooks == before
    inject_adapter_in_model(prefix_config(), tiny_model())  # by a tuner without a `PeftModel`
    gc.collect()
    assert hooks == before
