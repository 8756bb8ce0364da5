"""A short prefix in place of a whole text: against plain formulas in float64, scipy, and the base model with the text before it."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch
from models import output_of, prefixed, tiny_model, token_ids, unchanged, word_tokenizer
from transformers import GPTJConfig, GPTJForCausalLM

from peft_prefix_plus import AttentionResidual, initialize_from_text, prefix_key_values
from peft_prefix_plus.starting.compaction import (
    SMALLEST_WEIGHT,
    VALUE_RIDGE,
    Reading,
    compact,
    fitted_values,
    folding_direction,
    log_weights,
)


WORDS = 40
TEXT_TOKENS, KEPT = 26, 8


TEXT = " ".join(f"w{3 + number * 7 % (WORDS - 3)}" for number in range(TEXT_TOKENS))


def drawn_reading(queries: int = 300, tokens: int = 30, dim: int = 8) -> tuple[Reading, torch.Tensor, torch.Tensor]:
    """Queries with a direction in common, as pretrained models have them, and a text's keys and values."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = draw(queries, dim) * 0.5 + 2.0
    key, value = draw(tokens, dim), draw(tokens, 5)
    reading = Reading.of(query, query, key, value, draw(queries), draw(queries, 5))
    return reading, key, value


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, reading: Reading) -> torch.Tensor:
    """The attention over a prefix and the real tokens, which one more key stands for whose score is their log-sum-exp."""
    scores = torch.cat([query @ key.T, reading.real_lse[:, None]], dim=1)
    weights = scores.softmax(dim=1)
    return weights[:, :-1] @ value + weights[:, -1:] * reading.real_output


# ------------------------------------------------------------------------------------------------------ the formulas


def test_a_reading_is_attention_over_the_text_and_the_real_tokens():
    reading, key, value = drawn_reading()
    torch.testing.assert_close(reading.output, attention(reading.query, key, value, reading))


def test_log_weights_are_non_negative_least_squares():
    reading, key, _ = drawn_reading()
    key = key[:10]
    text_share = torch.sigmoid(reading.text_lse - reading.real_lse)
    masses = (reading.query @ key.T - reading.text_lse[:, None]).exp() * text_share[:, None]
    _, least = scipy.optimize.nnls(masses.numpy(), text_share.numpy())
    weights = log_weights(reading, key).exp()
    # multiplicative updates come near a weight of zero, and no further; the error is what counts
    assert (masses @ weights - text_share).norm().item() < 1.02 * least


def test_keys_that_stand_for_several_weigh_as_much_as_all_of_them():
    reading, key, value = drawn_reading()
    copies = torch.arange(30) % 3 == 0
    key, value = key[:10].repeat_interleave(3, dim=0), value[:10].repeat_interleave(3, dim=0)
    reading = Reading.of(reading.query, reading.query, key, value, reading.real_lse, reading.real_output)
    weights = log_weights(reading, key[copies])
    torch.testing.assert_close(weights, torch.full_like(weights, 3.0).log(), rtol=0, atol=1e-2)


def test_no_weight_is_zero_so_that_every_logarithm_is_finite():
    reading, key, _ = drawn_reading()
    far = torch.cat([key[:4], key.new_full((1, key.shape[1]), 50.0)])
    assert log_weights(reading, far).isfinite().all()
    assert log_weights(reading, far).exp()[-1] == pytest.approx(SMALLEST_WEIGHT)


def test_a_log_weight_is_folded_into_a_key_where_the_queries_have_a_direction_in_common():
    query = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query[:, 0] = 3.0
    direction = folding_direction(query)
    # short of 1 by the ridge, which is a thousandth of the mean squared number of a dim, against 9 in this one
    torch.testing.assert_close(query @ direction, torch.ones(200, dtype=torch.float64), rtol=0, atol=2e-3)


