"""Adapters as PEFT handles them: add, choose, switch off, delete, unload, load, inspect, copy."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from models import (
    SCALING_SIZE,
    adapter_parameters,
    assert_unchanged,
    loss_of,
    output_of,
    prefix_config,
    prefix_layers,
    prefixed,
    state_of,
    task_inputs,
    tiny_model,
    token_ids,
)
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


INPUTS = {"input_ids": token_ids()}

# Adapters that cover different layers of the tiny Llama's three.
LAYERS = {"first": [0, 1], "second": [1, 2], "third": [2]}
ENCODERS = [
    {},
    {"reparameterization": "linear", "sharing": "projection"},
    {"reparameterization": "mlp", "sharing": "all"},
    {"gating": True},
]
EACH_ENCODER = pytest.mark.parametrize("fields", ENCODERS, ids=["direct", "linear", "mlp", "gated"])


def single(name: str, **fields) -> torch.Tensor:
    """The output of a model that has one of `LAYERS`' adapters alone."""
    return output_of(with_adapters(name, **fields), **INPUTS)


def with_adapters(*names: str, **fields) -> PeftModel:
    """A tiny Llama with some of `LAYERS`' adapters; an adapter of one name always has the same parameters."""
    model = None
    for name in names:
        torch.manual_seed(list(LAYERS).index(name))
        config = prefix_config(task_type="CAUSAL_LM", layers_to_transform=LAYERS[name], **fields)
        if model is None:
            model = get_peft_model(tiny_model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


@EACH_ENCODER
def test_an_added_adapter_is_not_active_until_it_is_set(fields):
    model = with_adapters("first", **fields)
    before = output_of(model, **INPUTS)

    model.add_adapter("second", prefix_config(task_type="CAUSAL_LM", layers_to_transform=LAYERS["second"], **fields))

    assert model.active_adapters == ["first"]
    assert torch.equal(output_of(model, **INPUTS), before)
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, "second").values())
    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "first").values())


@EACH_ENCODER
def test_the_adapter_that_is_set_is_the_one_that_works(fields):
    model = with_adapters(*LAYERS, **fields)

    for name in (*LAYERS, "first"):
        model.set_adapter(name)
        assert torch.equal(output_of(model, **INPUTS), single(name, **fields))
        for other in LAYERS:
            trainable = {parameter.requires_grad for parameter in adapter_parameters(model, other).values()}
            assert trainable == {other == name}


def test_an_adapter_set_for_inference_is_frozen():
    model = with_adapters("first", "second")

    model.set_adapter("second", inference_mode=True)

    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_several_active_adapters_are_one_with_their_prefixes_joined(implementation):
    lengths = {"first": 3, "second": 2}
    model = None
    for name, length in lengths.items():
        config = prefix_config(num_virtual_tokens=length, task_type="CAUSAL_LM")
        if model is None:
            model = get_peft_model(tiny_model(implementation=implementation), config, adapter_name=name).eval()
        else:
            model.add_adapter(name, config)
    joined = prefixed(tiny_model(implementation=implementation), num_virtual_tokens=5)
    for layer, target in zip(prefix_layers(model).values(), prefix_layers(joined).values(), strict=True):
        for part in ("key", "value"):
            parts = [getattr(layer.prefix_plus_encoder[name], part) for name in lengths]
            getattr(target.prefix_plus_encoder["default"], part).data.copy_(torch.cat(parts, dim=1))

    model.base_model.set_adapter(["first", "second"])

    assert model.active_adapters == ["first", "second"]
    assert all(parameter.requires_grad for name in lengths for parameter in adapter_parameters(model, name).values())
    together = output_of(model, **INPUTS)
    torch.testing.assert_close(together, output_of(joined, **INPUTS), atol=1e-6, rtol=1e-5)
    model.base_model.set_adapter(["second", "first"])  # attention does not know of an order among keys
    torch.testing.assert_close(output_of(model, **INPUTS), together, atol=1e-5, rtol=1e-5)
    model.set_adapter("first")
    assert (output_of(model, **INPUTS) - together).abs().max() > 1e-2


