"""`reparameterization="log"`: the prefix of its formula, a start that is kept apart, and steps that shrink with the distance."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from models import adapter_parameters, output_of, prefix_layers, tiny_model, token_ids
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_prefix_plus as package
from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.encoders import ENCODERS, KVShape, LogEncoder


KNEE, REACH = 0.002, 0.004
EACH_FORM = pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "joint"])


def log(**fields: object) -> PrefixPlusConfig:
    return PrefixPlusConfig(
        **{"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "reparameterization": "log", **fields}
    )


def learned(decoupled: bool) -> PeftModel:
    """The tiny Llama with an adapter whose parameters have moved."""
    model = get_peft_model(tiny_model(), log(decoupled=decoupled)).eval()
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith((".key", ".value")):
                parameter.normal_(std=0.1)
    return model


def damped(parameter: torch.Tensor) -> torch.Tensor:
    distance = parameter.square().mean().sqrt()
    return parameter / distance * REACH * torch.log(1 + distance / KNEE)


def by_formula(
    key: torch.Tensor, value: torch.Tensor, offset: torch.Tensor, amplitude: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """E_K and E_V in float64, number by number."""
    heads, tokens, dim = key.shape
    keys, values = (damped(each.double()) for each in (key, value))
    for head in range(heads):
        for token in range(tokens):
            for place in range(dim):
                number = (head * dim + place + 1) * 0x9E3779 % 2**24
                number = (number ^ number >> 12) * 0x85EBCB % 2**24
                number = number ^ number >> 11 | 1
                wave = math.sqrt(2) * math.sin(math.tau * ((token + 1) * number / 2**24 % 1))
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
    encoder = LogEncoder(3, KVShape(2, 4, 5)).double()
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
    model = get_peft_model(tiny_model(), log(decoupled=decoupled, num_virtual_tokens=160))
    plain = get_peft_model(tiny_model(), log(decoupled=decoupled, num_virtual_tokens=160, reparameterization="none"))
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
    encoder = LogEncoder(tokens, KVShape(2, 64, 64))
    encoder.initialize_parameters(1.0, 0.0)
    key, _ = encoder()
    directions = torch.nn.functional.normalize(key.detach(), dim=-1)
    cosines = directions @ directions.transpose(1, 2) - torch.eye(tokens)
    assert cosines.abs().max() < 0.6 and cosines.square().mean().sqrt() < 0.15  # at random: 1 / 8


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2, 1e-1])
def test_the_distance_from_the_start_is_a_logarithm_of_what_steps_add_up_to(rate):
    encoder = LogEncoder(3, KVShape(2, 4, 4))
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
        assert 0.1 * 40 * rate < distance < 1.01 * 40 * rate
        expected = torch.full_like(before, factor * REACH * math.log1p(distance / KNEE))
        torch.testing.assert_close(states.detach() - before, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_steps_from_the_start_have_a_finite_slope_in_every_dtype(dtype):
    encoder = LogEncoder(3, KVShape(2, 4, 4))
    encoder.initialize_parameters(1.0, 0.0)
    encoder.to(dtype)
    sum(states.sum() for states in encoder()).backward()
    for parameter in (encoder.key, encoder.value):
        assert not parameter.any()
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, REACH / KNEE), rtol=1e-6, atol=0.0)
    for size in (1e-4, 1e-2, 1.0):
        with torch.no_grad():
            encoder.value.fill_(size)
        expected = torch.full_like(encoder.value, REACH * math.log1p(size / KNEE))
        torch.testing.assert_close(encoder()[1], expected, rtol=0.02 if dtype.itemsize == 2 else 1e-5, atol=0.0)


def test_numbers_of_a_layer_keep_their_proportions():
    encoder = LogEncoder(3, KVShape(2, 4, 4))
    encoder.initialize_parameters(1.0, 0.0)
    with torch.no_grad():
        encoder.value.normal_(std=0.3)
    value = encoder()[1].detach()
    torch.testing.assert_close(value / value.norm(), encoder.value.detach() / encoder.value.norm())


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
        encoder = LogEncoder(2_000, KVShape(2, 16, 16))
        encoder.initialize_parameters(1.0, 0.0)
        starts.append(encoder()[0].detach())
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])
    half = encoder.to(torch.bfloat16)()[0]
    torch.testing.assert_close(half.float(), starts[2], rtol=0.02, atol=0.02)  # bfloat16 has 8 bits


def test_what_was_computed_in_inference_serves_training_and_other_dtypes():
    encoder = LogEncoder(3, KVShape(2, 4, 4))
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


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert not any(
            isinstance(each, torch.Tensor) and each.dtype == torch.float64
            for each in tree_leaves((args, kwargs, result))
        ), func
        return result


@pytest.mark.parametrize("reparameterization", list(ENCODERS))
def test_a_step_needs_no_float64(reparameterization):
    model = get_peft_model(tiny_model(), log(reparameterization=reparameterization))
    with WithoutFloat64():
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()


def test_weight_decay_leaves_the_start():
    encoder = LogEncoder(3, KVShape(2, 4, 4))
    encoder.initialize_parameters(1.0, 0.0)
    encoder.key_start.offset.data.normal_()
    expected = [states.detach() for states in encoder()]
    optimizer = torch.optim.AdamW(encoder.key_start.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(200):
        sum(states.sum() for states in encoder()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert encoder.key_start.unit.item() < 0.9
    torch.testing.assert_close(encoder()[0].detach(), expected[0])


def test_functional_transforms_leave_nothing_behind():
    model = get_peft_model(tiny_model(), log()).eval()
    parameters = {name: each.detach() for name, each in adapter_parameters(model).items()}
    ids = token_ids()

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, kwargs={"input_ids": ids, "labels": ids}).loss

    gradients = torch.func.grad(loss)(parameters)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert torch.equal(output_of(copy.deepcopy(model), input_ids=ids), output_of(model, input_ids=ids))


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
        log(**fields)


def test_given_keys_and_values_are_refused_and_change_nothing():
    model = learned(decoupled=False)
    before = package.prefix_key_values(model)
    with pytest.raises(ValueError, match=r"\(LogEncoder\) cannot be fitted.*Use reparameterization='none'"):
        package.initialize_from_key_values(model, {name: (key + 1, value) for name, (key, value) in before.items()})
    for name, pair in package.prefix_key_values(model).items():
        assert all(map(torch.equal, pair, before[name]))