def test_values_are_ridge_regression_towards_the_texts_own():
    reading, key, value = drawn_reading()
    key, value = key[:10], value[:10]
    scores = torch.cat([reading.query @ key.T, reading.real_lse[:, None]], dim=1).softmax(dim=1)
    shares, wanted = scores[:, :-1], reading.output - scores[:, -1:] * reading.real_output
    penalty = (VALUE_RIDGE * shares.square().sum(dim=0).mean()).sqrt() * torch.eye(10, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([shares, penalty]), torch.cat([wanted, penalty @ value])).solution
    torch.testing.assert_close(fitted_values(reading, key, value), expected)


def test_compaction_of_repeated_tokens_loses_nearly_nothing():
    reading, key, value = drawn_reading(dim=8)
    reading.query[:, 0] = 3.0
    key, value = key[:10].repeat(4, 1), value[:10].repeat(4, 1)
    reading = Reading.of(reading.query, reading.query, key, value, reading.real_lse, reading.real_output)
    found = compact(reading, key, value, 12)
    assert found[0].shape == (12, 8) and found[1].shape == (12, 5)
    wrong = attention(reading.query, *found, reading) - reading.output
    assert wrong.norm() < 0.05 * (reading.output - reading.real_output).norm()


# --------------------------------------------------------------------------------------------------------- on models


def started(architecture: str, method: str = "attention", tokens: int = KEPT, **fields: object):
    """A model whose prefix starts from the text, and what initialize_from_text returns."""
    model = prefixed(tiny_model(architecture, initializer_range=0.1), num_virtual_tokens=tokens, **fields)
    return model, initialize_from_text(model, word_tokenizer(), TEXT, method=method)


