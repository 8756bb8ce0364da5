"""How a prefix starts, and on which scale it is learned: against keys and values recorded in the base model."""

from __future__ import annotations

import copy
import math

import pytest
import tiny_models
import torch
import transformers
from models import (
    DECODER_SIZES,
    DECOUPLED_SCALES,
    EACH_ENCODER,
    ENCODERS,
    JOINT_SCALES,
    SCALING_SIZE,
    VOCABULARY,
    adapter_parameters,
    joint_config,
    latent_model,
    output_of,
    prefix_layers,
    prefixed,
    tiny_model,
    token_ids,
    unchanged,
    word_tokenizer,
)
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerFast
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_prefix_plus import (
    PrefixPlusConfig,
    flatten,
    initialize_from_key_values,
    initialize_from_text,
    prefix_key_values,
)


def uneven_model(**options: object) -> torch.nn.Module:
    """A tiny Llama whose second layer has keys eight times as large as the others', and values a fourth of them."""
    model = tiny_model(**options)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(8.0)
        model.model.layers[1].self_attn.v_proj.weight.mul_(0.25)
    return model


def own_key_values(
    model: torch.nn.Module, ids: torch.Tensor, **inputs: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values (heads, tokens, dim) of each layer for one text (1, tokens), from an attention function."""
    found = []

    def record(module, query, key, value, *args, **kwargs):
        found.append((key[0], value[0]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)

    AttentionInterface.register("recording", record)
    AttentionMaskInterface.register("recording", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        model = copy.deepcopy(model)
        model.set_attn_implementation("recording")
        with torch.no_grad():
            model(input_ids=ids, **inputs)
    finally:
        AttentionInterface._global_mapping.pop("recording")
        AttentionMaskInterface._global_mapping.pop("recording")
    return found


def spread_tokens(tokens: int) -> torch.Tensor:
    """Token ids (1, tokens), evenly from all over the vocabulary."""
    return torch.tensor([[(index + 1) * VOCABULARY // (tokens + 1) for index in range(tokens)]])


def median_std(states: torch.Tensor) -> float:
    """The median over tokens of the standard deviation of a token's numbers, states being (heads, tokens, dim)."""
    return torch.stack([states[:, token].flatten().std() for token in range(states.shape[1])]).median().item()


def measured(model: torch.nn.Module) -> list[tuple[float, float]]:
    """The spread of each layer's keys and of its values."""
    return [(median_std(key), median_std(value)) for key, value in own_key_values(model, spread_tokens(8))]


def next_power_of_two(number: float) -> float:
    return min((2.0**exponent for exponent in range(-20, 20)), key=lambda power: abs(math.log(power / number)))


def scalings(model: torch.nn.Module) -> list[tuple[float, float]]:
    """The factors of each layer on keys and on values."""
    return [tuple(layer.encoder("default").scaling.values.tolist()) for layer in prefix_layers(model).values()]


# --------------------------------------------------------------------------------------------------- the scale


@pytest.mark.parametrize(
    ("fields", "scales"),
    [({}, JOINT_SCALES), ({"gating": True}, JOINT_SCALES), ({"decoupled": True}, DECOUPLED_SCALES)],
)
@pytest.mark.parametrize(
    "build",
    [tiny_model, uneven_model, latent_model, lambda: tiny_model("gpt2")],
    ids=["llama", "uneven", "mla", "gpt2"],
)
def test_the_scale_is_the_power_of_two_next_to_the_modules_own_spread(build, fields, scales):
    model = build()
    expected = [
        tuple(s * next_power_of_two(std) for s, std in zip(scales, stds, strict=True)) for stds in measured(model)
    ]

    assert scalings(prefixed(model, **fields)) == expected


def test_layers_of_different_spread_have_scales_of_their_own():
    plain, uneven = scalings(prefixed(tiny_model())), scalings(prefixed(uneven_model()))

    assert uneven[0] == plain[0]
    assert uneven[1] == (plain[1][0] * 8, plain[1][1] / 4)


@pytest.mark.parametrize(("is_decoupled", "share"), [(False, 1 / 4), (True, 1 / 8)])
@EACH_ENCODER
def test_a_projection_has_a_fixed_share_of_the_scale(reparameterization, sharing, is_decoupled, share):
    fields = dict(reparameterization=reparameterization, sharing=sharing, decoupled=is_decoupled)
    share = share if reparameterization in ("linear", "mlp") else 1.0
    direct = scalings(prefixed(uneven_model(), reparameterization="none", decoupled=is_decoupled))
    assert scalings(prefixed(uneven_model(), **fields)) == [(share * key, share * value) for key, value in direct]


@pytest.mark.parametrize("scaling", [0.1, 1.0, 300.0])
def test_a_given_scale_is_that_of_keys_and_values_everywhere(scaling):
    model = prefixed(uneven_model(), prefix_scaling=scaling)
    for layer in prefix_layers(model).values():
        assert torch.equal(layer.encoder("default").scaling.values, torch.tensor([scaling, scaling]))


def given(model: torch.nn.Module, size: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values for an adapter to start from: the keys of about this size, the values four times as large."""
    torch.manual_seed(5)
    return {
        name: (torch.randn_like(key) * size, torch.randn_like(value) * 4 * size)
        for name, (key, value) in prefix_key_values(model).items()
    }


@pytest.mark.parametrize(
    ("fields", "scale"), [({}, 8), ({"gating": True}, 8), ({"reparameterization": "mlp", "encoder_dim": 40}, 2)]
)
def test_given_keys_and_values_bring_a_scale_of_their_own(fields, scale):
    model = prefixed(uneven_model(), num_virtual_tokens=9, **fields)
    for size in (8.0, 0.25, 8.0):  # twice is as once
        key_values = given(model, size)
        initialize_from_key_values(model, key_values)
        expected = [
            tuple(scale * next_power_of_two(median_std(part)) for part in pair) for pair in key_values.values()
        ]
        assert scalings(model) == expected
        assert_same_start(prefix_key_values(model), key_values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fields", [{"decoupled": True, "reparameterization": "none"}, {"prefix_scaling": 3.0}])
def test_given_keys_and_values_leave_a_scale_that_is_not_for_them(fields):
    model = prefixed(uneven_model(), **fields)
    before = scalings(model)
    initialize_from_key_values(model, given(model, 8.0))
    assert scalings(model) == before


def test_a_start_that_fails_leaves_the_scale(monkeypatch):
    model = prefixed(uneven_model())
    before = scalings(model)
    monkeypatch.setattr("peft_prefix_plus.starting.initialization.fit", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        initialize_from_key_values(model, given(model, 8.0))
    assert scalings(model) == before


STARTS = (True, "random", "zero", "activations")
SHARED_PROJECTIONS = [(encoder, sharing) for encoder, sharing in ENCODERS if sharing in ("projection", "all")]
OWN_PROJECTIONS = [each for each in ENCODERS if each not in SHARED_PROJECTIONS]
OVER_OWN_PROJECTIONS = pytest.mark.parametrize(("reparameterization", "sharing"), OWN_PROJECTIONS)
OVER_SHARED_PROJECTIONS = pytest.mark.parametrize(("reparameterization", "sharing"), SHARED_PROJECTIONS)


def start_under(prefix_scaling: float | None, **fields: object) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values that a prefix starts with, drawn from the same random numbers under every scale."""
    torch.manual_seed(3)
    return prefix_key_values(prefixed(tiny_model(), prefix_scaling=prefix_scaling, encoder_dim=40, **fields))


def assert_same_start(one: dict, other: dict, **tolerances: float) -> None:
    assert one.keys() == other.keys()
    for name, pair in one.items():
        for ours, theirs in zip(pair, other[name], strict=True):
            torch.testing.assert_close(ours, theirs, **tolerances)


@pytest.mark.parametrize("init_weights", STARTS)
@EACH_ENCODER
def test_a_start_is_the_same_under_every_given_scale(reparameterization, sharing, init_weights):
    fields = dict(reparameterization=reparameterization, sharing=sharing, init_weights=init_weights)
    assert_same_start(start_under(8.0, **fields), start_under(0.25, **fields), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init_weights", STARTS)
@OVER_OWN_PROJECTIONS
def test_a_start_is_the_same_under_the_measured_scales(reparameterization, sharing, init_weights):
    fields = dict(reparameterization=reparameterization, sharing=sharing, init_weights=init_weights)
    assert_same_start(start_under(None, **fields), start_under(0.25, **fields), rtol=1e-3, atol=1e-4)


# Of a start by default, tests/starting/test_quiet.py says where each layer's keys are; the activations of all layers cannot
# be produced from one input.
@pytest.mark.parametrize(
    ("init_weights", "sharing"), [("zero", "projection"), ("zero", "all"), ("activations", "projection")]
)
@pytest.mark.parametrize("reparameterization", ["linear", "mlp"])
def test_under_the_measured_scales_a_shared_projection_gives_each_layer_the_start_it_asks_for(
    reparameterization, sharing, init_weights
):
    fields = dict(reparameterization=reparameterization, sharing=sharing, init_weights=init_weights)
    assert_same_start(start_under(None, **fields), start_under(0.25, **fields), rtol=1e-3, atol=1e-4)


@OVER_SHARED_PROJECTIONS
def test_under_the_measured_scales_a_shared_random_start_is_larger_or_smaller_by_the_rounding(
    reparameterization, sharing
):
    """Layers share what is drawn, and each has a scale of its own on it: the power of two next to its spread."""
    fields = dict(reparameterization=reparameterization, sharing=sharing, init_weights="random")
    measured_start, given_start = start_under(None, **fields), start_under(0.25, **fields)
    for name, pair in given_start.items():
        for ours, theirs in zip(measured_start[name], pair, strict=True):
            assert 0.4 < ours.std() / theirs.std() < 2.5


def random_start(scaling: float | None, **fields: object) -> list[tuple[float, torch.Tensor]]:
    """The keys, and the values, of each layer of a long prefix, with the spread of the module's own."""
    base = uneven_model()
    spreads = [std for stds in measured(base) for std in stds]
    model = prefixed(base, num_virtual_tokens=200, encoder_dim=60, prefix_scaling=scaling, **fields)
    return list(zip(spreads, (each for pair in prefix_key_values(model).values() for each in pair), strict=True))


def assert_spread(spread: float, states: torch.Tensor, tolerance: float) -> None:
    assert 1 / tolerance < states.std().item() / spread < tolerance
    assert states.mean().abs() < 0.15 * spread


@pytest.mark.parametrize("init_weights", [False, "random"])
@pytest.mark.parametrize("scaling", [None, 1.0])
@OVER_OWN_PROJECTIONS
def test_a_random_start_has_the_spread_of_the_modules_own_keys_and_values(
    reparameterization, sharing, scaling, init_weights
):
    fields = dict(reparameterization=reparameterization, sharing=sharing, init_weights=init_weights)
    for spread, states in random_start(scaling, **fields):
        assert_spread(spread, states, 1.15)


@pytest.mark.parametrize("scaling", [None, 1.0])
@OVER_SHARED_PROJECTIONS
def test_a_shared_projection_is_drawn_for_the_first_layer(reparameterization, sharing, scaling):
    fields = dict(reparameterization=reparameterization, sharing=sharing, init_weights="random")
    keys, values, *_ = random_start(scaling, **fields)
    assert_spread(*keys, 1.15)
    assert_spread(*values, 1.15)


@OVER_SHARED_PROJECTIONS
def test_the_measured_scales_give_layers_that_share_a_projection_their_own_spread(reparameterization, sharing):
    fields = dict(reparameterization=reparameterization, sharing=sharing, init_weights="random")
    for spread, states in random_start(None, **fields):
        assert_spread(spread, states, 2.0 * 1.15)  # up to the rounding of two scales


@EACH_ENCODER
def test_the_scale_is_saved_and_loaded_into_a_base_whose_weights_changed(reparameterization, sharing, tmp_path):
    model = prefixed(uneven_model(), reparameterization=reparameterization, sharing=sharing)
    model.save_pretrained(tmp_path)
    expected = prefix_key_values(model)

    changed = tiny_model(seed=5, initializer_range=0.5)
    assert scalings(prefixed(copy.deepcopy(changed))) != scalings(model)
    stored = [
        tensor for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items() if "scaling" in name
    ]
    assert [tuple(tensor.shape) for tensor in stored] == [(SCALING_SIZE,)] * 3
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(changed), tmp_path, **options)
        assert scalings(loaded) == scalings(model)
        for name, pair in prefix_key_values(loaded).items():
            assert all(torch.equal(*both) for both in zip(pair, expected[name], strict=True))


@EACH_ENCODER
def test_flatten_folds_the_scale_in(reparameterization, sharing, tmp_path):
    model = prefixed(uneven_model(), reparameterization=reparameterization, sharing=sharing)
    expected = output_of(model, input_ids=token_ids())
    flatten(model)

    assert scalings(model) == [(1.0, 1.0)] * 3
    assert model.peft_config["default"].prefix_scaling == 1.0
    assert torch.equal(output_of(model, input_ids=token_ids()), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(uneven_model(), tmp_path)
    assert torch.equal(output_of(loaded, input_ids=token_ids()), expected)


@pytest.mark.parametrize("fields", [{}, {"init_weights": "activations"}, {"decoupled": True}])
@EACH_ENCODER
def test_a_base_on_the_meta_device_gets_an_adapter_that_a_checkpoint_can_fill(
    reparameterization, sharing, fields, tmp_path
):
    fields = dict(num_virtual_tokens=3, reparameterization=reparameterization, sharing=sharing, **fields)
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER_SIZES))
    model = get_peft_model(base, joint_config(**fields))
    assert all(tensor.is_meta for tensor in model.state_dict().values())

    whole = get_peft_model(tiny_model(), joint_config(**fields)).eval()
    model.load_state_dict(whole.state_dict(), assign=True)
    assert scalings(model) == scalings(whole)


@pytest.mark.parametrize("init_weights", [True, "activations"])
@EACH_ENCODER
def test_an_adapter_can_be_made_empty_and_filled_by_a_checkpoint(reparameterization, sharing, init_weights, tmp_path):
    fields = dict(reparameterization=reparameterization, sharing=sharing, init_weights=init_weights)
    model = prefixed(tiny_model(), **fields)
    model.save_pretrained(tmp_path)

    config = PrefixPlusConfig.from_pretrained(tmp_path)
    empty = get_peft_model(tiny_model(), config, low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in adapter_parameters(empty).values())
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(output_of(loaded, input_ids=token_ids()), output_of(model, input_ids=token_ids()))


@pytest.mark.parametrize("autocast", [True, False])
def test_over_a_base_in_bfloat16_the_scale_is_exact(autocast):
    config = joint_config(num_virtual_tokens=3, prefix_scaling=0.1)
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), config, autocast_adapter_dtype=autocast)
    for layer in prefix_layers(model).values():
        assert torch.equal(layer.encoder("default").scaling.values, torch.tensor([0.1, 0.1]))
        key, value = layer.prefix_key_value("default")
        assert key.dtype == value.dtype == (torch.float32 if autocast else torch.bfloat16)
    assert output_of(model, input_ids=token_ids()).isfinite().all()


