"""Modules that compute attention themselves: the formula, written out in float64 for each from its own weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import adapter_parameters, assert_unchanged, prefix_config, state_of
from peft import PeftModel, get_peft_model
from transformers import (
    BigBirdConfig,
    BigBirdForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from peft_prefix_plus import prefix_key_values


VOCABULARY, WIDTH, HEADS, DIM, TOKENS = 64, 32, 4, 8, 6
SIZES = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, initializer_range=0.3)
MODELS = {
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=HEADS,
            n_positions=32,
            rotary_dim=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SIZES, n_layer=2, n_head=HEADS)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(**SIZES, num_hidden_layers=2, num_attention_heads=HEADS, alibi=True, multi_query=False, bias=True)
    ),
    "mpt": lambda: MptForCausalLM(
        MptConfig(vocab_size=VOCABULARY, d_model=WIDTH, n_layers=2, n_heads=HEADS, max_seq_len=32)
    ),
    "deberta": lambda: DebertaV2Model(
        DebertaV2Config(
            **SIZES,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            intermediate_size=48,
            max_position_embeddings=32,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            max_relative_positions=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ),
}
OUTPUT_PROJECTIONS = {"gptj": "out_proj", "bloom": "dense", "falcon": "dense", "mpt": "out_proj", "deberta": None}


def build(name, implementation="eager"):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if implementation != "eager":
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def token_ids(batch=2, tokens=TOKENS):
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


def output_of(model, ids, **options):
    with torch.no_grad():
        output = model(input_ids=ids, **options)
    return output.logits if "logits" in output else output.last_hidden_state


def heads(tensor):
    """(batch, tokens, heads · dim) to (batch, heads, tokens, dim)."""
    return tensor.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def alibi():
    """−m (i − j) (heads, tokens, tokens), with the slopes of the paper, and −inf for keys to come (arXiv 2108.12409)."""
    slopes = 2.0 ** (-8.0 / HEADS * torch.arange(1, HEADS + 1, dtype=torch.float64))
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None, :]
    return (-slopes[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)


def rotated(tensor, rotary_dim=4):
    """Rotate pairs of neighbouring dims by position times frequency, as complex numbers (arXiv 2104.09864)."""
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(TOKENS, dtype=torch.float64)[:, None] * frequencies
    pairs = torch.view_as_complex(tensor[..., :rotary_dim].contiguous().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return torch.cat([turned, tensor[..., rotary_dim:]], dim=-1)


def gptj_terms(attention, hidden, model):
    query, key, value = (heads(getattr(attention, f"{name}_proj")(hidden)) for name in "qkv")
    causal = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
    return rotated(query), rotated(key), value, DIM**-0.5, causal


def fused_terms(attention, hidden, model):
    query, key, value = attention.query_key_value(hidden).unflatten(-1, (HEADS, 3, DIM)).permute(3, 0, 2, 1, 4)
    return query, key, value, DIM**-0.5, alibi()


def falcon_terms(attention, hidden, model):
    query, key, value, scale, bias = fused_terms(attention, hidden, model)
    return query, key, value, scale, bias * scale  # Falcon scales its ALiBi too


def mpt_terms(attention, hidden, model):
    query, key, value = (heads(part) for part in attention.Wqkv(hidden).chunk(3, dim=-1))
    return query, key, value, DIM**-0.5, alibi()


def deberta_terms(attention, hidden, model):
    """Disentangled attention: content to position and position to content (arXiv 2006.03654, equation 4)."""
    query, key, value = (heads(getattr(attention, f"{name}_proj")(hidden)) for name in ("query", "key", "value"))
    span = 4
    positions = model.get_submodule("encoder").rel_embeddings.double()(torch.arange(2 * span))
    position_key, position_query = (
        getattr(attention, name)(positions).unflatten(-1, (HEADS, DIM)).transpose(0, 1)
        for name in ("pos_key_proj", "pos_query_proj")
    )
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None, :]
    bucket = (distance + span).clamp(0, 2 * span - 1)
    content_to_position = torch.einsum("bhid,hijd->bhij", query, position_key[:, bucket])
    position_to_content = torch.einsum("bhjd,hijd->bhij", key, position_query[:, bucket])
    scale = (3 * DIM) ** -0.5
    return query, key, value, scale, (content_to_position + position_to_content) * scale


TERMS = {
    "gptj": gptj_terms,
    "bloom": fused_terms,
    "falcon": falcon_terms,
    "mpt": mpt_terms,
    "deberta": deberta_terms,
}


def formula(query, scale, prefix_key, prefix_value, key, value, bias):
    """softmax(s · Q [P_K ; K]ᵀ + [0 ; bias]) [P_V ; V], (batch, tokens, heads · value_dim)."""
    batch = query.shape[0]
    prefix_scores = scale * query @ prefix_key.double().transpose(-1, -2)
    scores = torch.cat([prefix_scores, scale * query @ key.transpose(-1, -2) + bias], dim=-1)
    values = torch.cat([prefix_value.double().expand(batch, -1, -1, -1), value], dim=2)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(-2)


def first_layer_run(name, model, ids):
    """The input of the first layer's attention, and what it puts out before its output projection."""
    attention_name = next(iter(prefix_key_values(model)))
    attention = model.get_base_model().get_submodule(attention_name)
    seen = {}

    def keep_input(module, args, kwargs):
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    handles = [attention.register_forward_pre_hook(keep_input, with_kwargs=True)]
    projection = OUTPUT_PROJECTIONS[name]
    if projection is None:
        handles.append(attention.register_forward_hook(lambda *args: seen.update(output=args[-1][0])))
    else:
        inner = getattr(attention, projection)
        handles.append(inner.register_forward_pre_hook(lambda _, args: seen.update(output=args[0])))
    output_of(model, ids)
    for handle in handles:
        handle.remove()
    return attention_name, seen["hidden"], seen["output"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_the_formula(name, implementation):
    if implementation == "sdpa" and name != "falcon":
        pytest.skip("has eager attention only")
    model = get_peft_model(build(name, implementation), prefix_config()).eval()
    attention_name, hidden, output = first_layer_run(name, model, token_ids())
    key, value = prefix_key_values(model)[attention_name]
    reference = copy.deepcopy(model).unload().double()
    with torch.no_grad():
        query, *terms, scale, bias = TERMS[name](reference.get_submodule(attention_name), hidden.double(), reference)
        expected = formula(query, scale, key, value, *terms, bias)
        without_prefix = formula(query, scale, key[:, :0], value[:, :0], *terms, bias)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    assert (expected - without_prefix).abs().max() > 1e-2  # the prefix has an effect to speak of


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_change_the_real_tokens(name):
    model = get_peft_model(build(name), prefix_config()).eval()
    ids = token_ids()
    padded = torch.cat([ids, torch.full((2, 3), 3)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 3, dtype=torch.long)], dim=1)
    with_padding = output_of(model, padded, attention_mask=mask)[:, :TOKENS]
    torch.testing.assert_close(with_padding, output_of(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_unselected_layer_is_bit_identical_to_the_base(name):
    base = build(name)
    model = get_peft_model(build(name), prefix_config(layers_to_transform=[1])).eval()
    with torch.no_grad():
        expected = base(input_ids=token_ids(), output_hidden_states=True).hidden_states
        hidden = model(input_ids=token_ids(), output_hidden_states=True).hidden_states
    assert torch.equal(hidden[1], expected[1])
    assert not torch.equal(hidden[2], expected[2])


@pytest.mark.parametrize("name", MODELS)
def test_a_closed_gate_is_exactly_the_base_model_and_learns_to_open(name):
    base = build(name)
    model = get_peft_model(build(name), prefix_config(gating=True, init_weights=True)).eval()
    assert torch.equal(output_of(model, token_ids()), output_of(base, token_ids()))
    outputs = model(input_ids=token_ids())
    hidden = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    hidden.square().mean().backward()
    gates = [parameter for parameter_name, parameter in adapter_parameters(model).items() if "gate" in parameter_name]
    assert gates and all(gate.grad.all() for gate in gates)


@pytest.mark.parametrize("gating", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_each_row_of_a_batch_has_the_adapter_it_names(name, gating):
    base = build(name)
    model = get_peft_model(build(name), prefix_config(gating=gating)).eval()
    model.add_adapter("longer", prefix_config(num_virtual_tokens=5, gating=gating))
    ids = token_ids(batch=3)
    mixed = output_of(model, ids, adapter_names=["longer", "__base__", "default"])
    torch.testing.assert_close(mixed[1], output_of(base, ids)[1], rtol=0, atol=1e-5)
    for row, adapter in ((0, "longer"), (2, "default")):
        model.set_adapter(adapter)
        torch.testing.assert_close(mixed[row], output_of(model, ids)[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for use_reentrant in (None, False, True):
        model = get_peft_model(build(name), prefix_config()).train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        outputs = model(input_ids=token_ids(), use_cache=False) if name != "deberta" else model(input_ids=token_ids())
        hidden = outputs.logits if "logits" in outputs else outputs.last_hidden_state
        hidden.square().mean().backward()
        gradients.append([parameter.grad for parameter in adapter_parameters(model).values()])
    for other in gradients[1:]:
        for gradient, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_copy_of_a_model_has_a_prefix_of_its_own():
    model = get_peft_model(build("gptj"), prefix_config()).eval()
    expected = output_of(model, token_ids())
    duplicate = copy.deepcopy(model)
    for parameter in adapter_parameters(duplicate).values():
        parameter.data.zero_()
    assert torch.equal(output_of(model, token_ids()), expected)
    assert not torch.allclose(output_of(duplicate, token_ids()), expected, atol=1e-4)
    assert torch.equal(output_of(duplicate.unload(), token_ids()), output_of(build("gptj"), token_ids()))


def test_a_second_adapter_finds_the_shapes_of_the_real_keys():
    model = get_peft_model(build("bloom"), prefix_config()).eval()
    expected = output_of(model, token_ids())
    model.add_adapter("second", prefix_config(num_virtual_tokens=2))
    assert torch.equal(output_of(model, token_ids()), expected)
    model.set_adapter("second")
    assert not torch.allclose(output_of(model, token_ids()), expected, atol=1e-4)


def test_target_modules_and_loading_work_as_elsewhere(tmp_path):
    model = get_peft_model(build("bloom"), prefix_config(target_modules=["h.1.self_attention"])).eval()
    assert list(prefix_key_values(model)) == ["transformer.h.1.self_attention"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bloom"), tmp_path).eval()
    assert torch.equal(output_of(loaded, token_ids()), output_of(model, token_ids()))


def test_a_prefix_that_does_not_get_in_is_an_error_and_not_silence(monkeypatch):
    model = get_peft_model(build("gptj"), prefix_config()).eval()

    def without_softmax(self, query, key, value, attention_mask=None):
        return value, None

    monkeypatch.setattr(type(model.get_base_model().transformer.h[0].attn), "_attn", without_softmax)
    with pytest.raises(RuntimeError, match="prefix did not get in"):
        output_of(model, token_ids())


def test_block_sparse_attention_is_refused_before_anything_is_changed():
    sizes = dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, block_size=4, num_random_blocks=1)
    model = BigBirdForSequenceClassification(BigBirdConfig(**SIZES, **sizes))
    before = state_of(model)
    with pytest.raises(ValueError, match="attention_type='original_full'"):
        get_peft_model(model, prefix_config(task_type="SEQ_CLS"))
    assert_unchanged(model, before)


@pytest.mark.parametrize("form", [{}, {"gating": True}, {"decoupled": True}], ids=str)
def test_a_batch_without_rows_gives_no_rows(form):
    model = get_peft_model(build("gptj"), prefix_config(**form)).eval()
    assert output_of(model, token_ids()[:0]).shape == (0, TOKENS, VOCABULARY)


@pytest.mark.parametrize("hooked", ["before", "after"])
def test_accelerates_hooks_and_prefixes_come_and_go_in_any_order(hooked):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    def hook(model):
        for module in model.modules():
            if type(module).__name__ == "GPTJAttention":
                add_hook_to_module(module, ModelHook())

    def unhook(model):
        for module in model.modules():
            remove_hook_from_module(module)

    plain, ids = build("gptj"), token_ids()
    expected = output_of(plain, ids)
    for unhooked in ("before", "after"):
        model = build("gptj")
        classes = [type(module) for module in model.modules()]
        if hooked == "before":
            hook(model)
        torch.manual_seed(0)
        adapted = get_peft_model(model, prefix_config()).eval()
        copied = copy.deepcopy(adapted)
        if hooked == "after":
            hook(adapted)
        prefixed_output = output_of(adapted, ids)
        assert not torch.allclose(prefixed_output, expected)
        assert torch.equal(output_of(copied, ids), prefixed_output)
        if unhooked == "before":
            unhook(model)
            assert torch.equal(output_of(adapted, ids), prefixed_output)
        assert torch.equal(output_of(adapted.unload(), ids), expected)
        unhook(model)
        assert torch.equal(output_of(model, ids), expected)
        assert [type(module) for module in model.modules()] == classes


def test_a_replica_of_data_parallel_runs_its_own_modules():
    model = get_peft_model(build("gptj"), prefix_config()).eval()
    attention = model.get_base_model().transformer.h[0].attn
    replica = attention._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(module) for name, module in attention._modules.items()}
    with torch.no_grad():
        replica.out_proj.weight.zero_()
        hidden = torch.randn(1, TOKENS, WIDTH)
        positions = torch.arange(TOKENS)[None]
        assert replica(hidden, position_ids=positions)[0].abs().max() == 0
        assert attention(hidden, position_ids=positions)[0].abs().max() > 0


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_follows_its_own_modules(copied):
    model = get_peft_model(build("gptj"), prefix_config()).eval()
    expected = output_of(model, token_ids())
    other = copied(model)
    assert torch.equal(output_of(other, token_ids()), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(output_of(model, token_ids()), expected)
    assert [type(module) for module in other.unload().modules()] == [
        type(module) for module in build("gptj").modules()
    ]
