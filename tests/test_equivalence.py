"""Whole models with a prefix against independent references: the formula in float64, and PEFT's PREFIX_TUNING."""

from __future__ import annotations

import copy

import pytest
import torch
from models import GATE_SCALE, SCALING_SIZE, joint_config
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from peft_prefix_plus import flatten, initialize_from_key_values, prefix_key_values


VOCABULARY = 64
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    initializer_range=0.1,
)
LATENT = dict(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, head_dim=4)
MODELS = {
    "llama, grouped heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "deepseek, values narrower than keys": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(**SIZES, **LATENT, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    ),
    "mistral, sliding window": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, initializer_range=0.1)
    ),
    "bert": lambda: BertModel(BertConfig(**SIZES)),
}


def build(name, implementation="sdpa"):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(implementation)
    return model


def batch(padding=None):
    """Ids and mask of two rows, the first of them two tokens shorter when padded."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :2] = 0
    elif padding == "right":
        mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Formula:
    """An attention implementation that writes the method's formula in float64, with prefixes given by module."""

    def __init__(self):
        self.prefixes = {}

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        query, key, value = query.double(), key.double(), value.double()
        length = 0
        if module in self.prefixes:
            prefix_key, prefix_value = self.prefixes[module]
            length = prefix_key.shape[1]
            key = torch.cat([prefix_key.double().expand(len(key), -1, -1, -1), key], dim=2)
            value = torch.cat([prefix_value.double().expand(len(value), -1, -1, -1), value], dim=2)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            scores[..., length:] += attention_mask.double()
        return (scores.softmax(-1) @ value).transpose(1, 2).to(torch.get_default_dtype()), None


@pytest.fixture(scope="module")
def formula():
    """The formula, registered as an attention implementation whose masks are the eager ones."""
    implementation = Formula()
    AttentionInterface.register("formula", implementation)
    AttentionMaskInterface.register("formula", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    yield implementation
    AttentionInterface._global_mapping.pop("formula")
    AttentionMaskInterface._global_mapping.pop("formula")


def logits(model, inputs):
    """Output at real tokens."""
    with torch.no_grad():
        output = model(**inputs)
    return (output.logits if "logits" in output else output.last_hidden_state)[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("sharing", ["none", "input", "projection", "all"])
@pytest.mark.parametrize("reparameterization", ["none", "linear", "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_the_formula(formula, name, reparameterization, sharing):
    model = build(name)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("formula")
    config = joint_config(
        num_virtual_tokens=5,
        position_free=False,
        reparameterization=reparameterization,
        sharing=sharing,
        encoder_dim=6,
        layers_to_transform=[0, -1],
        init_weights=False,
    )
    model = get_peft_model(model, config).eval()
    base = logits(reference, batch())
    formula.prefixes = {reference.get_submodule(module): prefix for module, prefix in prefix_key_values(model).items()}
    assert len(formula.prefixes) == 2
    for padding in (None, "left", "right"):
        expected = logits(reference, batch(padding))
        for implementation in ("eager", "sdpa"):
            model.get_base_model().set_attn_implementation(implementation)
            torch.testing.assert_close(logits(model, batch(padding)), expected, rtol=0, atol=1e-5)
    assert (logits(reference, batch()) - base).abs().max() > 1e-2  # the prefix has an effect to speak of


ROTARY_MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)), 8),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)), 8),
    "gpt-neox, a quarter rotated": (
        lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(
                **{**SIZES, "hidden_size": 64},
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            )
        ),
        4,
    ),
}


