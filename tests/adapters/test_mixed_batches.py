"""Batches whose rows have adapters of their own, against each row alone."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_prefix_plus import PrefixPlusConfig


VOCABULARY = 64
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
ADAPTERS = {
    "short": dict(num_virtual_tokens=3, layers_to_transform=[0, 1]),
    "long": dict(num_virtual_tokens=7, reparameterization="mlp", encoder_dim=6),
    "gated": dict(num_virtual_tokens=4, gating=True, layers_to_transform=-1),
    "fixed": dict(num_virtual_tokens=5, position_free=False),
}
ROWS = ["long", "__base__", "short", "gated", "fixed", "long"]


def adapted(kind, implementation="sdpa"):
    torch.manual_seed(0)
    if kind == "decoder":
        model, task = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)), "CAUSAL_LM"
    elif kind == "encoder-decoder":
        config = T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
        )
        model, task = T5ForConditionalGeneration(config), "SEQ_2_SEQ_LM"
    else:
        model, task = BertForSequenceClassification(BertConfig(**SIZES)), "SEQ_CLS"
    model.set_attn_implementation(implementation)
    for index, (name, fields) in enumerate(ADAPTERS.items()):
        config = PrefixPlusConfig(task_type=task, init_weights=False, **fields)
        if index == 0:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def inputs(kind):
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (len(ROWS), 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[2, :1] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "encoder-decoder":
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (len(ROWS), 4))
    return batch


def alone(model, name, function):
    """Call a function with one adapter active, or none."""
    if name == "__base__":
        with model.disable_adapter():
            return function()
    model.set_adapter(name)
    return function()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder", "classifier"])
@torch.no_grad()
def test_each_row_is_what_it_is_alone(kind, implementation):
    model, batch = adapted(kind, implementation), inputs(kind)
    mixed = model(**batch, adapter_names=ROWS).logits
    for row, name in enumerate(ROWS):
        part = {key: tensor[row : row + 1] for key, tensor in batch.items()}
        expected = alone(model, name, lambda part=part: model(**part).logits)
        real = slice(None) if kind != "decoder" else batch["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[row][real], expected[0][real], rtol=0, atol=1e-5)
    assert torch.equal(model(**batch).logits, alone(model, "long", lambda: model(**batch).logits)), "no trace is left"


GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("case", GENERATIONS)
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_each_row_generates_what_it_generates_alone(kind, case):
    model, batch = adapted(kind), inputs(kind)
    batch.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **GENERATIONS[case])
    mixed = model.generate(**batch, adapter_names=ROWS, **options).view(len(ROWS), -1)
    for row, name in enumerate(ROWS):
        part = {key: tensor[row : row + 1] for key, tensor in batch.items()}
        expected = alone(model, name, lambda part=part: model.generate(**part, **options))
        assert torch.equal(mixed[row], expected.flatten())


def test_a_base_row_is_bit_equal_to_a_batch_of_base_rows():
    model, batch = adapted("decoder"), inputs("decoder")
    with torch.no_grad():
        base = alone(model, "__base__", lambda: model(**batch).logits)
        mixed = model(**batch, adapter_names=["__base__"] * len(ROWS)).logits
    assert torch.equal(mixed, base)


def test_saved_modules_follow_the_rows():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES))
    for name in ("first", "second"):
        config = PrefixPlusConfig(task_type="SEQ_CLS", num_virtual_tokens=3, init_weights=False)
        if name == "first":
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.eval()
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["second"].weight.add_(1.0)
        batch = {key: tensor[:2] for key, tensor in inputs("classifier").items()}
        mixed = model(**batch, adapter_names=["first", "second"]).logits
        for row, name in enumerate(("first", "second")):
            part = {key: tensor[row : row + 1] for key, tensor in batch.items()}
            torch.testing.assert_close(mixed[row], alone(model, name, lambda part=part: model(**part).logits)[0])


def test_a_row_whose_adapter_saves_no_module_has_the_base_models():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    config = dict(task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights=False)
    model = get_peft_model(model, PrefixPlusConfig(**config, modules_to_save=["lm_head"]), adapter_name="saving")
    model.add_adapter("plain", PrefixPlusConfig(**config))
    model.eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["saving"].weight.add_(1.0)
        batch = {key: tensor[:3] for key, tensor in inputs("decoder").items()}
        rows = ["saving", "plain", "__base__"]
        mixed = model(**batch, adapter_names=rows).logits
        for row, name in enumerate(rows):
            part = {key: tensor[row : row + 1] for key, tensor in batch.items()}
            expected = alone(model, name, lambda part=part: model(**part).logits)[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(mixed[row][real], expected[real], rtol=0, atol=1e-4)
    bare = model.unload()
    assert not any(module._forward_pre_hooks for module in bare.modules())


def test_continuous_batching_refuses_adapters_of_rows():
    model = adapted("decoder")
    with pytest.raises(ValueError, match=r"`generate_batch` got `adapter_names` = \['long', 'short'\]"):
        model.generate_batch([[3, 4], [5, 6]], adapter_names=["long", "short"])


def test_rows_are_named_to_a_compiled_model():
    model, batch = adapted("decoder"), inputs("decoder")
    torch.compiler.reset()
    base = model.get_base_model()
    with torch.no_grad():
        others = [list(reversed(ROWS)), None, ROWS]
        expected = [model(**batch, adapter_names=rows).logits for rows in others]
        base.forward = torch.compile(base.forward, backend="eager", fullgraph=True)
        for rows, logits in zip(others, expected, strict=True):
            torch.testing.assert_close(model(**batch, adapter_names=rows).logits, logits, rtol=0, atol=1e-5)


def test_wrong_names_are_errors_that_leave_no_trace():
    model, batch = adapted("decoder"), inputs("decoder")
    with torch.no_grad():
        expected = model(**batch).logits
        with pytest.raises(ValueError, match=r"'other'; the adapters are \['fixed', 'gated', 'long', 'short'\]"):
            model(**batch, adapter_names=["other", *ROWS[1:]])
        with pytest.raises(ValueError, match="has 4 names, but the batch has 6 rows"):
            model(**batch, adapter_names=ROWS[:4])
        assert torch.equal(model(**batch).logits, expected)
    model.train()
    with pytest.raises(ValueError, match="in training"):
        model(**batch, adapter_names=ROWS)


FORMS = {
    "decoupled": {},
    "decoupled, fixed": dict(position_free=False),
    "gated": dict(gating=True),
    "joint": dict(decoupled=False),
    "joint, fixed": dict(decoupled=False, position_free=False),
}
FORM_ROWS = ["short", "long", "long", "short", "other"]


def of_one_form(form, implementation="sdpa"):
    """A model in float64 with adapters of two lengths and one form."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).double()
    model.set_attn_implementation(implementation)
    for name, length in (("short", 2), ("long", 5), ("other", 5)):
        config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, init_weights=False, **FORMS[form])
        if name == "short":
            model = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config)
    return model.double().eval()


