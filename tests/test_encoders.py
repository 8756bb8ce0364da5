"""The reparameterizations: how many parameters, which prefix they make, what layers share, how they start."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from models import (
    DECODER_SIZES,
    EACH_COMBINATION,
    REPARAMETERIZATIONS,
    SCALING_SIZE,
    SHARINGS,
    adapter_parameters,
    joint_config,
    output_of,
    prefix_layers,
    prefixed,
    tiny_model,
    token_ids,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers.activations import ACT2FN


# Of the tiny Llama: two key/value heads of eight numbers, each with a key and a value.
LENGTH, DIM, HIDDEN, SIZE = 3, 5, 7, 2 * (8 + 8)


def encoder_fields(reparameterization: str, sharing: str) -> dict[str, object]:
    hidden_size = HIDDEN if reparameterization == "mlp" else None
    return {
        "num_virtual_tokens": LENGTH,
        "encoder_dim": DIM,
        "encoder_hidden_size": hidden_size,
        "reparameterization": reparameterization,
        "sharing": sharing,
    }


def expected_count(reparameterization: str, sharing: str, layers: int, size: int = SIZE) -> int:
    """The number of parameters less the scaling, from the formulas of the reparameterizations; keys are half of the size."""
    if reparameterization == "none":
        return layers * LENGTH * size
    tokens, offsets = LENGTH * DIM, layers * size // 2
    if reparameterization == "linear":
        first, second = 0, DIM * size
    else:
        first, second = DIM * HIDDEN + HIDDEN, HIDDEN * size + size
    return (
        offsets
        + {
            "none": layers * (tokens + first + second),
            "input": tokens + first + layers * second,
            "projection": layers * tokens + first + second,
            "all": tokens + first + second,
        }[sharing]
    )


@pytest.mark.parametrize("layers", [None, [1], [0, 3], [-1, -2, 0]])
@EACH_COMBINATION
def test_the_number_of_parameters_is_that_of_the_formula(reparameterization, sharing, layers):
    base = tiny_model(num_hidden_layers=4)
    total = sum(parameter.numel() for parameter in base.parameters())

    model = prefixed(base, layers_to_transform=layers, **encoder_fields(reparameterization, sharing))

    count = 4 if layers is None else len(layers)
    expected = expected_count(reparameterization, sharing, count) + count * SCALING_SIZE
    assert model.get_nb_trainable_parameters() == (expected, total + expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reparameterization": "none"}, 5_242_880),
        ({"reparameterization": "linear", "sharing": "projection", "encoder_dim": 64}, 565_248 + 32 * 4096),
    ],
)
def test_the_numbers_of_parameters_on_llama_2_7b(fields, expected):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=32,
            )
        )

    model = get_peft_model(model, joint_config(num_virtual_tokens=20, **fields))

    expected += 32 * SCALING_SIZE
    assert model.get_nb_trainable_parameters() == (expected, 6_738_415_616 + expected)


def prefix_by_formula(
    parameters: dict[str, torch.Tensor], reparameterization: str, sharing: str, layer: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values (heads, tokens, dim) of a layer of the tiny Llama, from the tensors of its adapter."""

    def part(name: str, shared_under: tuple[str, ...]) -> torch.Tensor:
        part, _, kind = name.partition(".")
        if sharing not in shared_under:
            return parameters[
                f"base_model.model.model.layers.{layer}.self_attn.prefix_plus.prefix_plus_encoder.{name}"
            ]
        # a network that is shared with its output is made for the shape of the keys and values
        of_shape = "_2x8x8" if sharing != "input" and part != "virtual_tokens" else ""
        return parameters[f"base_model.model.prefix_plus.prefix_plus_shared.{part}{of_shape}.{kind}"]

    if reparameterization == "none":
        return part("key", ()) * scaling, part("value", ()) * scaling
    flat = part("virtual_tokens.weight", ("input", "all"))
    if reparameterization == "mlp":
        weight, bias = (part(f"hidden.{kind}", ("input", "projection", "all")) for kind in ("weight", "bias"))
        flat = torch.tanh(flat @ weight.T + bias)
    flat = flat @ part("output.weight", ("projection", "all")).T
    if reparameterization == "mlp":
        flat = flat + part("output.bias", ("projection", "all"))
    key, value = flat[:, : SIZE // 2] + part("key_offset", ()).flatten(), flat[:, SIZE // 2 :]
    return tuple(
        torch.stack([half[:, head * 8 : head * 8 + 8] for head in range(2)]) * scaling for half in (key, value)
    )


@EACH_COMBINATION
def test_the_prefix_is_that_of_the_formula_and_shared_tensors_are_stored_once(reparameterization, sharing, tmp_path):
    model = prefixed(tiny_model(), prefix_scaling=0.5, **encoder_fields(reparameterization, sharing))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_()  # biases too
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")

    parameters = {name: tensor for name, tensor in stored.items() if not name.endswith(".prefix_plus_scaling.factors")}
    assert sum(tensor.numel() for tensor in parameters.values()) == expected_count(reparameterization, sharing, 3)
    assert [tensor.tolist() for name, tensor in stored.items() if name not in parameters] == [[1.0, 0.5, 0.5]] * 3
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    for model_with_prefix in (model, loaded):
        for layer, module in enumerate(prefix_layers(model_with_prefix).values()):
            produced = module.prefix_key_value("default")
            expected = prefix_by_formula(stored, reparameterization, sharing, layer, scaling=0.5)
            for ours, theirs in zip(produced, expected, strict=True):
                torch.testing.assert_close(ours, theirs)
    assert torch.equal(output_of(loaded, input_ids=token_ids()), output_of(model, input_ids=token_ids()))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "sigmoid"])