def test_an_unknown_adapter_cannot_be_set_or_deleted():
    model = with_adapters("first", "second")

    with pytest.raises(ValueError, match=r"no adapter named 'other'.*'first', 'second'"):
        model.base_model.set_adapter(["first", "other"])
    with pytest.raises(ValueError, match=r"no adapter named 'other'.*'first', 'second'"):
        model.base_model.delete_adapter("other")
    with pytest.raises(ValueError, match="other"):
        model.delete_adapter("other")
    assert model.active_adapters == ["first"]


@EACH_ENCODER
@pytest.mark.parametrize("deleted", list(LAYERS))
@pytest.mark.parametrize("active", list(LAYERS))
def test_after_deleting_an_adapter_every_layer_has_the_right_one_active(active, deleted, fields):
    model = with_adapters(*LAYERS, **fields)
    model.set_adapter(active)
    remaining = [name for name in LAYERS if name != deleted]
    expected = active if active != deleted else remaining[0]

    if active == deleted:
        with pytest.warns(UserWarning, match=f"{deleted} was active.*active adapter is now {expected}"):
            model.delete_adapter(deleted)
    else:
        model.delete_adapter(deleted)

    assert list(model.peft_config) == remaining
    assert model.active_adapters == [model.active_adapter] == [expected]
    assert {tuple(layer.active_adapters) for layer in prefix_layers(model).values()} == {(expected,)}
    assert not adapter_parameters(model, deleted)
    assert torch.equal(output_of(model, **INPUTS), single(expected, **fields))
    covered = {layer for name in remaining for layer in LAYERS[name]}
    assert set(prefix_layers(model)) == {f"model.layers.{layer}.self_attn" for layer in covered}


def test_deleting_an_inactive_adapter_does_not_unfreeze_the_active_one():
    model = with_adapters("first", "second")
    model.set_adapter("first", inference_mode=True)

    model.delete_adapter("second")

    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_of_several_active_adapters_the_others_stay_active():
    model = with_adapters(*LAYERS)
    model.base_model.set_adapter(["first", "third"])

    model.delete_adapter("first")

    assert model.active_adapters == ["third"]
    assert torch.equal(output_of(model, **INPUTS), single("third"))


@pytest.mark.parametrize("active", [["a", "b", "c"], ["b", "c"], []], ids=str)
def test_a_model_works_after_one_of_several_adapters_is_deleted(active, tmp_path):
    model = get_peft_model(tiny_model(), prefix_config(task_type="CAUSAL_LM"), adapter_name="a").eval()
    model.add_adapter("b", prefix_config(task_type="CAUSAL_LM"))
    model.add_adapter("c", prefix_config(task_type="CAUSAL_LM", num_virtual_tokens=4, modules_to_save=["lm_head"]))
    model.base_model.set_adapter([name for name in active if name != "a"])
    expected = output_of(model, input_ids=token_ids())
    model.base_model.set_adapter(active)
    model.delete_adapter("a")
    assert model.active_adapters == [name for name in active if name != "a"]
    assert model.active_adapter == "b"
    assert torch.equal(output_of(model, input_ids=token_ids()), expected)
    model.generate(input_ids=token_ids(), max_new_tokens=2, pad_token_id=0)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        output_of(model, input_ids=token_ids())


def test_peft_can_switch_off_the_casting_of_inputs():
    from peft.helpers import disable_input_dtype_casting

    model = prefixed(tiny_model())
    expected = output_of(model, input_ids=token_ids())
    with disable_input_dtype_casting(model):
        assert torch.equal(output_of(model, input_ids=token_ids()), expected)


def test_deleting_the_only_adapter_leaves_the_base_model():
    base = tiny_model()
    before = state_of(base)
    model = prefixed(base)

    model.delete_adapter("default")

    assert model.active_adapters == []
    assert not prefix_layers(model)
    assert list(base.state_dict()) == list(before.tensors)
    assert torch.equal(output_of(base, **INPUTS), output_of(tiny_model(), **INPUTS))


