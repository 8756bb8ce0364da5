"""The decoupled form, silu(cap(s · Q P_Kᵀ)) P_V beside the base model's attention: against the formula in float64, and the base."""

from __future__ import annotations

import copy

import pytest
import test_inline as inline
import torch
from models import (
    DECOUPLED_CAP,
    adapter_parameters,
    joint_config,
    main_output,
    output_of,
    prefixed,
    tiny_model,
    token_ids,
)
from peft import PeftModel, get_peft_model
from test_equivalence import MODELS, Formula, batch, build, logits
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from peft_prefix_plus import PrefixPlusConfig, prefix_key_values
from peft_prefix_plus.attention import Prefix
from peft_prefix_plus.attention.added import added_attention


class DecoupledFormula(Formula):
    """Attention in float64, and beside it x / (1 + e⁻ˣ) of the scores with a prefix, times its values."""

    def __init__(self):
        super().__init__()
        self.added = {}

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        output, _ = super().__call__(module, query, key, value, attention_mask, scaling)
        if module in self.added:
            prefix_key, prefix_value = (
                states.double().repeat_interleave(query.shape[1] // states.shape[0], dim=0)
                for states in self.added[module]
            )
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            scores = torch.einsum("bhtd,hpd->bhtp", query.double(), prefix_key) * scale
            scores = DECOUPLED_CAP * torch.tanh(scores / DECOUPLED_CAP)
            weights = scores / (1.0 + torch.exp(-scores))
            output = output + torch.einsum("bhtp,hpd->bthd", weights, prefix_value).to(output.dtype)
        return output, None


@pytest.fixture
def formula():
    implementation = DecoupledFormula()
    AttentionInterface.register("decoupled_formula", implementation)
    AttentionMaskInterface.register("decoupled_formula", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    yield implementation
    AttentionInterface._global_mapping.pop("decoupled_formula")
    AttentionMaskInterface._global_mapping.pop("decoupled_formula")


def by_module(reference, model, adapter_name="default"):
    prefixes = prefix_key_values(model, adapter_name)
    return {reference.get_submodule(name): prefix for name, prefix in prefixes.items()}


def decoupled(**fields) -> PrefixPlusConfig:
    return PrefixPlusConfig(
        **{"num_virtual_tokens": 5, "decoupled": True, "init_weights": False, "position_free": False, **fields}
    )


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("reparameterization", ["none", "linear"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_the_formula(formula, name, reparameterization, padding):
    model = build(name)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("decoupled_formula")
    base = logits(reference, batch(padding))
    model = get_peft_model(model, decoupled(reparameterization=reparameterization, layers_to_transform=[0, -1])).eval()
    formula.added = by_module(reference, model)
    assert len(formula.added) == 2
    expected = logits(reference, batch(padding))
    for implementation in ("eager", "sdpa"):
        model.get_base_model().set_attn_implementation(implementation)
        torch.testing.assert_close(logits(model, batch(padding)), expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2  # the prefix has an effect to speak of


def test_beside_a_joint_prefix_it_is_added_to_that_ones_attention(formula):
    model = build("llama, grouped heads")
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("decoupled_formula")
    model = get_peft_model(model, decoupled(), adapter_name="added").eval()
    model.add_adapter("joint", joint_config(num_virtual_tokens=3, position_free=False))
    model.add_adapter("more", decoupled(num_virtual_tokens=2, layers_to_transform=[1]))
    alone = logits(model, batch("left"))
    model.base_model.set_adapter(["added", "joint"])
    formula.added, formula.prefixes = by_module(reference, model, "added"), by_module(reference, model, "joint")
    torch.testing.assert_close(logits(model, batch("left")), logits(reference, batch("left")), rtol=0, atol=1e-5)
    assert (logits(model, batch("left")) - alone).abs().max() > 1e-2

    # two of them: of independent prefixes the sum, which is what one prefix of both is
    model.base_model.set_adapter(["added", "more"])
    formula.prefixes = {}
    for module, (key, value) in by_module(reference, model, "more").items():
        first_key, first_value = formula.added[module]
        formula.added[module] = torch.cat([first_key, key], dim=1), torch.cat([first_value, value], dim=1)
    torch.testing.assert_close(logits(model, batch("left")), logits(reference, batch("left")), rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", inline.MODELS)
def test_modules_that_compute_attention_themselves_follow_the_formula(name, implementation):
    if implementation == "sdpa" and name != "falcon":
        pytest.skip("has eager attention only")
    model = get_peft_model(inline.build(name, implementation), decoupled()).eval()
    attention_name, hidden, output = inline.first_layer_run(name, model, inline.token_ids())
    prefix_key, prefix_value = (states.double() for states in prefix_key_values(model)[attention_name])
    reference = copy.deepcopy(model).unload().double()
    with torch.no_grad():
        attention = reference.get_submodule(attention_name)
        query, *terms, scale, bias = inline.TERMS[name](attention, hidden.double(), reference)
        scores = DECOUPLED_CAP * torch.tanh(scale * query @ prefix_key.transpose(-1, -2) / DECOUPLED_CAP)
        added = (scores / (1.0 + torch.exp(-scores)) @ prefix_value).transpose(1, 2).flatten(-2)
        base = inline.formula(query, scale, prefix_key[:, :0], prefix_value[:, :0], *terms, bias)
    torch.testing.assert_close(output.double(), base + added, rtol=1e-6, atol=1e-5)  # Falcon's are of size 30
    assert added.abs().max() > 1e-2


@pytest.mark.parametrize("reparameterization", ["none", "linear", "mlp"])
@pytest.mark.parametrize(
    ("architecture", "task_type"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_it_starts_as_exactly_the_base_model_and_learns_from_the_first_step(
    architecture, task_type, reparameterization
):
    inputs = {"input_ids": token_ids(), "labels": token_ids(seed=1)}
    base = tiny_model(architecture, task_type)
    expected = output_of(base, **inputs)
    fields = dict(reparameterization=reparameterization, task_type=task_type, init_weights=True)
    model = prefixed(base, decoupled=True, **fields)
    assert torch.equal(output_of(model, **inputs), expected)
    assert all(key.std() > 1e-2 and not value.any() for key, value in prefix_key_values(model).values())

    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-4)
    losses = []  # of the model in evaluation mode: dropout would be noise
    for _ in range(3):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    assert all(value.any() for _, value in prefix_key_values(model).values())


def test_gradients_are_those_of_the_formula(formula):
    model = build("llama, grouped heads").double()
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("decoupled_formula")
    model = get_peft_model(model, decoupled(prefix_scaling=1.0, layers_to_transform=[1]), autocast_adapter_dtype=False)
    encoder = dict(model.base_model.prefix_layers())["model.layers.1.self_attn"].encoder("default")
    key, value = (part.detach().double().requires_grad_() for part in (encoder.key, encoder.value))
    formula.added = {reference.model.layers[1].self_attn: (key, value)}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ids = batch()["input_ids"]
        expected = torch.autograd.grad(reference(input_ids=ids, labels=ids).loss, (key, value))
        for implementation in ("eager", "sdpa"):
            model.get_base_model().set_attn_implementation(implementation)
            found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, (encoder.key, encoder.value))
            for ours, theirs in zip(found, expected, strict=True):
                # the model is in float64 but for its norms and rotations, which are always in float32
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
                assert theirs.abs().max() > 1e-5
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        base = tiny_model()
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model = prefixed(base, decoupled=True, prefix_scaling=1.0).train()
        if checkpointed:
            model.enable_input_require_grads()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        gradients.append([parameter.grad for parameter in adapter_parameters(model).values()])
        torch.manual_seed(0)
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build_model", [tiny_model, lambda: inline.build("bloom")], ids=["llama", "bloom"])
def test_a_cache_gives_what_the_whole_text_gives(build_model):
    model = prefixed(build_model(), decoupled=True)
    ids = token_ids(tokens=9)
    expected = output_of(model, input_ids=ids)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        steps = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split([5, 1, 3], 1)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 9
    generated = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=1)
    for length in range(9, 15):
        assert torch.equal(output_of(model, input_ids=generated[:, :length])[:, -1].argmax(-1), generated[:, length])


@pytest.mark.parametrize("build_model", [tiny_model, lambda: inline.build("gptj")], ids=["llama", "gptj"])
def test_each_row_of_a_batch_has_the_adapter_it_names(build_model):
    base = build_model()
    ids = token_ids(batch=4)
    expected = {"__base__": output_of(base, input_ids=ids)}
    model = prefixed(base, decoupled=True)
    model.add_adapter("longer", decoupled())
    model.add_adapter("joint", joint_config(num_virtual_tokens=4))
    for name in ("default", "longer", "joint"):
        model.set_adapter(name)
        expected[name] = output_of(model, input_ids=ids)
    rows = ["longer", "joint", "__base__", "default"]
    mixed = output_of(model, input_ids=ids, adapter_names=rows)
    for row, name in enumerate(rows):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=0, atol=1e-5)
        assert name == "__base__" or (mixed[row] - expected["__base__"][row]).abs().max() > 1e-2


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_it_is_saved_and_loaded_as_what_it_is(reparameterization, tmp_path):
    model = prefixed(tiny_model(), decoupled=True, reparameterization=reparameterization)
    expected = output_of(model, input_ids=token_ids())
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, **options)
        assert loaded.peft_config["default"].decoupled is True
        assert torch.equal(output_of(loaded, input_ids=token_ids()), expected)
    with loaded.disable_adapter():
        assert torch.equal(output_of(loaded, input_ids=token_ids()), output_of(tiny_model(), input_ids=token_ids()))


def test_it_compiles_to_one_graph():
    model = prefixed(tiny_model(num_hidden_layers=1), decoupled=True)
    expected = main_output(model(input_ids=token_ids(), use_cache=False))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = main_output(compiled(input_ids=token_ids(), use_cache=False))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.sum().backward()
    assert all(parameter.grad.any() for parameter in adapter_parameters(model).values())


def test_in_bfloat16_scores_pass_the_silu_in_float32():
    model = prefixed(tiny_model(dtype=torch.bfloat16), decoupled=True)
    exact = prefixed(tiny_model(), decoupled=True)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    reference = output_of(exact, input_ids=token_ids())
    found = output_of(model, input_ids=token_ids()).float()
    # three layers of bfloat16 (eight bits) over outputs of about 5
    assert (found - reference).abs().mean() < 0.02 * reference.abs().mean() + 0.02


def test_in_float16_scores_beyond_its_range_are_capped():
    key, value = torch.full((1, 3, 64), 200.0), torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1).expand(1, 3, 8)
    query = torch.stack([torch.full((64,), 200.0), torch.full((64,), -200.0)]).view(1, 1, 2, 64)
    assert torch.isinf(query.half() @ key.half().transpose(-1, -2)).all()
    added = added_attention(query.half(), Prefix(key.half(), value.half(), None, None, True, "rotated"), None)
    expected = torch.nn.functional.silu(torch.tensor([DECOUPLED_CAP, -DECOUPLED_CAP])) * 7.0
    # half precision has eleven bits
    torch.testing.assert_close(added[0, :, 0, 0].float(), expected, rtol=2e-3, atol=0.0)
