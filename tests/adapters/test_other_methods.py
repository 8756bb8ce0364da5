"""LoRA and PREFIX_PLUS on one model, in both orders: trained, saved, switched off and unloaded together and apart."""

from __future__ import annotations

import pytest
import torch
from models import (
    assert_unchanged,
    cached_prefix,
    loss_of,
    output_of,
    prefix_config,
    prefix_layers,
    state_of,
    task_inputs,
    tiny_model,
)
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.functional import set_adapter
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch.func import functional_call

from peft_prefix_plus import prefix_key_values


pytestmark = [
    # what PEFT says of every second method
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter name '.*' should not be contained in the prefix"),
]

INPUTS = task_inputs("CAUSAL_LM")
ORDERS = [("lora", "prefix"), ("prefix", "lora")]
EACH_ORDER = pytest.mark.parametrize("order", ORDERS, ids=["LoRA first", "prefix first"])
EACH_PREFIX = pytest.mark.parametrize(
    "fields", [{}, {"reparameterization": "mlp", "sharing": "all"}, {"gating": True}], ids=["direct", "mlp", "gated"]
)


def config_of(name, **fields):
    if name == "prefix":
        # what is measured depends on the other method, and fixed positions are those of a cache
        return prefix_config(**{"prefix_scaling": 1.0, "position_free": False, **fields})
    return LoraConfig(
        **{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **fields}
    )


def wrapped(model, order, lora=None, prefix=None):
    """A model wrapped once for each method, in this order; the wrappers by the adapters' names."""
    fields = {"lora": lora or {}, "prefix": prefix or {}}
    wrappers = {}
    for name in order:
        torch.manual_seed(len(name))
        wrappers[name] = get_peft_model(model, config_of(name, **fields[name]), adapter_name=name).eval()
        if name == "prefix":
            with torch.no_grad():
                for parameter in parameters_of(model, "prefix").values():
                    parameter.normal_()
    return wrappers


def injected(model, order):
    for name in order:
        inject_adapter_in_model(config_of(name), model, name)
    return model


def added_by_transformers(model, order):
    for name in order:
        model.add_adapter(config_of(name), name)
    model.set_adapter(["lora", "prefix"])  # or else only the one added last is active
    return model


def wrapped_over_injected(model, order):
    inject_adapter_in_model(config_of(order[0]), model, order[0])
    return get_peft_model(model, config_of(order[1]), adapter_name=order[1]).eval()


WAYS = {
    "wrapped": lambda model, order: wrapped(model, order)[order[1]],
    "wrapped over injected": wrapped_over_injected,
    "injected": injected,
    "added by transformers": added_by_transformers,
}


