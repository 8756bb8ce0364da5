"""Position-free prefixes, which meet queries as they are before RoPE: against the formula in float64, and positions moved."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from models import DECOUPLED_CAP, GATE_SCALE, joint_config, output_of, prefix_layers, prefixed, tiny_model, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from test_attention import (
    BATCH,
    DIM,
    HEADS,
    KV_HEADS,
    LENGTH,
    Attention,
    additive,
    assert_gradients,
    causal,
    flash,
    padded,
    padding_mask,
    tensors,
    way,
    window,
)
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_prefix_plus import (
    initialize_from_text,
    prefix_attention_mass,
    prefix_key_values,
    to_prefix_tuning,
)
from peft_prefix_plus.attention import Prefix, concatenated, find_rotation
from peft_prefix_plus.attention.planes import factors_of_dims, turn_back
from peft_prefix_plus.attention.rotary import QueryRotation


__all__ = ["flash", "way"]  # fixtures

# ------------------------------------------------------------------------------------------------- the attention function


def scores_of(query, key):
    """Q Kᵀ, (batch, heads, tokens, kv_tokens), in float64."""
    return query.double() @ key.double().repeat_interleave(HEADS // key.shape[-3], dim=-3).transpose(-1, -2)


def free_formula(query, unrotated, key, value, prefixes, scale, visible):
    """softmax(s · [Q̃ P_Kᵀ, Q Kᵀ]) [P_V ; V], Q̃ being the unrotated queries where a prefix reads those."""
    scores = [scores_of(unrotated if prefix.reads == "unrotated" else query, prefix.key) for prefix in prefixes]
    scores.append(scores_of(query, key).masked_fill(~visible[:, None], -torch.inf))
    values = [prefix.value.double().expand(len(value), -1, -1, -1) for prefix in prefixes] + [value.double()]
    weights = (torch.cat(scores, dim=-1) * scale).softmax(-1)
    return (weights @ torch.cat(values, dim=2).repeat_interleave(HEADS // KV_HEADS, dim=1)).transpose(1, 2)


def attention_over(prefixes, unrotated, implementation="sdpa", is_causal=True):
    """An attention module whose unrotated queries are given."""
    module = Attention(implementation, [], is_causal)
    joined = concatenated(prefixes)
    module.prefix_plus.forward = lambda key, value: (joined.to(key, value), ())
    module.prefix_plus.queries = lambda query, reads, positions: (
        torch.cat([query, unrotated], dim=-1) if reads == "both" else unrotated
    )
    return module


def drawn(tokens=7, kv_tokens=None, dtype=torch.float32, value_dim=DIM, reads=("unrotated",)):
    query, key, value, made = tensors(tokens, kv_tokens, value_dim=value_dim, dtype=dtype, prefixes=len(reads))
    unrotated = tensors(tokens, dtype=dtype, seed=1)[0]
    return (
        query,
        unrotated,
        key,
        value,
        [Prefix(each.key, each.value, reads=r) for each, r in zip(made, reads, strict=True)],
    )


MASKS = {
    "causal": (None, causal(7, 7), True),
    "bidirectional": (None, torch.ones(BATCH, 7, 7).bool(), False),
    "padded": (padded(7, 7)[:, None], padded(7, 7), True),
}


@pytest.mark.parametrize("value_dim", [DIM, DIM - 2])
@pytest.mark.parametrize("case", MASKS)
def test_sdpa_is_the_formula(way, case, value_dim):
    mask, visible, is_causal = MASKS[case]
    query, unrotated, key, value, made = drawn(value_dim=value_dim)
    output, _ = attention_over(made, unrotated, is_causal=is_causal).attend(query, key, value, mask, scaling=0.3)
    expected = free_formula(query, unrotated, key, value, made, 0.3, visible)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4])
def test_queries_after_cached_keys_are_the_formula(way, tokens):
    query, unrotated, key, value, made = drawn(tokens, 9)
    mask = None if tokens == 1 else causal(tokens, 9)[:, None]
    output, _ = attention_over(made, unrotated).attend(query, key, value, mask, scaling=0.3)
    expected = free_formula(query, unrotated, key, value, made, 0.3, causal(tokens, 9))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [("unrotated", "rotated"), ("rotated", "unrotated")])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("scaling", [0.3, None])
def test_beside_a_prefix_at_fixed_positions_each_reads_its_own_queries(order, implementation, scaling):
    query, unrotated, key, value, made = drawn(reads=order)
    mask = padded(7, 7)[:, None]
    module = attention_over(made, unrotated, implementation)
    mask = additive(mask) if implementation == "eager" else mask
    output, _ = module.attend(query, key, value, mask, scaling=scaling)
    expected = free_formula(query, unrotated, key, value, made, scaling or DIM**-0.5, padded(7, 7))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def test_eager_is_the_formula_and_returns_weights():
    query, unrotated, key, value, made = drawn()
    module = attention_over(made, unrotated, "eager")
    output, weights = module.attend(query, key, value, additive(padded(7, 7))[:, None], scaling=0.3)
    expected = free_formula(query, unrotated, key, value, made, 0.3, padded(7, 7))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    assert weights.shape == (BATCH, HEADS, 7, LENGTH + 7)


@pytest.mark.parametrize("tokens", [1, 4, 9])
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_under_flash_attention_it_is_the_formula(flash, tokens, size, masked):
    query, unrotated, key, value, made = drawn(tokens, 9)
    mask = padding_mask() if masked else None
    extra = {} if size is None else {"sliding_window": size}
    module = attention_over(made, unrotated, "flash_attention_2")
    output, _ = module.attend(query, key, value, mask, scaling=0.3, **extra)
    visible = window(tokens, 9, size or 9)
    if masked:
        visible = visible & mask[:, None, :].bool()
    expected = free_formula(query, unrotated, key, value, made, 0.3, visible)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    assert flash == []  # its kernel has one query for all keys


def test_under_flash_attention_no_mask_is_written_out_where_none_is_needed(flash, monkeypatch):
    monkeypatch.setattr("peft_prefix_plus.attention.masks.FlashMask.dense", lambda self: pytest.fail("a dense mask"))
    query, unrotated, key, value, made = drawn()
    output, _ = attention_over(made, unrotated, "flash_attention_2").attend(query, key, value, None, scaling=0.3)
    expected = free_formula(query, unrotated, key, value, made, 0.3, causal(7, 7))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value_dim", [DIM, DIM - 2])
def test_gradients_are_the_formulas(way, masked, value_dim):
    query, unrotated, key, value, (prefix,) = drawn(dtype=torch.float64, value_dim=value_dim)
    leaves = [each.contiguous().requires_grad_() for each in (query, unrotated, key, value, prefix.key, prefix.value)]
    visible = padded(7, 7) if masked else causal(7, 7)
    mask = visible[:, None] if masked else None

    def attend(query, unrotated, key, value, prefix_key, prefix_value):
        made = [Prefix(prefix_key, prefix_value, reads="unrotated")]
        return attention_over(made, unrotated).attend(query, key, value, mask, scaling=0.3)[0]

    expected = free_formula(*leaves[:4], [Prefix(*leaves[4:], reads="unrotated")], 0.3, visible)
    assert_gradients(attend, leaves, expected)


def test_only_the_prefixs_queries_may_need_a_gradient(way):
    query, unrotated, key, value, made = drawn(dtype=torch.float64)
    unrotated = unrotated.contiguous().requires_grad_()
    attend = lambda unrotated: attention_over(made, unrotated).attend(query, key, value)[0]
    assert torch.autograd.gradcheck(attend, [unrotated], atol=1e-6)


def test_autocast_is_followed(way):
    query, unrotated, key, value, made = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention_over(made, unrotated).attend(query, key, value, None, scaling=0.3)
    assert output.dtype == torch.bfloat16
    expected = free_formula(query, unrotated, key, value, made, 0.3, causal(7, 7))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-2)


# ------------------------------------------------------------------------------------------------- whole models

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)
GROUPED = dict(SIZES, num_key_value_heads=2, initializer_range=0.2)
LATENT = dict(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16)


def halved(query):
    """The rotated dims of DeepSeek's queries come as neighbours and leave as halves."""
    return torch.cat([query[..., :8], query[..., 8::2], query[..., 9::2]], dim=-1)