def rotated_back(key, rotary_dim, theta, length):
    """Rotate keys (heads, tokens, dim) by -length positions, written out in float64."""
    key = key.double()
    frequencies = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = -length * torch.cat([frequencies, frequencies])
    rotated, rest = key[..., :rotary_dim], key[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    return torch.cat([turned, rest], dim=-1).float()


@pytest.fixture(params=ROTARY_MODELS)
def same_prefix(request):
    """A model with PEFT's PREFIX_TUNING, and one with PREFIX_PLUS that holds the same prefix."""
    make, rotary_dim = ROTARY_MODELS[request.param]
    torch.manual_seed(0)
    base = make().eval()
    length = 6
    theirs = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    ours = get_peft_model(base, joint_config(task_type="CAUSAL_LM", num_virtual_tokens=length, position_free=False))
    prompt = theirs.get_prompt(batch_size=1)
    theta = base.config.rope_parameters["rope_theta"]
    key_values = [(rotated_back(layer.keys[0], rotary_dim, theta, length), layer.values[0]) for layer in prompt.layers]
    initialize_from_key_values(ours, dict(zip(prefix_key_values(ours), key_values, strict=True)))
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_and_greedy_generations_equal_prefix_tunings(same_prefix, implementation, padding):
    theirs, ours = same_prefix
    for model in same_prefix:
        model.get_base_model().set_attn_implementation(implementation)
    inputs = batch(padding)
    expected, found = logits(theirs, inputs), logits(ours, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with ours.disable_adapter():
        assert (logits(ours, inputs) - expected).abs().max() > 1e-2
    generations = [
        model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0) for model in same_prefix
    ]
    assert torch.equal(*generations)


@pytest.mark.parametrize("sharing", ["none", "input", "projection", "all"])
@pytest.mark.parametrize("reparameterization", ["none", "linear", "mlp"])
@pytest.mark.parametrize("kind", [{}, {"gating": True}, {"decoupled": True}], ids=str)
def test_a_flattened_adapter_gives_the_same_logits(tmp_path, reparameterization, sharing, kind):
    base = build("llama, grouped heads")
    config = joint_config(
        reparameterization=reparameterization,
        sharing=sharing,
        encoder_dim=6,
        prefix_scaling=3.0,
        init_weights=False,
        **kind,
    )
    model = get_peft_model(copy.deepcopy(base), config).eval()
    expected = logits(model, batch())
    flatten(model)
    assert torch.equal(logits(model, batch()), expected)
    assert model.peft_config["default"].reparameterization == "none"
    assert config.reparameterization == reparameterization
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded.eval(), batch()), expected)
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == 3 * (
        2 * 20 * 16 + 4 * ("gating" in kind) + SCALING_SIZE
    )


def test_prefix_key_values_names_the_adapters_there_are():
    model = get_peft_model(build("gpt2"), joint_config())
    for function in (prefix_key_values, flatten):
        with pytest.raises(ValueError, match=r"named 'other'.*\['default'\]"):
            function(model, "other")


def test_a_gated_prefix_adds_its_own_attention(formula):
    model = build("llama, grouped heads")
    reference = copy.deepcopy(model)
    base = logits(model, batch("left"))
    model = get_peft_model(
        model, joint_config(gating=True, position_free=False, num_virtual_tokens=5, layers_to_transform=1)
    ).eval()
    assert torch.equal(logits(model, batch("left")), base)

    layer = model.get_base_model().model.layers[1].self_attn.prefix_plus
    with torch.no_grad():
        layer.prefix_plus_gate["default"].copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]) / GATE_SCALE)
    prefix_key, prefix_value = prefix_key_values(model)["model.layers.1.self_attn"]

    def gated(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        output, _ = formula(module, query, key, value, attention_mask, scaling)
        if module is reference.model.layers[1].self_attn:
            own, _ = formula(
                module, query, prefix_key.expand(2, -1, -1, -1), prefix_value.expand(2, -1, -1, -1), None, scaling
            )
            output = output + own * torch.tensor([0.5, -1.0, 2.0, 0.0]).tanh()[:, None]
        return output, None

    formula.prefixes = {}
    AttentionInterface.register("gated_formula", gated)
    AttentionMaskInterface.register("gated_formula", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    reference.set_attn_implementation("gated_formula")
    for implementation in ("eager", "sdpa"):
        model.get_base_model().set_attn_implementation(implementation)
        torch.testing.assert_close(logits(model, batch("left")), logits(reference, batch("left")), rtol=0, atol=1e-5)
    AttentionInterface._global_mapping.pop("gated_formula")
    AttentionMaskInterface._global_mapping.pop("gated_formula")