def test_the_activation_is_the_one_named(activation):
    fields = dict(reparameterization="mlp", encoder_activation=activation, sharing="none", prefix_scaling=1.0)
    model = prefixed(tiny_model(), **fields)

    for layer in prefix_layers(model).values():
        tensors = dict(layer.prefix_plus_encoder["default"].named_parameters())
        hidden = ACT2FN[activation](
            linear(tensors["virtual_tokens.weight"], tensors["hidden.weight"], tensors["hidden.bias"])
        )
        flat = linear(hidden, tensors["output.weight"], tensors["output.bias"])
        assert not tensors["key_offset"].any()
        key, value = layer.prefix_key_value("default")
        torch.testing.assert_close(torch.cat([*key, *value], dim=-1), flat)


@EACH_COMBINATION
def test_the_hidden_width_of_the_mlp_is_the_encoders_width_unless_given(reparameterization, sharing):
    fields = {**encoder_fields(reparameterization, sharing), "encoder_hidden_size": None}
    widths = {
        parameter.shape[0]
        for name, parameter in adapter_parameters(prefixed(tiny_model(), **fields)).items()
        if re.search(r"hidden(_\w+)?\.weight$", name)
    }

    assert widths == ({DIM} if reparameterization == "mlp" else set())


@pytest.mark.parametrize("sharing", SHARINGS)
def test_what_layers_share_is_the_same_tensor(sharing):
    model = prefixed(tiny_model(), reparameterization="mlp", sharing=sharing)
    layers = [layer.prefix_plus_encoder["default"] for layer in prefix_layers(model).values()]
    before = [tuple(tensor.clone() for tensor in encoder()) for encoder in layers]

    def changed_by(parameter: torch.nn.Parameter) -> list[bool]:
        with torch.no_grad():
            original = parameter.clone()
            parameter.add_(1.0)
            changed = [not torch.equal(encoder()[0], old[0]) for encoder, old in zip(layers, before, strict=True)]
            parameter.copy_(original)
        return changed

    first = layers[0]
    assert changed_by(first.part("virtual_tokens").weight) == [True, *[sharing in ("input", "all")] * 2]
    assert changed_by(first.part("hidden").weight) == [True, *[sharing != "none"] * 2]
    assert changed_by(first.part("output").weight) == [True, *[sharing in ("projection", "all")] * 2]


def two_shapes(seed: int = 0) -> torch.nn.Module:
    """A tiny Gemma 4, whose global layers (1 and 3) have keys and values of sixteen numbers, the others of eight."""
    config = transformers.Gemma4TextConfig(
        **{
            **DECODER_SIZES,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "sliding_window": 4,
        }
    )
    torch.manual_seed(seed)
    return transformers.Gemma4ForCausalLM(config).eval()


