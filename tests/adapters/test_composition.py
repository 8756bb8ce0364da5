"""Adapters made of several: against all of them active at once, and against sums written out."""

from __future__ import annotations

import pytest
import torch
from models import output_of, prefix_config, prefix_layers, tiny_model, token_ids, unchanged
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner

from peft_prefix_plus import compose, prefix_key_values


def with_adapters(first: dict | None = None, second: dict | None = None, architecture: str = "llama") -> PeftModel:
    """A model with adapters "a" and "b", of 3 and 5 virtual tokens if nothing is said."""
    torch.manual_seed(0)
    fields = {"num_virtual_tokens": 3, **(first or {})}
    model = get_peft_model(tiny_model(architecture), prefix_config(**fields), adapter_name="a").eval()
    model.add_adapter("b", prefix_config(**{"num_virtual_tokens": 5, **(second or {})}))
    return model


def output_with(model: PeftModel, adapters: str | list[str]) -> torch.Tensor:
    model.base_model.set_adapter(adapters)
    return output_of(model, input_ids=token_ids())


FORMS = [
    ({}, {}),
    ({"position_free": False}, {"position_free": False}),
    ({"reparameterization": "linear", "sharing": "all"}, {"reparameterization": "mlp", "prefix_scaling": 0.3}),
    ({"layers_to_transform": [0, 2]}, {"layers_to_transform": [0, 2]}),
    ({"decoupled": True}, {"decoupled": True}),
]


@pytest.mark.parametrize(("first", "second"), FORMS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_composition_gives_what_all_of_its_adapters_give_together(first, second, architecture):
    model = with_adapters(first, second, architecture)
    expected = output_with(model, ["a", "b"])
    compose(model, ["a", "b"], new="ab")
    assert model.peft_config["ab"].num_virtual_tokens == 8
    found = output_with(model, "ab")
    if first.get("decoupled"):  # the sum over all keys at once rounds otherwise than two sums
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    assert (found - output_with(model, "a")).abs().max() > 1e-3


def test_the_order_is_that_of_the_names_and_an_adapter_may_come_twice():
    model = with_adapters()
    compose(model, ["b", "a", "b"], new="bab")
    for name, (key, value) in prefix_key_values(model, "bab").items():
        a, b = prefix_key_values(model, "a")[name], prefix_key_values(model, "b")[name]
        assert torch.equal(key, torch.cat([b[0], a[0], b[0]], dim=1))
        assert torch.equal(value, torch.cat([b[1], a[1], b[1]], dim=1))


def test_a_composition_is_saved_as_one_file_and_loads_alone(tmp_path):
    model = with_adapters(second={"reparameterization": "mlp"})
    compose(model, ["a", "b"], new="ab")
    expected = output_with(model, "ab")
    model.save_pretrained(tmp_path, selected_adapters=["ab"])
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "ab").eval()
    assert torch.equal(output_of(loaded, input_ids=token_ids()), expected)


def test_the_others_stay_and_stay_active():
    model = with_adapters()
    before = {name: prefix_key_values(model, name) for name in ("a", "b")}
    output = output_with(model, "b")
    compose(model, ["a", "b"], new="ab")
    assert model.base_model.active_adapters == ["b"]
    assert torch.equal(output_of(model, input_ids=token_ids()), output)
    for adapter, prefixes in before.items():
        for name, pair in prefix_key_values(model, adapter).items():
            assert all(torch.equal(*both) for both in zip(pair, prefixes[name], strict=True))


def test_a_composition_can_be_trained_on_and_composed_again():
    model = with_adapters()
    compose(model, ["a", "b"], new="ab")
    compose(model.base_model, ["ab", "a"], new="aba")
    model.set_adapter("aba")
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    gradients = [
        parameter.grad for name, parameter in model.named_parameters() if ".aba." in name and parameter.requires_grad
    ]
    assert gradients and all(gradient is not None for gradient in gradients)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".ab." in name)