# what makes the model, the module that gives the queries, and what the model does to them beside rotating
MODELS = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)), "q_proj", None),
    "yarn": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**GROUPED, rope_parameters={"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4})
        ),
        "q_proj",
        # the factor on cosines and sines counts twice: for the query, and for the key
        lambda query: query * (0.1 * torch.tensor(8.0).log() + 1.0) ** 2,
    ),
    "qwen3, a norm": (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=8)), "q_norm", None),
    "glm, neighbours, some dims": (
        lambda: transformers.GlmForCausalLM(transformers.GlmConfig(**GROUPED, head_dim=8, pad_token_id=0)), "q_proj", None,
    ),
    "phi, halves, some dims": (lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**GROUPED)), "q_proj", None),
    "deepseek, the last dims": (
        lambda: transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(**{**GROUPED, "num_key_value_heads": 4}, **LATENT, **EXPERTS)
        ),
        "q_proj",
        halved,
    ),
}  # fmt: skip


class FreeFormula:
    """An attention implementation that writes the formula in float64, with queries as a module of the model gave them."""

    def __init__(self, model, source, finish):
        self.prefixes, self.gates, self.is_decoupled, self.queries = {}, {}, False, {}
        for module in model.modules():
            if hasattr(module, source):
                note = lambda _, args, output, owner=module: self.queries.__setitem__(owner, output)
                getattr(module, source).register_forward_hook(note)
        self.finish = finish or (lambda query: query)

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        key, value = (each.double().repeat_interleave(groups, dim=1) for each in (key, value))
        scores = query.double() @ key.transpose(-1, -2) * scale
        if attention_mask is not None:
            scores = scores + attention_mask.double()
        if module not in self.prefixes:
            return (scores.softmax(-1) @ value).transpose(1, 2).to(query.dtype), None
        prefix_key, prefix_value = (each.double().repeat_interleave(groups, 0)[None] for each in self.prefixes[module])
        own = self.queries[module].view(query.shape[0], query.shape[2], query.shape[1], -1).transpose(1, 2)
        own_scores = self.finish(own).double() @ prefix_key.transpose(-1, -2) * scale
        if module in self.gates:
            gate = self.gates[module].double().tanh()[:, None, None]
            output = scores.softmax(-1) @ value + gate * (own_scores.softmax(-1) @ prefix_value)
        elif self.is_decoupled:
            capped = DECOUPLED_CAP * (own_scores / DECOUPLED_CAP).tanh()
            output = scores.softmax(-1) @ value + (capped * capped.sigmoid()) @ prefix_value
        else:
            weights = torch.cat([own_scores, scores], dim=-1).softmax(-1)
            output = weights @ torch.cat([prefix_value.expand(len(value), -1, -1, -1), value], dim=2)
        return output.transpose(1, 2).to(query.dtype), None