def trainable_of(model):
    """The parameters that training changes: a prefix's scaling requires a gradient, but that is zero."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "prefix_plus_scaling" not in name
    }


def parameters_of(model, kind):
    """The parameters that a method trains."""
    marker = {"lora": ".lora_", "prefix": "prefix_plus."}[kind]
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if marker in name and "prefix_plus_scaling" not in name
    }


def gradients_of_the_definition(model):
    """
    Gradients by the definitions of both methods, on the plain model: W + α/r · B A in the place of W, and the prefix as
    keys and values that are in the cache beforehand.
    """
    base = tiny_model(dtype=torch.float64)
    weights, leaves = dict(base.named_parameters()), {}
    for name, parameter in {**parameters_of(model, "lora"), **parameters_of(model, "prefix")}.items():
        leaves[name] = parameter.detach().clone().requires_grad_()
    for name in [name for name in leaves if ".lora_A." in name]:
        target = name.partition(".lora_A.")[0].removeprefix("base_model.model.") + ".weight"
        weights[target] = weights[target] + 2.0 * leaves[name.replace("lora_A", "lora_B")] @ leaves[name]
    past = cached_prefix(base, leaves, *INPUTS["input_ids"].shape)
    loss = functional_call(base, weights, kwargs={**INPUTS, **past}).loss
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@EACH_ORDER
@pytest.mark.parametrize("way", WAYS)
def test_both_train_together_by_the_gradients_of_their_definitions(way, order):
    model = WAYS[way](tiny_model(dtype=torch.float64), order)
    trainable = trainable_of(model)
    assert trainable.keys() == {**parameters_of(model, "lora"), **parameters_of(model, "prefix")}.keys()

    loss_of(model, **INPUTS).backward()

    for name, expected in gradients_of_the_definition(model).items():
        assert expected.abs().max() > 0, name
        # float64; the reference rounds as one product of W + B A, and as one softmax
        torch.testing.assert_close(trainable[name].grad, expected, rtol=1e-9, atol=1e-12, msg=name)


@EACH_ORDER
@EACH_PREFIX
@pytest.mark.parametrize("trained", ["lora", "prefix"])
def test_one_trains_over_the_other_that_stays_as_it_is(trained, fields, order):
    models = wrapped(tiny_model(), order, prefix=fields)
    frozen = "lora" if trained == "prefix" else "prefix"
    models[frozen].set_requires_grad(frozen, requires_grad=False)
    model = models[trained]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    loss_of(model, **INPUTS).backward()
    torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1).step()

    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(parameters_of(model, trained))


@EACH_ORDER
@EACH_PREFIX
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_both_are_saved_and_loaded_apart(low_cpu_mem_usage, fields, order, tmp_path):
    models = wrapped(tiny_model(), order, prefix=fields)
    expected = output_of(models["prefix"], **INPUTS)
    for name, model in models.items():
        model.save_pretrained(tmp_path, selected_adapters=[name])
    saved = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in models}
    assert saved["lora"] and all(".lora_" in key for key in saved["lora"])
    assert saved["prefix"] and all(".prefix_plus." in key for key in saved["prefix"])
    for name, model in models.items():
        assert get_peft_model_state_dict(model, adapter_name=name).keys() == saved[name].keys()

    for loading_order in ORDERS:
        base = tiny_model()
        for name in loading_order:
            model = PeftModel.from_pretrained(
                base, tmp_path / name, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
            )
        assert torch.equal(output_of(model, **INPUTS), expected)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    bare = tiny_model()
    for name in models:
        bare.load_adapter(tmp_path / name, name)
    bare.set_adapter(list(models))
    # transformers computes with the tensors as they lie in the file: their alignment changes the order of additions
    torch.testing.assert_close(output_of(bare, **INPUTS), expected, rtol=1e-5, atol=1e-5)


@EACH_ORDER
@pytest.mark.parametrize("is_trainable", [("lora",), ("prefix",), ("lora", "prefix")])
def test_loaded_adapters_are_trainable_only_if_asked_for(is_trainable, order, tmp_path):
    models = wrapped(tiny_model(), order)
    models["prefix"].save_pretrained(tmp_path)
    base = tiny_model()
    for name in order:
        model = PeftModel.from_pretrained(base, tmp_path / name, adapter_name=name, is_trainable=name in is_trainable)

    assert set(trainable_of(model)) == {name for kind in is_trainable for name in parameters_of(model, kind)}


@EACH_ORDER
def test_each_is_switched_off_apart(order):
    models = wrapped(tiny_model(), order)
    model, both = models["prefix"], output_of(models["prefix"], **INPUTS)
    alone = {name: output_of(wrapped(tiny_model(), [name])[name], **INPUTS) for name in order}

    model.base_model.set_adapter([])
    assert torch.equal(output_of(model, **INPUTS), alone["lora"])
    assert all(parameter.requires_grad for parameter in parameters_of(model, "lora").values())
    assert not any(parameter.requires_grad for parameter in parameters_of(model, "prefix").values())
    model.set_adapter("prefix")
    assert torch.equal(output_of(model, **INPUTS), both)

    set_adapter(model.get_base_model(), [], layer_cls=LoraLayer)
    assert torch.equal(output_of(model, **INPUTS), alone["prefix"])
    models["lora"].set_adapter("lora")
    assert torch.equal(output_of(model, **INPUTS), both)

    for name in order:  # PEFT's disable_adapter is of all methods
        with models[name].disable_adapter():
            assert torch.equal(output_of(model, **INPUTS), output_of(tiny_model(), **INPUTS))
        assert torch.equal(output_of(model, **INPUTS), both)


@EACH_ORDER
def test_both_generate_as_without_a_cache(order):
    fields = {"task_type": "CAUSAL_LM"}
    models = wrapped(tiny_model(), order, lora=fields, prefix=fields)
    options = {"input_ids": INPUTS["input_ids"], "max_new_tokens": 6, "do_sample": False}
    expected = models["prefix"].generate(use_cache=False, **options)

    for model in models.values():
        assert torch.equal(model.generate(**options), expected)
    models["prefix"].base_model.set_adapter([])
    assert not torch.equal(models["prefix"].generate(**options), expected)


@EACH_ORDER
def test_unloading_the_prefix_leaves_lora(order):
    models = wrapped(tiny_model(), order)
    before = {name: parameter.clone() for name, parameter in parameters_of(models["lora"], "lora").items()}

    base = models["prefix"].unload()

    assert base is models["lora"].get_base_model()
    assert not prefix_layers(base)
    assert list(models["lora"].peft_config) == list(base.peft_config) == ["lora"]
    for name, parameter in parameters_of(models["lora"], "lora").items():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad
    assert torch.equal(
        output_of(models["lora"], **INPUTS), output_of(wrapped(tiny_model(), ["lora"])["lora"], **INPUTS)
    )


@EACH_ORDER
@pytest.mark.parametrize("method", ["unload", "merge_and_unload"])
def test_unloading_or_merging_lora_leaves_the_prefix(method, order, tmp_path):
    models = wrapped(tiny_model(), order)
    model, both = models["prefix"], output_of(models["prefix"], **INPUTS)
    alone = output_of(wrapped(tiny_model(), ["prefix"])["prefix"], **INPUTS)

    getattr(models["lora"], method)()

    assert not parameters_of(model, "lora")
    # W + B A rounds otherwise than two products
    torch.testing.assert_close(
        output_of(model, **INPUTS), both if method == "merge_and_unload" else alone, rtol=1e-5, atol=2e-5
    )
    model.save_pretrained(tmp_path, selected_adapters=["prefix"])
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "prefix")
    assert torch.equal(output_of(loaded, **INPUTS), alone)
    assert not prefix_layers(model.unload())


@EACH_ORDER
def test_deleting_the_prefix_leaves_lora(order):
    models = wrapped(tiny_model(), order)

    models["prefix"].delete_adapter("prefix")

    assert models["prefix"].active_adapters == []
    assert list(models["lora"].peft_config) == models["lora"].active_adapters == ["lora"]
    assert not prefix_layers(models["lora"])
    assert torch.equal(
        output_of(models["lora"], **INPUTS), output_of(wrapped(tiny_model(), ["lora"])["lora"], **INPUTS)
    )


@EACH_ORDER
def test_the_prefix_does_not_touch_an_adapter_of_another_method(order):
    model = wrapped(tiny_model(), order)["prefix"]
    before = state_of(model)

    with pytest.raises(ValueError, match=r"'lora' is one of LORA.*\['prefix'\]"):
        model.set_adapter("lora")
    with pytest.raises(ValueError, match=r"'lora' is one of LORA.*\['prefix'\]"):
        model.base_model.set_adapter(["prefix", "lora"])
    with pytest.raises(ValueError, match=r"'lora' is one of LORA.*\['prefix'\]"):
        model.delete_adapter("lora")
    with pytest.raises(ValueError, match=r"`adapter_names` has 'lora'.*\['prefix'\]"):
        model(**INPUTS, adapter_names=["prefix", "lora"])

    assert_unchanged(model, before)


def test_rows_have_prefixes_of_their_own_over_lora():
    model = wrapped(tiny_model(), ["lora", "prefix"])["prefix"]
    lora = output_of(wrapped(tiny_model(), ["lora"])["lora"], **INPUTS)

    mixed = output_of(model, **INPUTS, adapter_names=["prefix", "__base__"])

    torch.testing.assert_close(mixed[0], output_of(model, **INPUTS)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], lora[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["wrapped", "wrapped over injected", "injected", "added by transformers"])
def test_a_name_that_another_methods_adapter_has_is_refused(way):
    model = tiny_model()
    if way == "wrapped":
        model = get_peft_model(model, config_of("lora"), adapter_name="mine").get_base_model()
    elif way == "added by transformers":
        model.add_adapter(config_of("lora"), "mine")
    else:
        inject_adapter_in_model(config_of("lora"), model, "mine")
    before = state_of(model)

    with pytest.raises(ValueError, match=r"named 'mine' already, of LORA\..*name of its own"):
        if way == "added by transformers":
            inject_adapter_in_model(config_of("prefix"), model, "mine")
        else:
            get_peft_model(model, config_of("prefix"), adapter_name="mine")

    assert_unchanged(model, before)


def test_a_failure_leaves_the_lora_that_was_there():
    models = wrapped(tiny_model(), ["lora"])
    models["lora"].set_requires_grad("lora", requires_grad=False)
    before = state_of(models["lora"])

    with pytest.raises(ValueError, match="layer 7"):
        get_peft_model(models["lora"].get_base_model(), config_of("prefix", layers_to_transform=7), "prefix")

    assert_unchanged(models["lora"], before)


def test_lora_on_all_linear_modules_leaves_the_encoders_out():
    models = wrapped(
        tiny_model(), ["prefix", "lora"], prefix={"reparameterization": "mlp"}, lora={"target_modules": "all-linear"}
    )

    assert not [name for name in parameters_of(models["lora"], "lora") if "prefix_plus" in name]
    assert models["lora"].peft_config["lora"].target_modules == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_prefix_functions_find_the_prefix_beside_lora():
    models = wrapped(tiny_model(), ["lora", "prefix"])

    found = [prefix_key_values(model, "prefix") for model in models.values()]

    assert len(found[0]) == 3
    for name, (key, value) in found[0].items():
        assert torch.equal(key, found[1][name][0]) and torch.equal(value, found[1][name][1])


# ------------------------------------------------------------------------------------------------ modules to save


def classifier(order, **heads):
    """BERT with both methods; `heads` names those that have the classifier in `modules_to_save`."""
    fields = {name: {"modules_to_save": ["classifier"]} for name, has_head in heads.items() if has_head}
    fields.setdefault("lora", {})["target_modules"] = ["query", "value"]
    return wrapped(tiny_model("bert", "SEQ_CLS"), order, **fields)


def head_of(model):
    return model.base_model.model.classifier


def test_loras_head_stays_in_use_under_a_prefix_without_one():
    models = classifier(["lora", "prefix"], lora=True)
    copy = head_of(models["lora"]).modules_to_save["lora"]

    def check():
        assert head_of(models["prefix"]).active_adapters == ["lora"]
        assert copy.weight.requires_grad and copy.bias.requires_grad

    check()
    for names in ([], ["prefix"]):
        models["prefix"].base_model.set_adapter(names)
        check()
    models["prefix"].add_adapter("other", prefix_config())
    check()
    models["prefix"].delete_adapter("other")
    check()
    loss_of(models["prefix"], **task_inputs("SEQ_CLS")).backward()
    assert copy.weight.grad.abs().max() > 0
    models["prefix"].unload()
    check()


def test_a_prefix_with_a_head_uses_it_and_gives_the_place_back():
    models = classifier(["lora", "prefix"], lora=True, prefix=True)
    head = head_of(models["prefix"])
    with torch.no_grad():
        head.modules_to_save["lora"].weight.add_(0.1)

    assert head.active_adapters == ["prefix"]
    assert head.modules_to_save["prefix"].weight.requires_grad
    loss_of(models["prefix"], **task_inputs("SEQ_CLS")).backward()
    assert head.modules_to_save["prefix"].weight.grad.abs().max() > 0
    assert head.modules_to_save["lora"].weight.grad is None

    models["prefix"].unload()
    assert head_of(models["lora"]) is head
    assert head.active_adapters == list(head.modules_to_save) == ["lora"]
    assert head.modules_to_save["lora"].weight.requires_grad


def test_a_head_of_the_prefix_alone_is_taken_away_with_it():
    models = classifier(["lora", "prefix"], prefix=True)
    original = head_of(models["prefix"]).original_module

    models["prefix"].unload()

    assert head_of(models["lora"]) is original
    assert not any(isinstance(module, ModulesToSaveWrapper) for module in models["lora"].modules())


def test_an_empty_list_switches_the_prefix_and_its_head_off():
    model = wrapped(tiny_model("bert", "SEQ_CLS"), ["prefix"], prefix={"task_type": "SEQ_CLS"})["prefix"]
    inputs = task_inputs("SEQ_CLS")
    with torch.no_grad():
        head_of(model).modules_to_save["prefix"].weight.add_(0.1)

    model.base_model.set_adapter([])

    assert model.active_adapters == []
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(output_of(model, **inputs), output_of(tiny_model("bert", "SEQ_CLS"), **inputs))