def test_the_scale_is_trainable_as_the_rest_of_its_adapter_is():
    model = prefixed(tiny_model(), reparameterization="linear").train()
    model.add_adapter("second", joint_config())
    for adapter in ("second", "default"):
        model.set_adapter(adapter)
        model.set_requires_grad(adapter)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        of_scale = {name for name in names if name.endswith(f"prefix_plus_scaling.{adapter}.factors")}
        assert len(of_scale) == 3
        assert set(names) == set(adapter_parameters(model, adapter)) | of_scale
        assert model.get_model_status().requires_grad == {
            "default": adapter == "default",
            "second": adapter == "second",
        }


def test_over_a_base_in_bfloat16_the_scale_is_measured_and_the_start_is_the_bases_own():
    base = tiny_model(dtype=torch.bfloat16)
    expected = own_key_values(base, spread_tokens(12), position_ids=torch.arange(-12, 0)[None])
    model = prefixed(base, num_virtual_tokens=12, init_weights="activations", position_free=False)

    assert scalings(model) == scalings(prefixed(tiny_model()))
    for pair, reference in zip(prefix_key_values(model).values(), expected, strict=True):
        assert all(torch.equal(ours, theirs.float()) for ours, theirs in zip(pair, reference, strict=True))


# ------------------------------------------------------------------------------- the base model's own activations