@EACH_COMBINATION
def test_layers_of_different_shape_share_a_projection_per_shape(reparameterization, sharing, tmp_path):
    inputs = {"input_ids": token_ids()}
    base = two_shapes()
    expected_output = output_of(base, **inputs)
    model = prefixed(base, task_type="CAUSAL_LM", **encoder_fields(reparameterization, sharing))

    small, large = 2 * (8 + 8), 2 * (16 + 16)
    counts = [expected_count(reparameterization, sharing, 2, size) for size in (small, large)]
    shared_by_all = 0
    if reparameterization != "none" and sharing in ("input", "all"):
        shared_by_all = LENGTH * DIM  # P' fits every shape
    if reparameterization == "mlp" and sharing == "input":
        shared_by_all += DIM * HIDDEN + HIDDEN
    assert model.get_nb_trainable_parameters()[0] == sum(counts) - shared_by_all + 4 * SCALING_SIZE
    shapes = [layer.prefix_key_value("default")[0].shape for layer in prefix_layers(model).values()]
    assert shapes == [(2, LENGTH, 8), (2, LENGTH, 16)] * 2
    assert (output_of(model, **inputs) - expected_output).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(two_shapes(), tmp_path)
    assert torch.equal(output_of(loaded, **inputs), output_of(model, **inputs))


def test_keys_and_values_of_different_width_get_prefixes_of_their_own_width():
    config = transformers.DeepseekV3Config(
        **{**DECODER_SIZES, "num_key_value_heads": 4, "num_hidden_layers": 2},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        first_k_dense_replace=2,
    )
    model = prefixed(transformers.DeepseekV3ForCausalLM(config).eval(), **encoder_fields("linear", "projection"))

    for layer in prefix_layers(model).values():
        assert [tensor.shape for tensor in layer.prefix_key_value("default")] == [(4, LENGTH, 12), (4, LENGTH, 6)]
    offsets = 2 * 4 * 12
    expected = 2 * LENGTH * DIM + DIM * 4 * (12 + 6) + offsets + 2 * SCALING_SIZE
    assert model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("reparameterization", REPARAMETERIZATIONS)
def test_dropout_is_on_the_produced_prefix_and_in_training_only(reparameterization):
    rate = 0.5
    fields = {"reparameterization": reparameterization, "num_virtual_tokens": 200, "sharing": "none"}
    model = prefixed(tiny_model(), encoder_dropout=rate, **fields)
    inputs = {"input_ids": token_ids()}

    def prefix_in_attention(layer: torch.nn.Module) -> torch.Tensor:
        keys = values = torch.zeros(1, 2, 4, 8)
        prefix, _ = layer(keys, values)
        return torch.stack([prefix.key, prefix.value])

    for layer in prefix_layers(model).values():
        whole = prefix_in_attention(layer.eval())
        assert torch.equal(prefix_in_attention(layer.eval()), whole)
        dropped = prefix_in_attention(layer.train())
        kept = dropped != 0
        assert 0.45 < kept.float().mean() < 0.55
        torch.testing.assert_close(dropped[kept], whole[kept] / (1 - rate))
    assert not torch.equal(output_of(model, **inputs), output_of(model, **inputs))
    model.eval()
    assert torch.equal(output_of(model, **inputs), output_of(model, **inputs))


@EACH_COMBINATION
def test_a_start_of_zeros_is_zero_but_not_the_base_model(reparameterization, sharing):
    inputs = {"input_ids": token_ids()}
    expected = output_of(tiny_model(), **inputs)
    model = prefixed(tiny_model(), init_weights="zero", **encoder_fields(reparameterization, sharing))

    for layer in prefix_layers(model).values():
        assert all(tensor.abs().max() == 0.0 for tensor in layer.prefix_key_value("default"))
    assert (output_of(model, **inputs) - expected).abs().max() > 1e-2  # it takes its share of the attention


@EACH_COMBINATION
def test_false_is_the_random_start_and_the_default_another(reparameterization, sharing):
    outputs = []
    for start in (False, "random", True):
        torch.manual_seed(1)
        model = prefixed(tiny_model(), init_weights=start, **encoder_fields(reparameterization, sharing))
        outputs.append(output_of(model, input_ids=token_ids()))
    assert torch.equal(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().max() > 1e-2


def test_a_closed_gate_is_exactly_the_base_model_and_an_open_one_is_not():
    inputs = {"input_ids": token_ids()}
    expected = output_of(tiny_model(), **inputs)

    assert torch.equal(output_of(prefixed(tiny_model(), gating=True, init_weights=True), **inputs), expected)
    assert (output_of(prefixed(tiny_model(), gating=True), **inputs) - expected).abs().max() > 1e-2


def test_a_gate_has_one_parameter_per_query_head():
    model = prefixed(tiny_model(), gating=True, init_weights=True, **encoder_fields("linear", "all"))

    gates = [parameter for name, parameter in adapter_parameters(model).items() if "gate" in name]
    assert [tuple(gate.shape) for gate in gates] == [(4,)] * 3
    assert model.get_nb_trainable_parameters()[0] == expected_count("linear", "all", 3) + 3 * (4 + SCALING_SIZE)