def gradients(model, names):
    """The gradients of the adapters' parameters, which are then cleared."""
    found = {}
    for name, parameter in model.named_parameters():
        if any(f".{adapter}." in f"{name}." for adapter in names) and parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_sums_over_the_rows_of_each_adapter(form, implementation):
    model, names = of_one_form(form, implementation), sorted(set(FORM_ROWS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prefix_plus_" in name and "scaling" not in name)
    ids = torch.randint(3, VOCABULARY, (len(FORM_ROWS), 6))
    weights = torch.randn(len(FORM_ROWS), 6, VOCABULARY, dtype=torch.float64)
    (model(input_ids=ids, adapter_names=FORM_ROWS).logits * weights).sum().backward()
    mixed = gradients(model, names)
    for row, name in enumerate(FORM_ROWS):
        model.set_adapter(name)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("prefix_plus_" in key and "scaling" not in key)
        (model(input_ids=ids[row : row + 1]).logits * weights[row]).sum().backward()
    expected = gradients(model, names)
    assert mixed.keys() == expected.keys() and len(mixed) >= 3 * 2 * len(names)
    for key, gradient in mixed.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-9)  # float64, sums in another order


@pytest.mark.parametrize("form", FORMS)
def test_a_row_reads_no_more_keys_than_the_longest_adapter_has(form, monkeypatch):
    from peft_prefix_plus.layer import PrefixPlusLayer

    shapes, forward = [], PrefixPlusLayer.forward

    def noted(layer, key, value):
        joint, added = forward(layer, key, value)
        shapes.extend(prefix.key.shape for prefix in (joint, *added) if prefix is not None)
        return joint, added

    monkeypatch.setattr(PrefixPlusLayer, "forward", noted)
    model = of_one_form(form)
    ids = torch.randint(3, VOCABULARY, (len(FORM_ROWS), 6))
    model.generate(input_ids=ids, adapter_names=FORM_ROWS, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert set(shapes) == {(len(FORM_ROWS), 2, 5, 8)}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_rows_of_one_form_are_what_they_are_alone(form):
    model = of_one_form(form)
    rows = ["__base__", *FORM_ROWS]
    ids = torch.randint(3, VOCABULARY, (len(rows), 6))
    mixed = model(input_ids=ids, adapter_names=rows).logits
    for row, name in enumerate(rows):
        expected = alone(model, name, lambda row=row: model(input_ids=ids[row : row + 1]).logits)
        torch.testing.assert_close(mixed[row], expected[0], rtol=0, atol=1e-6)  # norms and angles are in float32