@pytest.fixture
def reference_of():
    """Makes the model that follows the formula out of a plain one."""

    def make(model, source, finish):
        implementation = FreeFormula(model, source, finish)
        AttentionInterface.register("free_formula", implementation)
        AttentionMaskInterface.register("free_formula", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        model.set_attn_implementation("free_formula")
        return implementation

    yield make
    AttentionInterface._global_mapping.pop("free_formula", None)
    AttentionMaskInterface._global_mapping.pop("free_formula", None)


def build(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():  # norms of ones would hide that they scale
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(padding):
    torch.manual_seed(1)
    mask = torch.ones(2, 9, dtype=torch.long)
    if padding:
        mask[0, :2] = 0
    return {"input_ids": torch.randint(3, 64, (2, 9)), "attention_mask": mask}


def logits(model, padding=False):
    inputs = batch(padding)
    return output_of(model, **inputs)[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("fields", [{}, {"gating": True}, {"decoupled": True}], ids=["joint", "gated", "decoupled"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_the_formula(reference_of, name, fields):
    model = build(name)
    reference = copy.deepcopy(model)
    formula = reference_of(reference, *MODELS[name][1:])
    base = logits(reference)
    model = get_peft_model(model, joint_config(num_virtual_tokens=5, init_weights=False, **fields)).eval()
    assert model.resolved_config().position_free is True
    formula.is_decoupled = bool(fields.get("decoupled"))
    for module, layer in prefix_layers(model).items():
        formula.prefixes[reference.get_submodule(module)] = prefix_key_values(model)[module]
        if fields.get("gating"):
            formula.gates[reference.get_submodule(module)] = layer.prefix_plus_gate["default"].detach() * GATE_SCALE
    for padding in (False, True):
        expected = logits(reference, padding)
        for implementation in ("eager", "sdpa"):
            model.get_base_model().set_attn_implementation(implementation)
            # float32: numbers around 1 through three layers
            torch.testing.assert_close(logits(model, padding), expected, rtol=1e-4, atol=2e-5)
    assert (logits(reference) - base).abs().max() > 1e-2


def test_over_lora_it_is_the_formula(reference_of):
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    reference = copy.deepcopy(model.get_base_model())
    formula = reference_of(reference, "q_proj", None)
    model = get_peft_model(model.get_base_model(), joint_config(init_weights=False), adapter_name="prefix").eval()
    for module, prefix in prefix_key_values(model, "prefix").items():
        formula.prefixes[reference.get_submodule(module)] = prefix
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=2e-5)


def test_attention_mass_is_that_of_the_weights():
    model = prefixed(tiny_model(implementation="eager"))
    inputs = {"input_ids": token_ids()}
    weights = model(**inputs, output_attentions=True).attentions
    for implementation in ("eager", "sdpa"):
        model.get_base_model().set_attn_implementation(implementation)
        for found, of_layer in zip(prefix_attention_mass(model, **inputs).values(), weights, strict=True):
            torch.testing.assert_close(found, of_layer[..., :3].sum(-1).mean((0, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"gating": True}, {"decoupled": True}], ids=["joint", "gated", "decoupled"])
def test_where_a_text_begins_makes_no_difference(fields):
    model = prefixed(tiny_model(), num_virtual_tokens=5, **fields)
    fixed = prefixed(tiny_model(), num_virtual_tokens=5, position_free=False, **fields)
    ids = token_ids()
    moved = 50 + torch.arange(ids.shape[1])[None]
    # rotary angles are float32: at position 50 they are right to about 1e-5
    torch.testing.assert_close(
        output_of(model, input_ids=ids, position_ids=moved), output_of(model, input_ids=ids), rtol=1e-4, atol=1e-4
    )
    difference = output_of(fixed, input_ids=ids, position_ids=moved) - output_of(fixed, input_ids=ids)
    assert difference.abs().max() > 1e-2


def test_adapters_of_both_kinds_are_active_together():
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model = prefixed(tiny_model(implementation=implementation))
        torch.manual_seed(1)
        model.add_adapter("fixed", joint_config(num_virtual_tokens=4, init_weights=False, position_free=False))
        model.base_model.set_adapter(["default", "fixed"])
        torch.manual_seed(2)
        for layer in prefix_layers(model).values():
            for encoder in layer.prefix_plus_encoder.values():
                for parameter in encoder.parameters():
                    nn.init.normal_(parameter, std=0.02)
        outputs[implementation] = output_of(model.eval(), input_ids=token_ids())
        model.base_model.set_adapter("fixed")
        alone = output_of(model, input_ids=token_ids())
        model.delete_adapter("default")
        assert torch.equal(output_of(model, input_ids=token_ids()), alone)
        assert all(not layer.attention._forward_pre_hooks for layer in prefix_layers(model).values())
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], rtol=1e-4, atol=1e-5)


def test_a_copy_has_hooks_of_its_own():
    model = prefixed(tiny_model())
    ids = token_ids()
    expected = output_of(model, input_ids=ids)
    copied = copy.deepcopy(model)
    base = copied.unload()

    assert not any(module._forward_pre_hooks for module in base.modules())
    assert torch.equal(output_of(base, input_ids=ids), output_of(tiny_model(), input_ids=ids))
    assert torch.equal(output_of(model, input_ids=ids), expected)


# ------------------------------------------------------------------------------------------------- the rotations


def rotated(function, states, positions, arrange):
    angles = positions.double()[:, None] * torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    cos, sin = (arrange(each)[None] for each in (angles.cos(), angles.sin()))
    return function(states, states, cos, sin)[0], (cos, sin)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_without_gradients_planes_turn_back_alike_and_states_stay(is_interleaved, tokens):
    states, angles = torch.randn(2, 3, tokens, 8), torch.randn(2, 1, tokens, 4)
    factors = factors_of_dims(angles.cos(), angles.sin(), is_interleaved)
    before = states.clone()
    expected = turn_back(states, *factors, is_interleaved)
    with torch.no_grad():
        assert torch.equal(turn_back(states, *factors, is_interleaved), expected)
    assert torch.equal(states, before)


def test_undone_a_rotation_is_none():
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama
    from transformers.models.nanochat.modeling_nanochat import apply_rotary_pos_emb as nanochat

    def halves(each):
        return torch.cat([each, each], dim=-1)

    cases = [
        (llama, halves, QueryRotation()),
        (glm, halves, QueryRotation(is_interleaved=True)),
        (cohere, lambda each: each.repeat_interleave(2, dim=-1), QueryRotation(is_interleaved=True, arrangement="neighbours")),
        (gpt_oss, lambda each: each, QueryRotation(arrangement="once")),
        (nanochat, halves, QueryRotation(is_clockwise=True)),
    ]  # fmt: skip
    states = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    for function, arrange, rotation in cases:
        turned, embeddings = rotated(function, states, torch.arange(3, 8), arrange)
        assert (turned - states).abs().max() > 0.1
        torch.testing.assert_close(
            rotation.undo(turned, embeddings), states, rtol=0, atol=1e-6
        )  # Cohere rotates in float32


@pytest.mark.parametrize(
    "name, rotation",
    [
        ("llama", QueryRotation()),
        ("glm, neighbours, some dims", QueryRotation(is_interleaved=True)),
        ("deepseek, the last dims", QueryRotation(is_last=True)),
    ],
)
def test_a_modules_rotation_is_told_from_its_class(name, rotation):
    with torch.device("meta"):
        model = MODELS[name][0]()
    assert find_rotation(model.model.layers[0].self_attn) == rotation


def test_a_model_without_weights_has_the_same_rotations():
    with torch.device("meta"):
        empty = transformers.SmolLM3ForCausalLM(
            transformers.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1], pad_token_id=0)
        )
    with pytest.warns(UserWarning, match="has no weights yet"):
        empty = get_peft_model(empty, joint_config())
    whole = transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1], pad_token_id=0)
    )
    whole = get_peft_model(whole, joint_config())

    rotations = [[layer.rotation for layer in prefix_layers(model).values()] for model in (empty, whole)]
    assert rotations[0] == rotations[1] == [QueryRotation(), None, QueryRotation()]  # the second layer rotates nothing