@pytest.mark.parametrize("fields", [{}, {"gating": True}, {"decoupled": True}])
def test_a_linear_combination_is_the_sum_of_weighted_keys_values_and_gates(fields):
    model = with_adapters({"num_virtual_tokens": 5, **fields}, fields)
    model.base_model.add_weighted_adapter(["a", "b"], [0.25, 1.5], "mean", combination_type="linear")
    for name, pair in prefix_key_values(model, "mean").items():
        a, b = prefix_key_values(model, "a")[name], prefix_key_values(model, "b")[name]
        for ours, first, second in zip(pair, a, b, strict=True):
            torch.testing.assert_close(ours, 0.25 * first + 1.5 * second, rtol=1e-6, atol=1e-7)
    for layer in prefix_layers(model).values():
        assert ("mean" in layer.prefix_plus_gate) == bool(fields.get("gating"))
        if "mean" in layer.prefix_plus_gate:
            gates = [layer.prefix_plus_gate[name].detach() for name in ("a", "b", "mean")]
            torch.testing.assert_close(gates[2], 0.25 * gates[0] + 1.5 * gates[1])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"decoupled": True}, "'a' has decoupled=False and 'b' has decoupled=True"),
        ({"position_free": False}, {}, "'a' has position_free=False and 'b' has position_free=True"),
        ({"gating": True}, {"gating": True}, "a softmax and gates of their own each"),
        (
            {},
            {"layers_to_transform": [0]},
            r"only one has a prefix in model.layers.1.self_attn, model.layers.2.self_attn",
        ),
        ({}, {"modules_to_save": ["lm_head"]}, r"'b' has modules of its own that are saved in full \(lm_head\)"),
    ],
)
def test_adapters_of_several_forms_are_refused_and_the_model_left_as_it_was(first, second, message):
    model = with_adapters(first, second)
    with unchanged(model), pytest.raises(ValueError, match=message):
        compose(model, ["a", "b"], new="ab")


def test_arguments_that_cannot_be_are_refused():
    model = with_adapters()
    add = model.base_model.add_weighted_adapter
    with unchanged(model):
        for arguments, message in [
            ((["a", "c"], [1.0, 1.0], "ab"), "There is no adapter named 'c'"),
            ((["a", "b"], [1.0, 1.0], "b"), "There is an adapter named 'b' already"),
            ((["a", "b"], [1.0], "ab"), "one entry for each adapter, got 2 and 1"),
            (([], [], "ab"), "one entry for each adapter, got 0 and 0"),
            ((["a", "b"], [1.0, 0.5], "ab"), "all `weights` must be 1"),
            ((["a", "b"], [1.0, float("nan")], "ab", "linear"), "finite numbers"),
            ((["a", "b"], [1.0, 1.0], "ab", "svd"), r"one of \('cat', 'linear'\), got 'svd'"),
            ((["a", "b"], [0.5, 0.5], "ab", "linear"), "num_virtual_tokens = 3, 5"),
        ]:
            with pytest.raises(ValueError, match=message):
                add(*arguments)
        with pytest.raises(ValueError, match="at least two names"):
            compose(model, ["a"], new="ab")
    with pytest.raises(TypeError, match="must be a PeftModel with PREFIX_PLUS adapters, got LlamaForCausalLM"):
        compose(tiny_model(), ["a", "b"], new="ab")
    with pytest.raises(TypeError, match="PREFIX_PLUS adapters"):
        compose(get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")), ["a", "b"], new="ab")


@pytest.mark.parametrize("failing", ["inject_adapter", "fit"])
def test_an_interrupt_leaves_the_model_as_it_was(failing, monkeypatch):
    model = with_adapters()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if failing == "fit":
        monkeypatch.setattr("peft_prefix_plus.model.fit", interrupt)
    else:
        monkeypatch.setattr(BaseTuner, "inject_adapter", interrupt)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        compose(model, ["a", "b"], new="ab")
    assert set(model.peft_config) == {"a", "b"}