@EACH_ENCODER
def test_the_adapter_methods_of_transformers_work_on_a_bare_model(fields):
    model = tiny_model()
    expected = output_of(model, **INPUTS)
    for name, layers in LAYERS.items():
        torch.manual_seed(list(LAYERS).index(name))
        model.add_adapter(prefix_config(layers_to_transform=layers, **fields), name)
        assert model.active_adapters() == [name]
        assert torch.equal(output_of(model, **INPUTS), single(name, **fields))

    model.set_adapter("first")
    assert torch.equal(output_of(model, **INPUTS), single("first", **fields))
    model.disable_adapters()
    assert torch.equal(output_of(model, **INPUTS), expected)
    model.enable_adapters()
    assert torch.equal(output_of(model, **INPUTS), single("first", **fields))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active"):
        model.delete_adapter("second")
    assert {tuple(layer.active_adapters) for layer in prefix_layers(model).values()} == {("first",)}
    assert torch.equal(output_of(model, **INPUTS), single("first", **fields))
    model.delete_adapter(["third", "first"])
    assert torch.equal(output_of(model, **INPUTS), expected)


@EACH_ENCODER
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_transformers_saves_and_loads_an_adapter_of_a_bare_model(architecture, fields, tmp_path):
    task_type = "SEQ_CLS" if architecture == "bert" else "CAUSAL_LM"
    model = tiny_model(architecture, task_type)
    model.add_adapter(prefix_config(**fields), "trained")
    model.save_pretrained(tmp_path)

    bare = tiny_model(architecture, task_type)
    bare.load_adapter(tmp_path, "loaded")
    wrapped = PeftModel.from_pretrained(tiny_model(architecture, task_type), tmp_path)

    assert torch.equal(output_of(wrapped, **INPUTS), output_of(model, **INPUTS))
    # transformers computes with the tensors as they lie in the file: their alignment changes the order of additions
    torch.testing.assert_close(output_of(bare, **INPUTS), output_of(model, **INPUTS), atol=1e-5, rtol=1e-5)
    state_dict = model.get_adapter_state_dict("trained")
    for name, tensor in bare.get_adapter_state_dict("loaded").items():
        assert torch.equal(tensor, state_dict[name])


@EACH_ENCODER
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_disabled_adapters_are_the_base_model_bit_for_bit(implementation, fields):
    expected = output_of(tiny_model(implementation=implementation), **INPUTS)
    model = prefixed(tiny_model(implementation=implementation), **fields)
    changed = output_of(model, **INPUTS)

    with model.disable_adapter():
        assert torch.equal(output_of(model, **INPUTS), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(output_of(model, **INPUTS), expected)
    model.base_model.enable_adapter_layers()

    assert torch.equal(output_of(model, **INPUTS), changed)
    assert (changed - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("architecture", "task_type"),
    [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")],
)
@EACH_ENCODER
def test_unloading_leaves_no_trace_and_the_model_can_be_wrapped_again(architecture, task_type, fields):
    inputs = task_inputs(task_type)
    base = tiny_model(architecture, task_type)
    before, expected = state_of(base), output_of(base, **inputs)
    model = prefixed(base, task_type=task_type, **fields)
    model.add_adapter("other", prefix_config(task_type=task_type))
    output_of(model, **inputs)

    unloaded = model.unload()

    assert unloaded is base
    assert not hasattr(base, "peft_config")
    assert not any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in base.modules())
    assert not any("prefix" in name for name in base.state_dict())
    base.requires_grad_(True)  # PEFT leaves a model frozen
    assert_unchanged(base, before)
    assert torch.equal(output_of(base, **inputs), expected)
    again = prefixed(base, task_type=task_type, **fields)
    assert (output_of(again, **inputs) - expected).abs().max() > 1e-2
    with again.disable_adapter():
        assert torch.equal(output_of(again, **inputs), expected)


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason_and_what_to_do(method):
    model = prefixed(tiny_model())
    expected = output_of(model, **INPUTS)

    with pytest.raises(ValueError, match=r"cannot be merged.*keys and values.*flatten.*unload"):
        getattr(model, method)()

    assert torch.equal(output_of(model, **INPUTS), expected)


@EACH_ENCODER
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_is_loaded_beside_others(low_cpu_mem_usage, fields, tmp_path):
    source = with_adapters("second", **fields)
    source.save_pretrained(tmp_path)
    model = with_adapters("first", **fields)

    result = model.load_adapter(tmp_path / "second", "loaded", low_cpu_mem_usage=low_cpu_mem_usage)

    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(output_of(model, **INPUTS), single("first", **fields))
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, "loaded").values())
    model.set_adapter("loaded")
    assert torch.equal(output_of(model, **INPUTS), single("second", **fields))


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@EACH_ENCODER
def test_a_loaded_adapter_is_trainable_only_if_asked_for(fields, low_cpu_mem_usage, is_trainable, tmp_path):
    prefixed(tiny_model(), **fields).save_pretrained(tmp_path)

    model = PeftModel.from_pretrained(
        tiny_model(), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )

    assert {parameter.requires_grad for parameter in adapter_parameters(model).values()} == {is_trainable}
    assert not any(parameter.is_meta for parameter in model.parameters())


