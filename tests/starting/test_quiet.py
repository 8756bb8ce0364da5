"""The quiet start: how much attention falls on a new prefix, against a softmax in float64, and what it changes."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
import transformers
from models import (
    DECODER_SIZES,
    ENCODERS,
    LOUD,
    PAD_TOKEN,
    QUIET_SHARE,
    SPREAD,
    VOCABULARY,
    adapter_parameters,
    joint_config,
    latent_model,
    loss_of,
    output_of,
    prefix_layers,
    task_inputs,
    tiny_model,
    token_ids,
)
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_prefix_plus import prefix_key_values
from peft_prefix_plus.starting.quiet import quiet_offset


EACH_ENCODER = pytest.mark.parametrize(("reparameterization", "sharing"), [*ENCODERS, ("log", "none")])

PROBE_TOKENS = torch.arange(1, 9)[None] * VOCABULARY // 9
"""The tokens by which a start is measured: eight, from all over the vocabulary."""


def leaning(model: Any) -> Any:
    """Give a model's embeddings a direction in common, as those of pretrained models have: then its queries have one."""
    embeddings = model.get_input_embeddings().weight
    direction = torch.randn(embeddings.shape[1], generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        embeddings.add_((8.0 * embeddings.std() * direction).to(embeddings.dtype))
    return model.eval()


def adapted(model: Any, **fields: Any) -> PeftModel:
    """The model with a new adapter that starts by default."""
    return get_peft_model(model, joint_config(**fields)).eval()


def recorded(model: Any, is_position_free: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    For each layer of a Llama that reads the probe's tokens, of all but the first: s · Q as the prefix meets it and the
    log-sum-exp of the scores over all keys, (kv_heads, group, queries, dim) and (kv_heads, group, queries), in float64.
    """
    found, unrotated = [], []

    def record(module, query, key, value, *args, scaling, **kwargs):
        query, key = query[0].double() * scaling, key[0].double()
        groups = query.shape[0] // key.shape[0]
        scores = torch.einsum("hqd,hkd->hqk", query, key.repeat_interleave(groups, dim=0))
        if is_position_free:
            query = unrotated.pop().double() * scaling
        queries, lse = (each[:, 1:].unflatten(0, (len(key), groups)) for each in (query, scores.logsumexp(-1)))
        found.append((queries, lse))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query_of_call[0], *args, scaling=scaling, **kwargs)

    query_of_call: list[Any] = []

    def attend(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        query_of_call[:] = [query]
        return record(module, query, key, value, key, value, attention_mask, scaling=scaling, **kwargs)

    model = copy.deepcopy(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj.register_forward_hook(
            lambda module, args, output, dim=attention.head_dim: unrotated.append(
                output[0].unflatten(-1, (-1, dim)).transpose(0, 1)
            )
        )
    AttentionInterface.register("recording", attend)
    AttentionMaskInterface.register("recording", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        model.set_attn_implementation("recording")
        with torch.no_grad():
            model(input_ids=PROBE_TOKENS)
    finally:
        AttentionInterface._global_mapping.pop("recording")
        AttentionMaskInterface._global_mapping.pop("recording")
    return found


def shares(queries: torch.Tensor, lse: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The share of the attention of each query that falls on keys (kv_heads, tokens, dim), (kv_heads, group, queries)."""
    of_prefix = torch.einsum("hgqd,htd->hgqt", queries, keys.double()).exp().sum(-1)
    return of_prefix / (of_prefix + lse.exp())


def cost(queries: torch.Tensor, lse: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What keys cost the real ones, the mean over queries of -log(1 - share), (kv_heads,)."""
    return -(1.0 - shares(queries, lse, keys)).log().mean(dim=(1, 2))


def assert_quiet(queries: torch.Tensor, lse: torch.Tensor, keys: torch.Tensor) -> None:
    """Assert that hardly any attention falls on keys, and about the same share of it in every head."""
    assert (shares(queries, lse, keys).mean(dim=(1, 2)) <= LOUD * QUIET_SHARE).all()
    of_means = torch.einsum("hgd,htd->hgt", queries.mean(dim=2), keys.double()).logsumexp(-1) - lse.mean(dim=2)
    # the noise of the keys, of a standard deviation of 1 in all, shifts a head by a part of that
    assert ((of_means - math.log(QUIET_SHARE)).abs() < 3.0).all()


# ------------------------------------------------------------------------------------------- where keys start


@pytest.mark.parametrize("length", [1, 20, 160])
@EACH_ENCODER
def test_hardly_any_attention_falls_on_a_new_prefix(reparameterization, sharing, length):
    base = leaning(tiny_model())
    measured = recorded(base, True)
    model = adapted(base, num_virtual_tokens=length, reparameterization=reparameterization, sharing=sharing)
    for (queries, lse), (key, value) in zip(measured, prefix_key_values(model).values(), strict=True):
        assert_quiet(queries, lse, key)
        assert not value.any()


@pytest.mark.parametrize("length", [1, 20, 160])
@EACH_ENCODER
def test_at_fixed_positions_a_prefix_costs_little_as_far_as_queries_that_turn_allow(
    reparameterization, sharing, length
):
    """Of eight dims that rotate, hardly four keep a direction."""
    base = leaning(tiny_model())
    measured = recorded(base, False)
    fields = dict(reparameterization=reparameterization, sharing=sharing, position_free=False)
    model = adapted(base, num_virtual_tokens=length, **fields)
    for (queries, lse), (key, value) in zip(measured, prefix_key_values(model).values(), strict=True):
        # at least as little as keys of no direction that spread as far
        assert (cost(queries, lse, key) < cost(queries, lse, key - key.mean(dim=1, keepdim=True))).all()
        assert not value.any()


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_layers_that_are_chosen_start_as_quietly(layers):
    base = leaning(tiny_model())
    measured = recorded(base, True)
    model = adapted(base, layers_to_transform=layers, reparameterization="linear", sharing="all")
    for layer, (key, _) in zip(layers, prefix_key_values(model).values(), strict=True):
        assert_quiet(*measured[layer], key)


def test_over_a_base_in_bfloat16_a_prefix_starts_as_quietly():
    base = leaning(tiny_model(dtype=torch.bfloat16))
    measured = recorded(base, True)
    for (queries, lse), (key, _) in zip(measured, prefix_key_values(adapted(base)).values(), strict=True):
        assert_quiet(queries, lse, key)


@pytest.mark.parametrize("position_free", [True, False])
@EACH_ENCODER
def test_keys_are_spread(reparameterization, sharing, position_free):
    base = leaning(tiny_model())
    measured = recorded(base, position_free)
    fields = dict(reparameterization=reparameterization, sharing=sharing, position_free=position_free)
    model = adapted(base, num_virtual_tokens=160, **fields)
    spreads = []
    for (queries, _), (key, _) in zip(measured, prefix_key_values(model).values(), strict=True):
        noise = (key - key.mean(dim=1, keepdim=True)).double()  # what the offset leaves
        spreads.append(torch.einsum("hgqd,htd->hgqt", queries, noise).std(dim=(1, 2, 3)))
        for head in key:
            distances = torch.pdist(head)
            assert distances.min() > 0.05 * distances.median()  # no two are alike
    spreads = torch.stack(spreads)
    if sharing in ("projection", "all"):  # where layers share the keys' noise, the greatest of them has that spread
        spreads = spreads.amax(dim=0)
    assert ((spreads > 0.85 * SPREAD) & (spreads < 1.15 * SPREAD)).all()


@pytest.mark.parametrize("position_free", [True, False])
@pytest.mark.parametrize("fields", [{"gating": True}, {"decoupled": True}], ids=["gated", "decoupled"])
@EACH_ENCODER
def test_forms_that_start_as_the_base_model_have_spread_keys(reparameterization, sharing, fields, position_free):
    base = leaning(tiny_model())
    expected = output_of(base, input_ids=token_ids())
    queries, _ = recorded(base, position_free)[0]
    fields = dict(reparameterization=reparameterization, sharing=sharing, position_free=position_free, **fields)
    if reparameterization == "log" and "gating" in fields:
        pytest.skip("refused: values of zero would leave a closed gate without a gradient")
    model = adapted(base, num_virtual_tokens=160, **fields)
    assert torch.equal(output_of(model, input_ids=token_ids()), expected)
    key, value = next(iter(prefix_key_values(model).values()))
    scores = torch.einsum("hgqd,htd->hgqt", queries, key.double())
    assert 0.5 * SPREAD < scores.square().mean().sqrt() < 2.0 * SPREAD  # the noise is as it was drawn
    assert value.any() == ("gating" in fields)


# ------------------------------------------------------------------------------------------- the offset


def random_queries(mean: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled queries (2 kv_heads, 1, 16, 8) with a mean, log-sum-exps of their scores, and 20 keys."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 1, 16, 8, generator=generator, dtype=torch.float64)
    queries = queries - queries.mean(dim=2, keepdim=True) + mean
    keys = 0.3 * torch.randn(2, 20, 8, generator=generator, dtype=torch.float64)
    return queries, torch.full((2, 1, 16), 3.0, dtype=torch.float64), keys


def test_an_offset_lies_against_the_mean_query():
    queries, lse, keys = random_queries(mean=2.0)
    offset, mean = quiet_offset(queries, lse, keys), queries.mean(dim=(1, 2))
    torch.testing.assert_close(F.cosine_similarity(offset, -mean, dim=-1), torch.ones(2, dtype=torch.float64))
    wanted = torch.full((2,), 3.0 + math.log(QUIET_SHARE / 20), dtype=torch.float64)
    torch.testing.assert_close((offset * mean).sum(-1), wanted, rtol=0.02, atol=0.0)


def test_heads_of_a_group_that_look_different_ways_all_give_the_same_share():
    """The mean over all queries of the group lies against the head whose queries are the smaller."""
    queries, lse, keys = random_queries(mean=0.0)
    first, second = torch.zeros(2, 8, dtype=torch.float64)
    first[0], second[0], second[1] = 12.0, -1.2, 2.7
    queries = 0.2 * torch.cat([queries, queries], dim=1) + torch.stack([first, second])[:, None]
    assert (queries.mean(dim=(1, 2)) @ second < 0).all()
    lse = torch.stack([lse[:, 0], lse[:, 0] + 1.0], dim=1)
    keys = 0.1 * keys
    offset = quiet_offset(queries, lse, keys)
    found = torch.einsum("hgd,hd->hg", queries.mean(dim=2), offset)
    wanted = torch.tensor([[3.0, 4.0]] * 2, dtype=torch.float64) + math.log(QUIET_SHARE / 20)
    assert ((found - wanted).abs() < 1.0).all()  # for the ridge
    assert (shares(queries, lse, keys + offset[:, None]).mean(dim=(1, 2)) <= LOUD * QUIET_SHARE).all()


def test_queries_without_a_direction_leave_the_keys_where_they_cost_least():
    queries, lse, keys = random_queries(mean=0.2)
    offset, mean = quiet_offset(queries, lse, keys), queries.mean(dim=(1, 2))
    whole = (3.0 + math.log(QUIET_SHARE / 20)) / 1.01 * mean / mean.square().sum(-1, keepdim=True)  # 1.01 is the ridge
    found = cost(queries, lse, keys + offset[:, None])
    assert (shares(queries, lse, keys + whole[:, None]).mean(dim=(1, 2)) > LOUD * QUIET_SHARE).all()
    along = [cost(queries, lse, keys + float(length) * whole[:, None]) for length in torch.linspace(0, 1, 201)]
    torch.testing.assert_close(found, torch.stack(along).amin(dim=0), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_queries_whose_mean_is_zero_leave_the_keys_where_they_are(size):
    queries, lse, keys = random_queries(mean=0.0)
    queries, lse = size * torch.cat([queries, -queries], dim=2), lse.repeat(1, 1, 2)
    found = shares(queries, lse, keys + quiet_offset(queries, lse, keys)[:, None])
    torch.testing.assert_close(found, shares(queries, lse, keys))


def test_queries_that_are_not_finite_leave_the_keys_where_they_are():
    queries, lse, keys = random_queries(mean=2.0)
    queries[0, 0, 3, 1] = float("nan")
    assert not quiet_offset(queries, lse, keys).any()


# ------------------------------------------------------------------------------------------- what it changes


def gptj() -> Any:
    sizes: dict[str, Any] = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, pad_token_id=PAD_TOKEN)
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(vocab_size=VOCABULARY, **sizes))


def bloom() -> Any:
    sizes: dict[str, Any] = dict(hidden_size=32, n_layer=2, n_head=4, pad_token_id=PAD_TOKEN)
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=VOCABULARY, **sizes))


MODELS: dict[str, tuple[Any, str]] = {
    "llama, grouped heads": (tiny_model, "CAUSAL_LM"),
    "latent attention": (latent_model, "CAUSAL_LM"),
    "learned positions": (functools.partial(tiny_model, "gpt2"), "CAUSAL_LM"),
    "half rotated": (functools.partial(tiny_model, "gpt_neox"), "CAUSAL_LM"),
    "encoder": (functools.partial(tiny_model, "bert", "TOKEN_CLS"), "TOKEN_CLS"),
    "encoder-decoder, position bias": (functools.partial(tiny_model, "t5", "SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM"),
    "encoder-decoder": (functools.partial(tiny_model, "bart", "SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM"),
    "inline, rotated": (gptj, "CAUSAL_LM"),
    "inline, ALiBi": (bloom, "CAUSAL_LM"),
}


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_a_new_prefix_is_hardly_another(name, length):
    build, task_type = MODELS[name]
    base = leaning(build())
    inputs = task_inputs(task_type, tokens=8)
    expected, loss = output_of(base, **inputs).log_softmax(-1), loss_of(base, **inputs).item()
    model = adapted(base, num_virtual_tokens=length, task_type=task_type)
    found = output_of(model, **inputs).log_softmax(-1)
    assert not torch.equal(found, expected)  # it takes part
    # the tokens are not those of the probe, and the first ones have few others to look at
    assert F.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean() < 5e-3
    assert loss_of(model, **inputs).item() < 1.02 * loss


TEXT_TOKENS = 24


def text(rows: int, seed: int) -> torch.Tensor:
    """Token ids of a language in which four tokens can follow each, one of them half of the time."""
    successors = torch.randint(5, VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, 1), generator=generator)
    odds = torch.tensor([0.5, 0.3, 0.1, 0.1])
    for _ in range(TEXT_TOKENS - 1):
        chosen = odds.expand(rows, -1).multinomial(1, generator=generator)
        ids = torch.cat([ids, successors[ids[:, -1:], chosen[:, None]].flatten(1)], dim=1)
    return ids


@functools.cache
def trained(leans: bool) -> Any:
    """A tiny Llama that has learned a language a little; its embeddings had a direction in common, or had none."""
    model = leaning(tiny_model()) if leans else tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2 if leans else 5e-3)
        for step in range(120 if leans else 80):
            optimizer.zero_grad()
            ids = text(8, seed=step + 1)
            loss_of(model, input_ids=ids, labels=ids).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize(("leans", "length"), [(True, 1), (True, 20), (True, 160), (False, 1), (False, 20)])
@EACH_ENCODER
def test_a_trained_model_is_not_harmed(reparameterization, sharing, leans, length):
    ids = text(8, seed=0)
    base = trained(leans)
    with torch.no_grad():
        loss = loss_of(base, input_ids=ids, labels=ids).item()
        assert loss < 3.4  # it has learned: of 59 tokens at random the loss is 4.1
        fields = dict(num_virtual_tokens=length, reparameterization=reparameterization, sharing=sharing)
        model = adapted(copy.deepcopy(base), **fields)
        assert loss_of(model, input_ids=ids, labels=ids).item() < 1.02 * loss


# ------------------------------------------------------------------------------------------- without weights


def test_on_the_meta_device_a_prefix_starts_at_random_with_a_warning():
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER_SIZES))
    with pytest.warns(UserWarning, match="has no weights yet .* starts at random"):
        model = adapted(base, prefix_scaling=1.0)
    assert all(parameter.is_meta for parameter in adapter_parameters(model).values())


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
@EACH_ENCODER
def test_what_is_loaded_does_not_depend_on_the_start(reparameterization, sharing, options, tmp_path):
    model = adapted(leaning(tiny_model()), reparameterization=reparameterization, sharing=sharing)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(seed=5), tmp_path, **options)
    assert len(prefix_layers(loaded)) == 3
    for name, pair in prefix_key_values(loaded).items():
        assert all(torch.equal(*both) for both in zip(pair, prefix_key_values(model)[name], strict=True))