# ------------------------------------------------------------------------------------------------- the configuration


def test_what_none_resolves_to_is_saved_and_loaded(tmp_path):
    for architecture, expected in (("llama", True), ("gpt2", True)):
        model = prefixed(tiny_model(architecture))
        assert model.resolved_config().position_free is expected
        model.save_pretrained(tmp_path / architecture)
        loaded = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / architecture)
        assert loaded.resolved_config().position_free is expected
        assert torch.equal(output_of(loaded, input_ids=token_ids()), output_of(model, input_ids=token_ids()))
    fixed = prefixed(tiny_model(), position_free=False)
    fixed.save_pretrained(tmp_path / "fixed")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "fixed")
    assert loaded.resolved_config().position_free is False
    assert torch.equal(output_of(loaded, input_ids=token_ids()), output_of(fixed, input_ids=token_ids()))


def test_a_rotation_that_cannot_be_undone_is_left_or_refused():
    def gptj():
        return transformers.GPTJForCausalLM(
            transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
        )

    model = get_peft_model(gptj(), joint_config())
    assert model.resolved_config().position_free is False
    model, config = gptj(), joint_config(position_free=True)
    modules = [type(module) for module in model.modules()]
    with pytest.raises(
        ValueError, match=r"`position_free` is True, but .* of GPTJForCausalLM cannot be undone: .*None"
    ):
        get_peft_model(model, config)
    assert [type(module) for module in model.modules()] == modules and config.position_free is True