@pytest.mark.parametrize(
    ("architecture", "task_type"),
    [
        *((name, "CAUSAL_LM") for name in ("llama", "qwen3", "gpt_neox", "gemma3", "gpt2", "opt")),
        ("bert", "FEATURE_EXTRACTION"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("bart", "SEQ_2_SEQ_LM"),
    ],
)
def test_every_kind_of_model_and_of_attention_gets_a_prefix_that_is_near_the_text(architecture, task_type):
    model = prefixed(tiny_model(architecture, task_type), task_type=task_type, num_virtual_tokens=KEPT)
    residuals = initialize_from_text(model, word_tokenizer(), TEXT, method="attention")
    assert_near(model, residuals)


def test_a_module_that_writes_attention_out_gets_one_too():
    base = GPTJForCausalLM(GPTJConfig(vocab_size=64, n_embd=32, n_layer=3, n_head=4, rotary_dim=4)).eval()
    model = prefixed(base, num_virtual_tokens=KEPT)
    assert_near(model, initialize_from_text(model, word_tokenizer(), TEXT, method="attention"))


def assert_near(model, residuals):
    """Most of the output is what it is with the text, in every module."""
    assert list(residuals) == list(prefix_key_values(model))
    for residual in residuals.values():
        assert isinstance(residual, AttentionResidual)
        assert 0.0 <= residual.output < 0.9 and 0.0 <= residual.mass < 0.5


@pytest.mark.parametrize("position_free", [True, False])
def test_an_adapter_stays_at_its_positions(position_free, recwarn):
    model, _ = started("llama", position_free=position_free)
    assert model.peft_config["default"].position_free is position_free
    assert not [warning for warning in recwarn if "position-free" in str(warning.message)]


def test_a_prefix_as_long_as_the_text_is_the_text():
    base = tiny_model("llama", initializer_range=0.1)
    ids = token_ids()
    text = torch.tensor([word_tokenizer()(TEXT)["input_ids"]]).expand(len(ids), -1)
    expected = output_of(base, input_ids=torch.cat([text, ids], dim=1))[:, TEXT_TOKENS:]
    model, residuals = started("llama", tokens=TEXT_TOKENS, position_free=False)
    # rounding of float32 in three layers
    torch.testing.assert_close(output_of(model, input_ids=ids), expected, rtol=0, atol=1e-4)
    assert max(max(residual) for residual in residuals.values()) < 1e-4


@pytest.mark.parametrize("position_free", [True, False])
def test_the_output_is_nearer_to_that_with_the_text_than_with_its_first_tokens(position_free):
    base = tiny_model("llama", initializer_range=0.1)
    ids = token_ids(batch=8, tokens=12)
    text = torch.tensor([word_tokenizer()(TEXT)["input_ids"]]).expand(len(ids), -1)
    expected = output_of(base, input_ids=torch.cat([text, ids], dim=1))[:, TEXT_TOKENS:]

    def error(method: str, is_free: bool) -> float:
        model, _ = started("llama", method, position_free=is_free)
        return (output_of(model, input_ids=ids) - expected).norm().item()

    with pytest.warns(UserWarning, match="starts from the first"):
        of_first = error("first", False)
    assert error("attention", position_free) < 0.7 * of_first


@pytest.mark.parametrize(
    ("reparameterization", "sharing"), [("linear", "none"), ("linear", "projection"), ("mlp", "input")]
)
def test_a_reparameterization_with_room_for_it_produces_the_same_prefix(reparameterization, sharing):
    exact, _ = started("llama")
    model, residuals = started("llama", reparameterization=reparameterization, sharing=sharing, encoder_dim=64)
    for name, pair in prefix_key_values(model).items():
        for ours, wanted in zip(pair, prefix_key_values(exact)[name], strict=True):
            assert (ours - wanted).norm() < 1e-3 * wanted.norm()
    _, of_narrow = started("llama", reparameterization=reparameterization, sharing=sharing, encoder_dim=2)
    for name, residual in residuals.items():
        assert residual.output < of_narrow[name].output  # what the encoder cannot produce is in the residual


def test_prompts_are_read_beside_the_text():
    plain, _ = started("llama")
    model = prefixed(tiny_model("llama", initializer_range=0.1), num_virtual_tokens=KEPT)
    initialize_from_text(model, word_tokenizer(), TEXT, method="attention", prompts=["w3 w4 w5", "w9"])
    for name, (_, value) in prefix_key_values(model).items():
        assert not torch.equal(value, prefix_key_values(plain)[name][1])


def test_what_cannot_be_is_an_error_that_changes_nothing():
    model = prefixed(tiny_model(), num_virtual_tokens=KEPT)
    cases = [
        (dict(method="last"), r"`method` must be one of \('first', 'attention'\), got 'last'"),
        (dict(prompts=["w3"]), "`prompts` are read with"),
        (dict(method="attention", prompts=["w3", ""]), "Each of `prompts` must have at least one token; '' has none"),
    ]
    with unchanged(model):
        for arguments, message in cases:
            with pytest.raises(ValueError, match=message):
                initialize_from_text(model, word_tokenizer(), TEXT, **arguments)
        with pytest.raises(ValueError, match="Give a text of at least that many"):
            initialize_from_text(model, word_tokenizer(), "w3", method="attention")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("gating", "has a gate and a softmax of its own"),
        ("decoupled", "is decoupled, and a text's keys and values act through"),
    ],
)
def test_a_prefix_outside_the_softmax_has_nothing_to_match(form, message):
    model = prefixed(tiny_model(), num_virtual_tokens=KEPT, **{form: True})
    with unchanged(model), pytest.raises(ValueError, match=message):
        initialize_from_text(model, word_tokenizer(), TEXT, method="attention")


def test_a_model_that_fails_while_it_reads_leaves_the_adapter_as_it_was():
    model = prefixed(tiny_model("gpt2", max_position_embeddings=TEXT_TOKENS + 10), num_virtual_tokens=KEPT)
    with unchanged(model), pytest.raises(ValueError, match="cannot read a text of 52 tokens"):
        initialize_from_text(model, word_tokenizer(), TEXT, method="attention")
