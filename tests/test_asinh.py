"""`reparameterization="asinh"`: the prefix of its formula, a start that is kept apart, and steps that shrink with the distance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from models import adapter_parameters, output_of, prefix_layers, tiny_model, token_ids
from peft import PeftModel, get_peft_model

import peft_prefix_plus as package
from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.encoders import AsinhEncoder, KVShape


KNEE = 0.02
EACH_FORM = pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "joint"])


def asinh(**fields: object) -> PrefixPlusConfig:
    return PrefixPlusConfig(
        **{"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "reparameterization": "asinh", **fields}
    )


def learned(decoupled: bool) -> PeftModel:
    """The tiny Llama with an adapter whose parameters have moved."""
    model = get_peft_model(tiny_model(), asinh(decoupled=decoupled)).eval()
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith((".key", ".value")):
                parameter.normal_(std=0.1)
    return model


def by_formula(
    key: torch.Tensor, value: torch.Tensor, offset: torch.Tensor, amplitude: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """E_K and E_V in float64, number by number."""
    heads, tokens, dim = key.shape
    keys, values = (KNEE * torch.arcsinh(each.double() / KNEE) for each in (key, value))
    for head in range(heads):
        for token in range(tokens):
            for place in range(dim):
                frequency = math.pi * ((head * dim + place + 1) ** 3 * ((math.sqrt(5) - 1) / 2) % 1)
                wave = math.sqrt(2) * math.sin((token + 1) * frequency)
                keys[head, token, place] += (
                    offset[head, place].double() + amplitude[head, place].double() * wave
                ).item()
    return keys, values


@EACH_FORM
def test_the_prefix_is_that_of_the_formula(decoupled):
    for layer in prefix_layers(learned(decoupled)).values():
        encoder = layer.encoder("default")
        assert encoder.key_start.amplitude.any()
        expected = by_formula(encoder.key, encoder.value, encoder.key_start.offset, encoder.key_start.amplitude)
        for found, states, factor in zip(encoder(), expected, encoder.scaling.values, strict=True):
            torch.testing.assert_close(found.double(), states * factor, rtol=1e-5, atol=1e-6)  # float32


def test_gradients_are_those_of_the_formula_and_the_start_gets_none():
    encoder = AsinhEncoder(3, KVShape(2, 4, 5)).double()
    encoder.initialize_parameters(0.2, 0.0)
    with torch.no_grad():
        encoder.key.normal_(std=0.02)
        encoder.value.normal_(std=0.02)
    parameters = (encoder.key, encoder.value)
    assert torch.autograd.gradcheck(lambda *_: encoder(), parameters, eps=1e-7)
    sum(states.square().sum() for states in encoder()).backward()
    for parameter in encoder.key_start.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@EACH_FORM
def test_it_starts_where_the_other_encoders_start(decoupled):
    expected = output_of(tiny_model(), input_ids=token_ids())
    model = get_peft_model(tiny_model(), asinh(decoupled=decoupled, num_virtual_tokens=160))
    plain = get_peft_model(tiny_model(), asinh(decoupled=decoupled, num_virtual_tokens=160, reparameterization="none"))
    if decoupled:
        assert torch.equal(output_of(model, input_ids=token_ids()), expected)
    pairs = zip(*(package.prefix_key_values(each).values() for each in (model, plain)), strict=True)
    for (key, value), (plain_key, plain_value) in pairs:
        assert not value.any() and not plain_value.any()
        spreads = [
            each.std(dim=1).norm(dim=-1) for each in (key, plain_key)
        ]  # the norm of what differs between tokens
        assert ((spreads[0] / spreads[1] - 1).abs() < 0.3).all()


@pytest.mark.parametrize("tokens", [4, 20, 128])
def test_tokens_start_apart(tokens):
    encoder = AsinhEncoder(tokens, KVShape(2, 64, 64))
    encoder.initialize_parameters(1.0, 0.0)
    key, _ = encoder()
    directions = torch.nn.functional.normalize(key.detach(), dim=-1)
    cosines = directions @ directions.transpose(1, 2) - torch.eye(tokens)
    assert cosines.abs().max() < 0.5 and cosines.square().mean().sqrt() < 0.15  # at random: 1 / 8


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2, 1e-1])
def test_steps_shrink_with_the_distance_from_the_start(rate):
    encoder = AsinhEncoder(3, KVShape(2, 4, 4))
    encoder.initialize_parameters(1.0, 0.0)
    encoder.scaling.set(8.0, 2.0)
    start = [states.detach() for states in encoder()]
    optimizer = torch.optim.Adam([encoder.key, encoder.value], lr=rate)
    for _ in range(40):
        sum(-states.sum() for states in encoder()).backward()  # whatever a gradient's size, Adam's steps are the rate
        optimizer.step()
        optimizer.zero_grad()
    travelled = torch.stack([encoder.key.mean(), encoder.value.mean()])
    for states, before, factor, distance in zip(encoder(), start, (8.0, 2.0), travelled.tolist(), strict=True):
        assert 0.2 * 40 * rate < distance < 1.01 * 40 * rate
        expected = torch.full_like(before, factor * KNEE * math.asinh(distance / KNEE))
        torch.testing.assert_close(states.detach() - before, expected, rtol=1e-3, atol=1e-5)


@EACH_FORM
def test_what_has_been_learned_is_saved_loaded_and_flattened(decoupled, tmp_path: Path):
    model = learned(decoupled)
    expected = output_of(model, input_ids=token_ids())
    assert (output_of(tiny_model(), input_ids=token_ids()) - expected).abs().max() > 1e-3
    trainable = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
    model.save_pretrained(tmp_path, state_dict=trainable)  # as tools do that leave out what is frozen
    torch.manual_seed(5)  # another start
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(output_of(loaded, input_ids=token_ids()), expected)
    package.flatten(loaded)
    assert loaded.peft_config["default"].reparameterization == "none"
    assert torch.equal(output_of(loaded, input_ids=token_ids()), expected)


def test_the_start_depends_on_the_seed_and_a_long_prefix_keeps_it_in_half_precision():
    starts = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        encoder = AsinhEncoder(2_000, KVShape(2, 16, 16))
        encoder.initialize_parameters(1.0, 0.0)
        starts.append(encoder()[0].detach())
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])
    half = encoder.to(torch.bfloat16)()[0]
    torch.testing.assert_close(half.float(), starts[2], rtol=0.02, atol=0.02)  # bfloat16 has 8 bits


def test_what_was_computed_in_inference_serves_training_and_other_dtypes():
    encoder = AsinhEncoder(3, KVShape(2, 4, 4))
    encoder.initialize_parameters(1.0, 0.0)
    with torch.inference_mode():
        expected = [states.clone() for states in encoder()]
    sum(states.sum() for states in encoder()).backward()
    assert encoder.key.grad is not None and encoder.key.grad.all()
    for dtype in (torch.float64, torch.float32):
        encoder.to(dtype)
        for found, states in zip(encoder(), expected, strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), states)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gating": True}, "`gating` is True"),
        ({"init_weights": False}, "`init_weights` is False"),
        ({"init_weights": "random"}, "`init_weights` is 'random'"),
        ({"init_weights": "activations"}, "`init_weights` is 'activations'"),
    ],
)
def test_a_start_with_values_is_refused(fields, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*Use reparameterization='none'"):
        asinh(**fields)


def test_given_keys_and_values_are_refused_and_change_nothing():
    model = learned(decoupled=False)
    before = package.prefix_key_values(model)
    with pytest.raises(NotImplementedError, match="AsinhEncoder cannot be fitted"):
        package.initialize_from_key_values(model, {name: (key + 1, value) for name, (key, value) in before.items()})
    for name, pair in package.prefix_key_values(model).items():
        assert all(map(torch.equal, pair, before[name]))
