"""Every kind of cache, against a run without one: the cache holds real tokens only."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from models import joint_config
from peft import get_peft_model
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    QuantizedCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    cache_utils,
)


SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=24)),
}
LENGTH = 5


def adapted(name="llama", implementation="sdpa", **fields):
    torch.manual_seed(0)
    model = MODELS[name]() if isinstance(name, str) else name
    model.set_attn_implementation(implementation)
    config = joint_config(num_virtual_tokens=LENGTH, init_weights=False, **fields)
    return get_peft_model(model, config).eval()


def ids(rows=1, tokens=9):
    torch.manual_seed(1)
    return torch.randint(3, 64, (rows, tokens))


def generate(model, inputs, **options):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **options)


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_every_cache_generates_what_no_cache_generates(name, implementation, cache):
    model = adapted(name, implementation)
    expected = generate(model, ids(2), use_cache=False)
    if cache.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("offloading needs an accelerator")
    assert torch.equal(generate(model, ids(2), cache_implementation=cache), expected)
    with model.disable_adapter():
        assert not torch.equal(generate(model, ids(2)), expected)


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_a_users_cache_serves_several_turns_and_holds_real_tokens_only(reparameterization):
    model = adapted(reparameterization=reparameterization, encoder_dim=6)
    cache, tokens, whole = DynamicCache(config=model.config), ids(1, 15), None
    with torch.no_grad():
        for start, end in ((0, 6), (6, 7), (7, 12), (12, 15)):
            whole = model(tokens[:, start:end], past_key_values=cache).logits
            assert cache.get_seq_length() == end and cache.layers[0].keys.shape[2] == end
        expected = model(tokens).logits[:, 12:]
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)


def test_a_cropped_cache_goes_on_from_where_it_was_cropped():
    model, tokens = adapted(), ids(1, 10)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, 9), past_key_values=cache)
        cache.crop(-5)
        found = model(tokens[:, 4:], past_key_values=cache).logits
        expected = model(torch.cat([ids(1, 9)[:, :4], tokens[:, 4:]], dim=1)).logits[:, 4:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_static_cache_is_filled_in_parts():
    model, tokens = adapted(), ids(1, 10)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        parts = [model(tokens[:, start:end], past_key_values=cache).logits for start, end in ((0, 6), (6, 7), (7, 10))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, rtol=0, atol=1e-5)


def test_a_prompt_of_the_models_full_length_still_works():
    model, tokens = adapted("gpt2"), ids(1, 24)
    with torch.no_grad():
        assert model(tokens).logits.shape[1] == model.config.n_positions == 24
    assert generate(model, tokens[:, :23], max_new_tokens=1, min_new_tokens=1).shape[1] == 24


DECODINGS = {
    "beams": {"num_beams": 3},
    "beam samples": {"num_beams": 3, "do_sample": True},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "returned beams": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("case", DECODINGS)
def test_every_decoding_is_the_same_with_and_without_a_cache(case):
    model = adapted()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generate(model, ids(2), use_cache=use_cache, **DECODINGS[case]))
    assert torch.equal(*found)


@pytest.mark.parametrize("assistant", ["the base model", "prompt lookup"])
def test_assisted_decoding_gives_the_greedy_tokens(assistant):
    model = adapted()
    expected = generate(model, ids())
    if assistant == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 3}
    else:
        torch.manual_seed(0)
        options = {"assistant_model": MODELS["llama"]().eval()}
    assert torch.equal(generate(model, ids(), **options), expected)


def test_an_encoder_decoder_cache_generates_what_no_cache_generates():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0)
    model = adapted(T5ForConditionalGeneration(config), task_type="SEQ_2_SEQ_LM")
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        expected = generate(model, ids(2), use_cache=False, num_beams=options.get("num_beams", 1))
        assert torch.equal(generate(model, ids(2), **options), expected)


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_a_quantized_cache_holds_real_tokens_only(backend):
    if backend != "fp8":
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    elif not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("transformers has it from 5.20 on")
    options = {} if backend == "fp8" else {"nbits": 4, "q_group_size": 8, "residual_length": 1}
    model, tokens, caches = adapted(), ids(1, 12), []

    def run():
        caches.append(QuantizedCache(backend=backend, config=model.config, **options))
        parts = [model(tokens[:, start:end], past_key_values=caches[-1]).logits for start, end in ((0, 9), (9, 12))]
        assert caches[-1].get_seq_length() == 12
        return parts

    with torch.no_grad():
        first, second = run()
        exact = model(tokens).logits
        with model.disable_adapter():
            base_second, base_exact = run()[1], model(tokens).logits
    stored = [[layer._dequantize(layer._quantized_keys) for layer in cache.layers] for cache in caches]
    # the first layer's keys know of no prefix yet, and later ones do
    assert torch.equal(stored[0][0], stored[1][0])
    assert not torch.equal(stored[0][1], stored[1][1])
    torch.testing.assert_close(first, exact[:, :9], rtol=0, atol=1e-5)  # computed from what was not yet rounded
    # the prefix is not rounded: what is lost is about what the base model loses
    lost, base_lost = (second - exact[:, 9:]).norm(), (base_second - base_exact[:, 9:]).norm()
    assert 0 < lost < 3 * base_lost
    generated = generate(model, ids(2), cache_implementation="quantized", cache_config={"backend": backend, **options})
    assert generated.shape == (2, 17)


def test_decoding_from_a_list_of_allowed_tokens():
    model, allowed = adapted(), {0: [5, 6, 7], 1: [40, 41]}
    options = {"prefix_allowed_tokens_fn": lambda row, tokens: allowed[row], "num_beams": 2}

    found = generate(model, ids(2), **options)

    assert torch.equal(found, generate(model, ids(2), use_cache=False, **options))
    for row in (0, 1):
        assert set(found[row, 9:].tolist()) <= set(allowed[row])


def test_a_model_with_a_prefix_makes_drafts():
    model, assistant = adapted(), adapted()

    def generate_with(model):
        return generate(model, ids(), assistant_model=assistant)

    assert torch.equal(generate_with(model), generate(model, ids()))
    with model.disable_adapter():
        assert torch.equal(generate_with(model), generate(model, ids()))


def test_early_layers_make_drafts():
    model = adapted()
    assert torch.equal(generate(model, ids(), assistant_early_exit=2), generate(model, ids()))


def contrastive_search(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    """
    The search of arXiv 2202.06417, as a decoding of one's own: each of the most likely tokens is tried, and the one is
    taken that is likely and leads to a hidden state unlike those before. The cache is repeated and selected from.
    """
    cache = DynamicCache(config=model.config)
    outputs = model(input_ids, past_key_values=cache, output_hidden_states=True)
    context, logits = outputs.hidden_states[-1], outputs.logits
    for _ in range(generation_config.max_new_tokens):
        probabilities, candidates = logits[:, -1].softmax(dim=-1).topk(generation_config.top_k)
        cache.batch_repeat_interleave(generation_config.top_k)
        outputs = model(candidates.reshape(-1, 1), past_key_values=cache, output_hidden_states=True)
        hidden = outputs.hidden_states[-1]
        likeness = torch.cosine_similarity(context, hidden, dim=-1).amax(dim=-1)
        best = (probabilities[0] - likeness).argmax().view(1)
        cache.batch_select_indices(best)
        logits, context = outputs.logits[best], torch.cat([context, hidden[best]], dim=1)
        input_ids = torch.cat([input_ids, candidates[:, best]], dim=1)
    return input_ids


def contrastive_search_without_a_cache(model, input_ids, top_k, max_new_tokens):
    for _ in range(max_new_tokens):
        probabilities, candidates = model(input_ids).logits[0, -1].softmax(dim=-1).topk(top_k)
        tried = torch.cat([input_ids.expand(top_k, -1), candidates[:, None]], dim=1)
        hidden = model(tried, output_hidden_states=True).hidden_states[-1]
        likeness = torch.cosine_similarity(hidden[:, :-1], hidden[:, -1:], dim=-1).amax(dim=-1)
        input_ids = tried[(probabilities - likeness).argmax()][None]
    return input_ids


def test_a_decoding_of_ones_own_repeats_and_selects_from_the_cache():
    model = adapted()
    with torch.no_grad():
        expected = contrastive_search_without_a_cache(model, ids(), 4, 8)
    assert torch.equal(generate(model, ids(), custom_generate=contrastive_search, top_k=4), expected)
    assert not torch.equal(expected, generate(model, ids()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching_generates_what_each_prompt_generates_alone(implementation):
    model = adapted(implementation=implementation)
    prompts = [[5, 6, 7, 8], [9, 10, 11], [3, 4, 5, 6, 7, 8, 9]]
    options = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
    expected = []
    for prompt in prompts:
        tokens = model.generate(input_ids=torch.tensor([prompt]), generation_config=options)
        expected.append(tokens[0, len(prompt) :].tolist())
    batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)  # or else it takes all the memory there is
    batch = partial(
        model.get_base_model().generate_batch,
        inputs=prompts,
        generation_config=options,
        continuous_batching_config=batching,
        warmup=False,
    )
    assert sorted(output.generated_tokens for output in batch().values()) == sorted(expected)
    with model.disable_adapter():
        assert sorted(output.generated_tokens for output in batch().values()) != sorted(expected)


def test_a_compiled_static_cache_decode_is_the_uncompiled_one():
    model, tokens = adapted(), ids(1, 6)
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for cache in caches:
            model(tokens[:, :5], past_key_values=cache)
        expected = model(tokens[:, 5:], past_key_values=caches[0]).logits
        torch.testing.assert_close(
            compiled(tokens[:, 5:], past_key_values=caches[1]).logits, expected, rtol=0, atol=1e-5
        )