@EACH_ENCODER
def test_gradients_of_an_adapter_are_switched(fields):
    model = with_adapters("first", "second", **fields)

    model.set_requires_grad("second")
    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "second").values())
    model.set_requires_grad(["first", "second"], requires_grad=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_status_of_layers_and_model():
    model = with_adapters(*LAYERS, reparameterization="linear", gating=True)

    layers = {status.name.removeprefix("model."): status for status in get_layer_status(model)}
    shared = layers.pop("prefix_plus")
    assert shared.module_type == "prefix_plus.SharedParts"
    assert shared.available_adapters == ["first", "second", "third"]
    assert set(layers) == {f"model.layers.{layer}.self_attn.prefix_plus" for layer in range(3)}
    assert layers["model.layers.1.self_attn.prefix_plus"].available_adapters == ["first", "second"]
    assert layers["model.layers.2.self_attn.prefix_plus"].available_adapters == ["second", "third"]
    for status in layers.values():
        assert status.module_type == "prefix_plus.PrefixPlusLayer"
        assert status.enabled
        assert status.active_adapters == ["first"]
        assert status.merged_adapters == []
    status = get_model_status(model)
    assert status.peft_types == dict.fromkeys(LAYERS, "PREFIX_PLUS")
    assert status.num_adapter_layers == 4  # the three, and what they share
    assert status.enabled is True
    assert status.active_adapters == ["first"]
    trained = sum(p.numel() for p in adapter_parameters(model, "first").values())
    assert status.trainable_params == trained + 2 * SCALING_SIZE
    assert status.total_params == sum(p.numel() for p in model.parameters())
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


@EACH_ENCODER
def test_further_modules_are_trained_and_saved_in_full(fields, tmp_path):
    inputs = task_inputs("CAUSAL_LM")
    model = prefixed(tiny_model(), task_type="CAUSAL_LM", modules_to_save=["lm_head"], **fields)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    loss_of(model, **inputs).backward()
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)

    assert torch.equal(output_of(loaded, **inputs), output_of(model, **inputs))
    with loaded.disable_adapter():
        assert torch.equal(output_of(loaded, **inputs), output_of(tiny_model(), **inputs))
    assert type(loaded.unload().lm_head) is torch.nn.Linear


def test_the_head_of_a_classifier_is_trained_and_saved(tmp_path):
    inputs = task_inputs("SEQ_CLS")
    model = prefixed(tiny_model("bert", "SEQ_CLS"), task_type="SEQ_CLS")
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.requires_grad
    with torch.no_grad():
        head.weight.add_(0.1)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_model("bert", "SEQ_CLS"), tmp_path)

    assert torch.equal(output_of(loaded, **inputs), output_of(model, **inputs))