@pytest.mark.parametrize("length", [12, 5])
@pytest.mark.parametrize(
    ("build", "is_rotary"),
    [
        (tiny_model, True),
        (latent_model, True),
        (lambda: tiny_model("gpt_neox"), True),
        (lambda: tiny_model("gpt2"), False),
        (lambda: tiny_model("opt"), False),
    ],
    ids=["llama", "mla", "gpt_neox", "gpt2", "opt"],
)
def test_activations_are_the_keys_and_values_of_tokens_before_the_text(build, is_rotary, length):
    base = build()
    tokens = max(length, 8)
    positions = {"position_ids": torch.arange(-tokens, 0)[None]} if is_rotary else {}
    expected = own_key_values(base, spread_tokens(tokens), **positions)

    model = prefixed(base, num_virtual_tokens=length, init_weights="activations", position_free=False)

    for pair, reference in zip(prefix_key_values(model).values(), expected, strict=True):
        for ours, theirs in zip(pair, reference, strict=True):
            torch.testing.assert_close(ours, theirs[:, -length:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init_weights", STARTS)
@EACH_ENCODER
def test_the_smallest_prefix_starts(reparameterization, sharing, init_weights):
    sizes = {"num_virtual_tokens": 1, **({} if reparameterization == "none" else {"encoder_dim": 1})}
    fields = {"reparameterization": reparameterization, "sharing": sharing, "init_weights": init_weights}
    model = prefixed(tiny_model(), **sizes, **fields)
    assert all(tensor.isfinite().all() for pair in prefix_key_values(model).values() for tensor in pair)


def test_activations_repeat_where_a_model_has_fewer_tokens_than_the_prefix():
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    model = prefixed(transformers.ViTModel(config).eval(), num_virtual_tokens=12, init_weights="activations")
    for key, value in prefix_key_values(model).values():
        for states in (key, value):  # five tokens: four patches and the class
            assert torch.equal(states[:, 5:10], states[:, :5])
            assert len(states[0].unique(dim=0)) == 5


@pytest.mark.parametrize("init_weights", [True, "activations"])
def test_a_gate_starts_closed_over_every_start_but_a_random_one(init_weights):
    expected = output_of(tiny_model(), input_ids=token_ids())
    closed = prefixed(tiny_model(), gating=True, init_weights=init_weights)
    assert torch.equal(output_of(closed, input_ids=token_ids()), expected)
    for start in (False, "random"):
        opened = prefixed(tiny_model(), gating=True, init_weights=start)
        assert (output_of(opened, input_ids=token_ids()) - expected).abs().max() > 1e-2


# ---------------------------------------------------------------------------------- from given keys and values


def random_targets(
    model: PeftModel, scale: float = 1.0, seed: int = 0
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tuple(torch.randn(states.shape, generator=generator) * scale for states in pair)
        for name, pair in prefix_key_values(model).items()
    }


def fitted(**fields: object) -> tuple[PeftModel, dict, dict]:
    """A model whose prefix was fitted to random keys and values, these, and the residuals."""
    model = prefixed(tiny_model(), num_virtual_tokens=6, **fields)
    targets = random_targets(model)
    return model, targets, initialize_from_key_values(model, targets)


@pytest.mark.parametrize("encoder_dim", [4, 9, 40])
@EACH_ENCODER
def test_the_residual_is_how_far_the_prefix_is_from_what_it_was_given(reparameterization, sharing, encoder_dim):
    model, targets, residuals = fitted(reparameterization=reparameterization, sharing=sharing, encoder_dim=encoder_dim)
    assert list(residuals) == list(targets)
    for name, pair in prefix_key_values(model).items():
        for residual, ours, wanted in zip(residuals[name], pair, targets[name], strict=True):
            assert residual == pytest.approx(((ours - wanted).norm() / wanted.norm()).item(), abs=1e-6)
            assert residual < 1.0 + 1e-6  # never worse than no prefix


def test_parameters_that_are_keys_and_values_are_exactly_those_given():
    model, targets, residuals = fitted()
    for name, pair in prefix_key_values(model).items():
        assert all(torch.equal(*both) for both in zip(pair, targets[name], strict=True))
        assert tuple(residuals[name]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("sharing", "encoder_dim"), [("none", 9), ("input", 9), ("none", 40), ("input", 40), ("projection", 40)]
)
@pytest.mark.parametrize("reparameterization", ["linear", "mlp"])
def test_nothing_is_lost_where_inputs_are_as_wide_as_what_they_produce_is_long(
    reparameterization, sharing, encoder_dim
):
    """That is six tokens, or those of all three layers where they share a projection."""
    _, _, residuals = fitted(reparameterization=reparameterization, sharing=sharing, encoder_dim=encoder_dim)
    assert max(max(residual) for residual in residuals.values()) < 1e-4


@pytest.mark.parametrize(
    ("sharing", "encoder_dim"), [("none", 4), ("input", 4), ("projection", 4), ("projection", 9), ("all", 4)]
)
def test_a_linear_fit_of_narrower_inputs_loses_something_of_every_tensor(sharing, encoder_dim):
    """Random targets have full rank."""
    _, _, residuals = fitted(reparameterization="linear", sharing=sharing, encoder_dim=encoder_dim)
    assert min(min(residual) for residual in residuals.values()) > 1e-2


def scaled_targets(
    model: PeftModel, targets: dict[str, tuple[torch.Tensor, torch.Tensor]], layers: list[str]
) -> torch.Tensor:
    """What the parameters must produce, (layers · tokens, size), in float64."""
    rows = []
    for name in layers:
        factors = prefix_layers(model)[name].encoder("default").scaling.values.double()
        flat = [
            states.double().transpose(0, 1).flatten(1) / f for states, f in zip(targets[name], factors, strict=True)
        ]
        rows.append(torch.cat(flat, dim=1))
    return torch.cat(rows)


def weighed(matrix: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Keys and values, half of the columns each, relative to the norms of those of another matrix."""
    halves = zip(matrix.chunk(2, dim=1), of.chunk(2, dim=1), strict=True)
    return torch.cat([half / whole.norm() for half, whole in halves], dim=1)


@pytest.mark.parametrize("encoder_dim", [2, 7, 17])
@pytest.mark.parametrize("scaling", [None, 1.0])
@pytest.mark.parametrize("sharing", ["projection", "none"])
def test_a_linear_fit_is_the_best_of_its_rank(sharing, scaling, encoder_dim):
    """Eckart & Young: no matrix of rank k is nearer than the sum of the first k singular triplets."""
    fields = dict(reparameterization="linear", sharing=sharing, encoder_dim=encoder_dim, prefix_scaling=scaling)
    model = prefixed(uneven_model(), num_virtual_tokens=6, **fields)
    targets = random_targets(model)
    for index, pair in enumerate(targets.values()):  # layers of other sizes, keys and values too
        pair[0].mul_(1.0 + 4 * index)
        pair[1].mul_(0.1 + index)
    initialize_from_key_values(model, targets)
    produced = prefix_key_values(model)

    groups = [list(targets)] if sharing == "projection" else [[name] for name in targets]
    for layers in groups:
        wanted = scaled_targets(model, targets, layers)
        missing = weighed(scaled_targets(model, produced, layers) - wanted, of=wanted)
        singular_values = torch.linalg.svdvals(weighed(wanted, of=wanted))
        best = singular_values[encoder_dim:].square().sum().sqrt().item()
        assert missing.norm().item() == pytest.approx(best, rel=1e-3, abs=1e-5)


def test_a_linear_fit_of_a_shared_input_is_the_best_of_its_rank():
    model = prefixed(tiny_model(), num_virtual_tokens=12, reparameterization="linear", sharing="input", encoder_dim=5)
    targets = random_targets(model)
    residuals = initialize_from_key_values(model, targets)
    # side by side, the keys and the values of every layer at norm 1
    columns = [states.double().transpose(0, 1).flatten(1) for pair in targets.values() for states in pair]
    singular_values = torch.linalg.svdvals(torch.cat([part / part.norm() for part in columns], dim=1))
    missing = sum(residual.key**2 + residual.value**2 for residual in residuals.values())
    assert missing == pytest.approx(singular_values[5:].square().sum().item(), rel=1e-4)


def test_a_fitted_prefix_can_be_fitted_exactly_if_layers_agree():
    model = prefixed(tiny_model(), num_virtual_tokens=6, reparameterization="linear", sharing="all", encoder_dim=8,
                     prefix_scaling=1.0)  # fmt: skip
    first = next(iter(random_targets(model).values()))
    residuals = initialize_from_key_values(model, dict.fromkeys(prefix_layers(model), first))
    assert max(max(residual) for residual in residuals.values()) < 1e-5


def test_a_fit_goes_through_training_and_saving(tmp_path):
    model = prefixed(
        tiny_model(), reparameterization="mlp", sharing="projection", encoder_dim=40, num_virtual_tokens=6
    )
    initialize_from_key_values(model, random_targets(model))
    expected = output_of(model, input_ids=token_ids())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).eval()
    assert torch.equal(output_of(loaded, input_ids=token_ids()), expected)
    loaded(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter_parameters(loaded).values())


WRONG_TARGETS = {
    "a module is missing": (lambda t, name: t.pop(name), r"model.layers.1.self_attn is missing or too many"),
    "a module too many": (lambda t, name: t.update(other=t[name]), r"other is missing or too many"),
    "another length": (
        lambda t, name: t.update({name: (t[name][0][:, 1:], t[name][1])}),
        r"keys of model.layers.1.self_attn must have shape \(2, 3, 8\) .* got \(2, 2, 8\)",
    ),
    "another width": (
        lambda t, name: t.update({name: (t[name][0], t[name][1][..., 1:])}),
        r"values of model.layers.1.self_attn must have shape \(2, 3, 8\) .* got \(2, 3, 7\)",
    ),
    "not a number": (
        lambda t, name: t[name][1][0, 0].fill_(math.nan),
        r"values of model.layers.1.self_attn must be finite",
    ),
    "infinite": (lambda t, name: t[name][0][0, 0].fill_(math.inf), r"keys of model.layers.1.self_attn must be finite"),
    "keys alone": (lambda t, name: t.update({name: t[name][0]}), r"one of values for model.layers.1.self_attn"),
    "three tensors": (
        lambda t, name: t.update({name: (*t[name], t[name][0])}),
        r"values for model.layers.1.self_attn",
    ),
}


@pytest.mark.parametrize("case", WRONG_TARGETS)
def test_wrong_keys_and_values_are_named_and_change_nothing(case):
    spoil, message = WRONG_TARGETS[case]
    model = prefixed(tiny_model())
    targets = random_targets(model)
    spoil(targets, "model.layers.1.self_attn")
    with unchanged(model), pytest.raises(ValueError, match=message):
        initialize_from_key_values(model, targets)


# ------------------------------------------------------------------------------------------------- from a text

TEXT_TOKENS = 6
TEXT = " ".join(f"w{number}" for number in (9, 30, 51, 12, 44, 23))


TEXT_IDS = word_tokenizer()(TEXT, return_tensors="pt")["input_ids"]


def started(base: torch.nn.Module, text: str = TEXT, **fields: object) -> PeftModel:
    """A model whose prefix starts from the text."""
    model = prefixed(base, num_virtual_tokens=TEXT_TOKENS, **fields)
    initialize_from_text(model, word_tokenizer(), text)
    return model


def padded_batch() -> dict[str, torch.Tensor]:
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def after_the_text(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs with the text before each row."""
    text = TEXT_IDS.expand(len(batch["input_ids"]), -1)
    return {
        "input_ids": torch.cat([text, batch["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(text), batch["attention_mask"]], dim=1),
    }


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
def test_a_rotary_model_gives_what_it_gives_when_it_reads_the_text(architecture, implementation):
    base = tiny_model(architecture, implementation=implementation)
    batch = padded_batch()
    expected = output_of(base, **after_the_text(batch))[:, TEXT_TOKENS:]
    unread = output_of(base, **batch)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=1)
    generated = base.generate(**after_the_text(batch), **options)[:, TEXT_TOKENS:]

    model = started(base)

    real = batch["attention_mask"].bool()
    # only differences of positions count: the text at -6, …, -1 and the input at 0, …, or all from 0 on
    torch.testing.assert_close(output_of(model, **batch)[real], expected[real], rtol=0, atol=1e-5)
    assert (expected - unread)[real].abs().max() > 1e-2
    assert torch.equal(model.generate(**batch, **options), generated)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_model_with_learned_positions_gives_what_it_gives_when_text_and_input_both_begin_at_0(architecture):
    base = tiny_model(architecture)
    batch = {"input_ids": token_ids(), "attention_mask": torch.ones_like(token_ids())}
    positions = torch.cat([torch.arange(TEXT_TOKENS), torch.arange(7)]).expand(2, -1)
    expected = output_of(base, **after_the_text(batch), position_ids=positions)[:, TEXT_TOKENS:]

    model = started(base)

    torch.testing.assert_close(output_of(model, **batch), expected, rtol=0, atol=1e-5)


def assert_key_values(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


DECODER_ATTENTION = {
    ("t5", "self"): "decoder.block.{}.layer.0.SelfAttention",
    ("t5", "cross"): "decoder.block.{}.layer.1.EncDecAttention",
    ("bart", "self"): "model.decoder.layers.{}.self_attn",
    ("bart", "cross"): "model.decoder.layers.{}.encoder_attn",
}


@pytest.mark.parametrize(("architecture", "kind"), DECODER_ATTENTION)
def test_a_decoder_starts_from_what_it_caches_when_encoder_and_decoder_read_the_text(architecture, kind):
    base = tiny_model(architecture, "SEQ_2_SEQ_LM")
    with torch.no_grad():
        cache = base(input_ids=TEXT_IDS, decoder_input_ids=TEXT_IDS, use_cache=True).past_key_values
    found = prefix_key_values(started(base, task_type="SEQ_2_SEQ_LM"))
    layers = (cache.self_attention_cache if kind == "self" else cache.cross_attention_cache).layers
    assert len(layers) == 2
    for number, layer in enumerate(layers):
        name = DECODER_ATTENTION[architecture, kind].format(number)
        assert_key_values(found[name], (layer.keys[0], layer.values[0]))


def t5_projections(block: torch.nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    part = block.layer[0]
    return tuple(projection(part.layer_norm(hidden)) for projection in (part.SelfAttention.k, part.SelfAttention.v))


def bart_projections(block: torch.nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return block.self_attn.k_proj(hidden), block.self_attn.v_proj(hidden)


@pytest.mark.parametrize(
    ("architecture", "blocks", "attention", "projections"),
    [
        ("t5", "encoder.block", "layer.0.SelfAttention", t5_projections),
        ("bart", "model.encoder.layers", "self_attn", bart_projections),
    ],
    ids=["t5", "bart"],
)
def test_an_encoder_starts_from_the_projections_of_its_hidden_states(architecture, blocks, attention, projections):
    base = tiny_model(architecture, "SEQ_2_SEQ_LM")
    with torch.no_grad():
        hidden = base.get_encoder()(input_ids=TEXT_IDS, output_hidden_states=True).hidden_states
        expected = [
            tuple(flat[0].unflatten(-1, (4, -1)).transpose(0, 1) for flat in projections(block, states))
            for block, states in zip(base.get_submodule(blocks), hidden[:-1], strict=True)
        ]
    found = prefix_key_values(started(base, task_type="SEQ_2_SEQ_LM"))
    assert len(expected) == 2
    for number, pair in enumerate(expected):
        assert_key_values(found[f"{blocks}.{number}.{attention}"], pair)


@pytest.mark.parametrize(("reparameterization", "sharing"), ENCODERS[1:])
def test_a_reparameterization_is_fitted_to_the_text(reparameterization, sharing):
    exact = prefix_key_values(started(tiny_model()))
    fields = dict(reparameterization=reparameterization, sharing=sharing, encoder_dim=40)
    model = prefixed(tiny_model(), num_virtual_tokens=TEXT_TOKENS, **fields)
    residuals = initialize_from_text(model, word_tokenizer(), TEXT)
    for name, pair in prefix_key_values(model).items():
        for residual, ours, wanted in zip(residuals[name], pair, exact[name], strict=True):
            assert residual == pytest.approx(((ours - wanted).norm() / wanted.norm()).item(), abs=1e-6)
            assert residual < (1e-4 if sharing != "all" else 1.0)


def test_the_next_forward_has_the_new_prefix_and_training_goes_on_from_it():
    model = prefixed(tiny_model(), num_virtual_tokens=TEXT_TOKENS)
    batch = padded_batch()
    before = output_of(model, **batch)
    assert torch.equal(output_of(model, **batch), before)  # the prefix is kept in inference
    initialize_from_text(model, word_tokenizer(), TEXT)
    assert (output_of(model, **batch) - before).abs().max() > 1e-2
    assert torch.equal(output_of(model, **batch), output_of(started(tiny_model()), **batch))
    assert all(parameter.requires_grad for parameter in adapter_parameters(model).values())


def test_only_the_named_adapter_is_started_and_no_other_is_read():
    model = prefixed(tiny_model(), num_virtual_tokens=TEXT_TOKENS)
    model.add_adapter("second", joint_config(num_virtual_tokens=TEXT_TOKENS, init_weights=False))
    first = prefix_key_values(model)
    for active in ("default", "second"):
        model.set_adapter(active)
        initialize_from_text(model, word_tokenizer(), TEXT, adapter_name="second")
        for name, pair in prefix_key_values(started(tiny_model())).items():
            assert all(torch.equal(*both) for both in zip(prefix_key_values(model, "second")[name], pair, strict=True))
            assert all(torch.equal(*both) for both in zip(prefix_key_values(model)[name], first[name], strict=True))
        assert model.active_adapter == active


def test_a_subset_of_layers_and_a_bare_model_can_start_from_a_text():
    expected = prefix_key_values(started(tiny_model()))
    model = started(tiny_model(), layers_to_transform=[1])
    injected = inject_adapter_in_model(joint_config(num_virtual_tokens=TEXT_TOKENS), tiny_model())
    initialize_from_text(injected, word_tokenizer(), TEXT)
    assert list(prefix_key_values(model)) == ["model.layers.1.self_attn"]
    for each in (model, injected):
        for name, pair in prefix_key_values(each).items():
            assert all(torch.equal(*both) for both in zip(pair, expected[name], strict=True))


def test_a_training_model_reads_without_dropout_and_stays_in_training():
    base = tiny_model("opt", dropout=0.5)
    model = prefixed(base, num_virtual_tokens=TEXT_TOKENS).train()
    initialize_from_text(model, word_tokenizer(), TEXT)
    assert model.training and all(layer.training for layer in base.model.decoder.layers)
    expected = prefix_key_values(started(tiny_model("opt", dropout=0.5)))
    for name, pair in prefix_key_values(model).items():
        assert all(torch.equal(*both) for both in zip(pair, expected[name], strict=True))


def tokenizer_with_a_start() -> PreTrainedTokenizerFast:
    """Puts the token 2 before every text."""
    tokenizer = word_tokenizer()
    start = processors.TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    tokenizer.backend_tokenizer.post_processor = start
    return tokenizer


def test_special_tokens_are_the_tokenizers():
    model = prefixed(tiny_model(), num_virtual_tokens=TEXT_TOKENS)
    with pytest.warns(UserWarning, match="has 7 tokens; the prefix starts from the first num_virtual_tokens=6"):
        initialize_from_text(model, tokenizer_with_a_start(), TEXT)
    ids = torch.cat([torch.tensor([[2]]), TEXT_IDS[:, :-1]], dim=1)
    expected = own_key_values(tiny_model(), ids, position_ids=torch.arange(-TEXT_TOKENS, 0)[None])
    for pair, reference in zip(prefix_key_values(model).values(), expected, strict=True):
        assert_key_values(pair, reference)


def test_special_tokens_can_be_left_out():
    model = prefixed(tiny_model(), num_virtual_tokens=TEXT_TOKENS)
    initialize_from_text(model, tokenizer_with_a_start(), TEXT, add_special_tokens=False)
    expected = prefix_key_values(started(tiny_model()))
    for name, pair in prefix_key_values(model).items():
        assert all(torch.equal(*both) for both in zip(pair, expected[name], strict=True))


def test_a_text_that_is_too_short_or_another_adapter_is_an_error_that_changes_nothing():
    model = prefixed(tiny_model(), num_virtual_tokens=TEXT_TOKENS)
    with unchanged(model):
        for short in ("w3 w4", ""):
            with pytest.raises(ValueError, match=r"has \d tokens .* num_virtual_tokens=6. Give a text of at least"):
                initialize_from_text(model, word_tokenizer(), short)
        for function, argument in ((initialize_from_text, TEXT), (initialize_from_key_values, {})):
            arguments = (word_tokenizer(), argument) if function is initialize_from_text else (argument,)
            with pytest.raises(ValueError, match=r"named 'other' in the model; it has \['default'\]"):
                function(model, *arguments, adapter_name="other")


def llava() -> torch.nn.Module:
    text = transformers.LlamaConfig(**DECODER_SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=63)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_module_that_a_text_does_not_reach_is_named():
    model = prefixed(llava(), target_modules=r".*self_attn", num_virtual_tokens=TEXT_TOKENS)
    with unchanged(model), pytest.raises(ValueError, match=r"A text does not reach model.vision_tower.*_key_values"):
        initialize_from_text(model, word_tokenizer(), TEXT)
    language_model = prefixed(llava(), num_virtual_tokens=TEXT_TOKENS)
    residuals = initialize_from_text(language_model, word_tokenizer(), TEXT)
    assert list(residuals) == [f"model.language_model.layers.{layer}.self_attn" for layer in range(3)]


def test_a_decoupled_prefix_does_not_start_from_a_text():
    model = prefixed(tiny_model(), num_virtual_tokens=3, decoupled=True)
    with unchanged(model), pytest.raises(ValueError, match=r"Adapter 'default' is decoupled.*decoupled=False"):
        initialize_from_text(model, word_tokenizer(), TEXT)


def test_a_text_that_the_model_cannot_read_is_an_error_that_changes_nothing():
    model = prefixed(tiny_model("gpt2", n_positions=8), num_virtual_tokens=12)
    with unchanged(model), pytest.raises(ValueError, match=r"GPT2LMHeadModel cannot read a text of 12 tokens"):
        initialize_from_text(model, word_tokenizer(), TEXT + " " + TEXT)


@pytest.mark.parametrize(
    ("task_type", "model_type", "class_name"),
    [
        ("CAUSAL_LM", "ministral3", "Ministral3ForCausalLM"),  # scales its queries by the logarithm of their position
        ("SEQ_2_SEQ_LM", "t5gemma", "T5GemmaForConditionalGeneration"),  # rotates in the encoder and in the decoder
    ],
)
def test_positions_before_the_text_suit_models_that_make_more_of_positions(task_type, model_type, class_name):
    case = tiny_models.Case(task_type, model_type, class_name)
    base = tiny_models.tiny_model(case)
    inputs = tiny_models.inputs_of(case, base)
    expected = output_of(base, **inputs)
    text = torch.cat([TEXT_IDS, TEXT_IDS], dim=1)
    both = {"decoder_input_ids": text} if task_type == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        cache = base(input_ids=text, **both, use_cache=True).past_key_values
    layers = getattr(cache, "self_attention_cache", cache).layers

    model = prefixed(tiny_models.tiny_model(case), num_virtual_tokens=12, gating=True, init_weights=True)
    assert torch.equal(output_of(model, **inputs), expected)
    initialize_from_text(model, word_tokenizer(), TEXT + " " + TEXT)

    # a rotation by other positions leaves the values, and the norms of the keys, as they are
    found = [pair for name, pair in prefix_key_values(model).items() if "encoder" not in name and "cross" not in name]
    assert len(found) == len(layers)
    for (keys, values), layer in zip(found, layers, strict=True):
        kept = layer.values.shape[2]  # a sliding window's cache forgets the others
        torch.testing.assert_close(values[:, -kept:], layer.values[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(keys[:, -kept:].norm(dim=-1), layer.keys[0].norm(dim=-1), rtol=0, atol=1e-5)