def test_a_failed_adding_leaves_the_configuration_as_it_was(monkeypatch):
    config = joint_config()
    monkeypatch.setattr("peft_prefix_plus.model.PrefixPlusLayer.update_layer", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        get_peft_model(tiny_model(), config)
    assert config.position_free is None


@pytest.mark.parametrize("value", [1, "yes"])
def test_other_values_are_refused(value):
    with pytest.raises(TypeError, match=f"`position_free` must be True, False or None, got {value!r}"):
        joint_config(position_free=value)


def test_starting_from_a_text_puts_the_prefix_at_the_texts_positions(tmp_path):
    model = prefixed(tiny_model(), num_virtual_tokens=4)
    ids, text = token_ids(), token_ids(1, 4, seed=3)
    tokenizer = lambda *args, **kwargs: {"input_ids": text[0].tolist()}
    with pytest.warns(UserWarning, match="not position-free any more.*position_free=False"):
        initialize_from_text(model, tokenizer, "")

    assert model.resolved_config().position_free is False
    assert not any(layer.attention._forward_pre_hooks for layer in prefix_layers(model).values())
    positions = torch.arange(-4, ids.shape[1])[None].expand(len(ids), -1)
    expected = output_of(
        tiny_model(), input_ids=torch.cat([text.expand(len(ids), -1), ids], 1), position_ids=positions
    )
    torch.testing.assert_close(output_of(model, input_ids=ids), expected[:, 4:], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(output_of(loaded, input_ids=ids), output_of(model, input_ids=ids))


def test_activations_are_the_keys_before_their_rotation():
    model = tiny_model()
    seen = []
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *args: seen.append(args[-1]))
    model = prefixed(model, num_virtual_tokens=8, init_weights="activations")
    handle.remove()

    key, _ = next(iter(prefix_key_values(model).values()))
    torch.testing.assert_close(key, seen[0].view(8, key.shape[0], -1).transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_prefix_tuning_cannot_express_it():
    model = get_peft_model(tiny_model(), joint_config(task_type="CAUSAL_LM"))
    with pytest.raises(
        ValueError, match=r"'default', which is position-free, cannot be expressed.*position_free=False"
    ):
        to_prefix_tuning(model)


def test_a_module_called_without_its_position_embeddings_is_an_error():
    layer = next(iter(prefix_layers(prefixed(tiny_model())).values()))
    with pytest.raises(RuntimeError, match="LlamaAttention was called without its `position_embeddings`"):
        layer.queries(torch.zeros(1, 4, 1, 8), "unrotated", None)


@pytest.mark.parametrize("by", ["in place", "through data"])
def test_angles_that_are_written_over_are_read_anew(by):
    layer = next(iter(prefix_layers(prefixed(tiny_model())).values()))
    query = torch.randn(1, 4, 3, 8)
    first, second = (torch.randn(1, 3, 4).repeat(1, 1, 2) for _ in range(2))
    angles = (first.cos(), first.sin())
    before = layer.queries(query, "unrotated", angles)
    for tensor, new in zip(angles, (second.cos(), second.sin()), strict=True):
        (tensor if by == "in place" else tensor.data).copy_(new)
    after = layer.queries(query, "unrotated", angles)
    assert not torch.allclose(before, after)
    assert torch.equal(after, layer.queries(query, "unrotated", (second.cos(), second.sin())))


def test_the_probe_needs_no_backward_of_an_attention_kernel(monkeypatch):
    def without_backward(module, query, key, value, attention_mask=None, **kwargs):
        if query.requires_grad or key.requires_grad or value.requires_grad:
            raise NotImplementedError("FlexAttention does not support backward on CPU.")
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flex_attention", without_backward)
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "flex_attention", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    model = prefixed(tiny_model(implementation="flex_attention"))
    assert all(layer.is_position_free["default"] for layer in prefix_layers(model).values())