@EACH_ENCODER
def test_injection_gives_what_wrapping_gives(fields):
    torch.manual_seed(1)
    expected = output_of(prefixed(tiny_model(), **fields), **INPUTS)
    model = tiny_model()
    torch.manual_seed(1)

    injected = inject_adapter_in_model(prefix_config(**fields), model)

    assert injected is model
    assert torch.equal(output_of(model, **INPUTS), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("sharing", ["none", "input", "projection", "all"])
@pytest.mark.parametrize("reparameterization", ["none", "linear", "mlp"])
def test_a_state_dict_says_which_modules_to_inject(reparameterization, sharing, low_cpu_mem_usage):
    layers = None if sharing == "all" else [0, 2]  # of layers that share all, the state dict names only one
    fields = {"reparameterization": reparameterization, "sharing": sharing}
    source = inject_adapter_in_model(prefix_config(layers_to_transform=layers, **fields), tiny_model())
    state_dict = get_peft_model_state_dict(source)
    model = tiny_model()

    inject_adapter_in_model(
        prefix_config(**fields), model, "loaded", low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    )
    result = set_peft_model_state_dict(model, state_dict, "loaded", low_cpu_mem_usage=low_cpu_mem_usage)

    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "prefix_plus" in name]
    assert list(prefix_layers(model)) == list(prefix_layers(source))
    assert torch.equal(output_of(model, **INPUTS), output_of(source, **INPUTS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EACH_ENCODER
def test_adapters_of_a_half_precision_model_are_float32_unless_asked_otherwise(fields, dtype):
    wide = get_peft_model(tiny_model(dtype=dtype), prefix_config(**fields))
    narrow = get_peft_model(tiny_model(dtype=dtype), prefix_config(**fields), autocast_adapter_dtype=False)
    wide.add_adapter("other", prefix_config(**fields))
    narrow.add_adapter("other", prefix_config(**fields), autocast_adapter_dtype=False)

    for name in ("default", "other"):
        assert {parameter.dtype for parameter in adapter_parameters(wide, name).values()} == {torch.float32}
        assert {parameter.dtype for parameter in adapter_parameters(narrow, name).values()} == {dtype}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EACH_ENCODER
def test_half_precision_models_run_and_train(fields, dtype, autocast_adapter_dtype, implementation):
    inputs = task_inputs("CAUSAL_LM")
    torch.manual_seed(1)
    reference = output_of(prefixed(tiny_model(implementation=implementation), **fields), **inputs)
    torch.manual_seed(1)
    base = tiny_model(implementation=implementation, dtype=dtype)
    model = get_peft_model(base, prefix_config(**fields), autocast_adapter_dtype=autocast_adapter_dtype)

    output = output_of(model.eval(), **inputs)
    loss_of(model, **inputs).backward()

    assert output.dtype == dtype
    assert (output.float() - reference).abs().mean() < 0.1 * reference.abs().mean()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@EACH_ENCODER
def test_float32_adapters_are_loaded_exactly_into_a_half_precision_model(fields, low_cpu_mem_usage, tmp_path):
    source = prefixed(tiny_model(dtype=torch.bfloat16), **fields)
    with torch.no_grad():
        for parameter in adapter_parameters(source).values():
            parameter.normal_()  # numbers that bfloat16 does not have
    source.save_pretrained(tmp_path)

    model = PeftModel.from_pretrained(tiny_model(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    narrow = PeftModel.from_pretrained(
        tiny_model(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=False
    )

    for name, parameter in adapter_parameters(source).items():
        assert torch.equal(adapter_parameters(model)[name], parameter)
        assert torch.equal(adapter_parameters(narrow)[name], parameter.to(torch.bfloat16))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@EACH_ENCODER
def test_a_copy_gives_the_same_and_shares_nothing(fields, architecture, copied):
    model = prefixed(tiny_model(architecture), **fields)
    expected = output_of(model, **INPUTS)

    clone = copied(model)

    assert torch.equal(output_of(clone, **INPUTS), expected)
    assert {id(module) for module in model.modules()}.isdisjoint({id(module) for module in clone.modules()})
    layers = prefix_layers(clone)
    modules = dict(clone.base_model.model.named_modules())
    assert all(layer.attention is modules[name] for name, layer in layers.items())
    with torch.no_grad():
        for parameter in adapter_parameters(clone).values():
            parameter.add_(1.0)
    assert torch.equal(output_of(model, **INPUTS), expected)
    assert (output_of(clone, **INPUTS) - expected).abs().max() > 1e-3
    clone.set_attn_implementation("eager")  # of the copy's config alone
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(clone.unload(), "peft_config")
    assert torch.equal(output_of(model, **INPUTS), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chosen", [0, 1, 2])
@EACH_ENCODER
def test_a_layer_that_is_not_chosen_computes_what_it_computes_in_the_base_model(fields, chosen, implementation):
    base = tiny_model(implementation=implementation)
    model = prefixed(tiny_model(implementation=implementation), layers_to_transform=chosen, **fields)
    calls = []

    def record(module, arguments, keywords, output):
        calls.append((arguments, keywords, output))

    for layer in model.base_model.model.model.layers:
        layer.register_forward_hook(record, with_kwargs=True)
    output_of(model, **INPUTS, use_cache=False)

    for index, (arguments, keywords, output) in enumerate(calls):
        with torch.no_grad():
            expected = base.model.layers[index](*arguments, **keywords)
        assert torch.equal(output, expected) == (index != chosen), index
    assert len(calls) == 3


@EACH_ENCODER
def test_an_offloaded_model_gets_its_adapter_where_it_computes(fields):
    torch.manual_seed(1)
    expected = output_of(prefixed(tiny_model(), **fields), **INPUTS)
    base = accelerate.cpu_offload(tiny_model(), execution_device="cpu")
    assert all(parameter.is_meta for parameter in base.parameters())
    torch.manual_seed(1)

    model = prefixed(base, **fields)

    assert torch.equal(output_of(model, **INPUTS), expected)


def test_a_long_list_of_target_modules_stays_as_it_was_given(tmp_path):
    names = [f"model.layers.{layer}.self_attn" for layer in range(24)]
    model = prefixed(tiny_model(num_hidden_layers=24), target_modules=names)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_model(num_hidden_layers=24), tmp_path)

    assert model.peft_config["default"].target_modules == loaded.peft_config["default"].target_modules == names
    assert torch.equal(output_of(loaded, **INPUTS), output_of(model, **INPUTS))


@pytest.mark.parametrize("name", ["self_attn", "layers", "0", "prefix_plus", "prefix_plus_encoder", "key", "model"])
def test_a_name_that_peft_would_mix_up_with_a_part_of_the_model_is_refused(name):
    model = with_adapters("first")
    before = state_of(model)

    with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
        model.add_adapter(name, prefix_config(layers_to_transform=[0]))

    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["a", "plus", "k", "adapter_1", "default2", "été"])
def test_any_other_name_will_do(name, tmp_path):
    model = with_adapters("first")
    model.add_adapter(name, prefix_config(reparameterization="mlp", gating=True))
    model.set_adapter(name)

    model.save_pretrained(tmp_path)

    assert torch.equal(
        output_of(PeftModel.from_pretrained(tiny_model(), tmp_path / name), **INPUTS), output_of(model, **INPUTS)
    )
    assert torch.equal(
        output_of(PeftModel.from_pretrained(tiny_model(), tmp_path / "first"), **INPUTS), single("first")
    )


def test_peft_can_stop_casting_inputs():
    model = prefixed(tiny_model())
    expected = output_of(model, input_ids=token_ids())
    with disable_input_dtype_casting(model):
        assert torch.equal(output_of(model, input_ids=token_ids()), expected)
    assert torch.equal(output_of(model, input_ids=token_ids()), expected)
