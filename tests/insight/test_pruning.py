"""Which layers to keep, and an adapter that keeps only those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    GATE_SCALE,
    SCALING_SIZE,
    adapter_parameters,
    output_of,
    prefix_config,
    prefix_layers,
    prefixed,
    tiny_model,
    token_ids,
    unchanged,
)
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from test_encoders import two_shapes
from tiny_models import Case
from tiny_models import tiny_model as tiny_model_of_case
from torch.nn import functional as F

from peft_prefix_plus import LayerSuggestion, PrefixPlusModel, prefix_key_values, prune_layers, suggest_layers


ONE_LAYER = 3 * 2 * 2 * 8  # tokens, keys and values, heads, dim


def batches() -> list[dict[str, torch.Tensor]]:
    """Two batches of other lengths, and with labels that do not count."""
    found = []
    for seed, tokens in enumerate((9, 5)):
        ids = token_ids(2, tokens, seed)
        labels = ids.clone()
        labels[1, 2:4] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def loss_with(model: PeftModel, layers: list[int]) -> float:
    """The loss over all labels of [`batches`] with the prefixes of these layers, through another adapter that has no other."""
    state = {key: tensor for key, tensor in model.state_dict().items() if "prefix_plus" in key}
    other = tiny_model()
    if layers:
        config = prefix_config(task_type="CAUSAL_LM", layers_to_transform=layers)
        other = get_peft_model(other, config).eval()
        wanted = {key for key in other.state_dict() if "prefix_plus" in key}
        other.load_state_dict({key: state[key] for key in wanted}, strict=False)
    losses = []
    for batch in batches():
        logits = output_of(other, input_ids=batch["input_ids"])[:, :-1]
        losses.append(
            F.cross_entropy(logits.transpose(1, 2).double(), batch["labels"][:, 1:], reduction="none").flatten()
        )
        losses[-1] = losses[-1][batch["labels"][:, 1:].flatten() != -100]
    return torch.cat(losses).mean().item()


# ---------------------------------------------------------------------------------------------------- suggest_layers


def test_the_loss_without_each_layer_is_measured() -> None:
    model = prefixed(tiny_model(), task_type="CAUSAL_LM")
    found = suggest_layers(model, batches(), ONE_LAYER * 2)
    whole = loss_with(model, [0, 1, 2])
    expected = {number: loss_with(model, [n for n in range(3) if n != number]) - whole for number in range(3)}
    assert found.loss == pytest.approx(whole, abs=1e-5)
    assert found.loss_increases == pytest.approx(expected, abs=1e-5)
    assert found.layers == sorted(sorted(expected, key=expected.__getitem__)[1:])
    assert found.loss_of_kept == pytest.approx(loss_with(model, found.layers), abs=1e-5)
    assert (found.parameters, found.parameters_of_kept) == (3 * ONE_LAYER, 2 * ONE_LAYER)


def test_greedy_removal_measures_again_after_each_layer() -> None:
    model = prefixed(tiny_model(), task_type="CAUSAL_LM")
    expected = [0, 1, 2]
    while len(expected) > 1:
        rests = [[other for other in expected if other != number] for number in expected]
        expected = min(rests, key=lambda rest: loss_with(model, rest))
    found = suggest_layers(model, batches(), ONE_LAYER, greedy=True)
    assert found.layers == expected
    assert found.loss_of_kept == pytest.approx(loss_with(model, expected), abs=1e-5)


@pytest.mark.parametrize("greedy", [False, True])
def test_a_layer_without_effect_is_the_first_to_go(greedy: bool) -> None:
    model = prefixed(tiny_model(), gating=True)
    for number, layer in enumerate(prefix_layers(model).values()):
        layer.prefix_plus_gate["default"].data.fill_(1.0 / GATE_SCALE if number == 1 else 0.0)
    ids = token_ids()
    with torch.no_grad(), model.disable_adapter():
        without = model(input_ids=ids).logits.log_softmax(-1)
    with torch.no_grad():
        gained = model(input_ids=ids).logits.log_softmax(-1) - without
    labels = F.pad(gained.argmax(-1), (1, 0))[:, :-1]  # the tokens that the prefix of layer 1 makes likelier
    found = suggest_layers(model, [{"input_ids": ids, "labels": labels}], 1 / 3, greedy=greedy)
    assert found.layers == [1]
    assert found.loss_increases[0] == found.loss_increases[2] == 0.0 < found.loss_increases[1]
    assert found.loss_of_kept == found.loss


def test_what_layers_share_counts_once() -> None:
    model = prefixed(tiny_model(), reparameterization="linear", sharing="projection")
    projection, input_ = 5 * 2 * 2 * 8, 3 * 5 + 2 * 8  # P' and the offset on the keys
    assert model.get_nb_trainable_parameters()[0] == projection + 3 * (input_ + SCALING_SIZE)
    found = suggest_layers(model, batches(), projection + 2 * input_)
    assert (found.parameters, found.parameters_of_kept) == (projection + 3 * input_, projection + 2 * input_)
    assert len(found.layers) == 2
    assert len(suggest_layers(model, batches(), 1.0).layers) == 3
    with pytest.raises(
        ValueError, match=f"allows {projection} parameters, but layer 0 alone has {projection + input_}"
    ):
        suggest_layers(model, batches(), projection)


def test_a_number_counts_in_the_encoder_and_the_decoder_alike() -> None:
    model = prefixed(tiny_model("t5", "SEQ_2_SEQ_LM"))
    batch = {"input_ids": token_ids(), "labels": token_ids(2, 5, seed=1)}
    found = suggest_layers(model, [batch], 0.5)
    with torch.no_grad():
        without = []
        for number in (0, 1):
            layers = {name: layer for name, layer in prefix_layers(model).items() if f"block.{number}." in name}
            assert len(layers) == 3  # the encoder's, and the decoder's two
            for layer in layers.values():
                layer.enable_adapters(False)
            without.append(model(**batch).loss.item())
            for layer in layers.values():
                layer.enable_adapters(True)
        whole = model(**batch).loss.item()
    assert found.loss_increases == pytest.approx({n: loss - whole for n, loss in enumerate(without)}, abs=1e-6)
    assert found.layers == [max((0, 1), key=without.__getitem__)]


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = prefixed(tiny_model()).train()
    model.add_adapter("other", prefix_config(layers_to_transform=[0]))
    model.base_model.set_adapter(["default", "other"])
    with unchanged(model):
        suggest_layers(model, batches(), 1.0, "other")
        bad = [*batches(), {"input_ids": token_ids() + 1000, "labels": token_ids()}]
        with pytest.raises(IndexError):
            suggest_layers(model, bad, 0.5)
    assert model.training


def test_a_suggestion_is_shown_as_a_table() -> None:
    shown = repr(LayerSuggestion([1], {0: -0.25, 1: 1.5}, 2.0, 1.75, 2000, 1000))
    assert shown.splitlines() == [
        "layer    loss rises by  keep",
        "    0        -0.250000  no",
        "    1        +1.500000  yes",
        "loss: 2.000000 with all layers, 1.750000 with those kept",
        "parameters: 2,000 in all layers, 1,000 in those kept",
    ]


@pytest.mark.parametrize(
    ("data", "budget", "error", "message"),
    [
        (batches(), 0.0, ValueError, r"must be in \(0, 1\], got 0.0"),
        (batches(), 1.5, ValueError, r"must be in \(0, 1\], got 1.5"),
        (batches(), 0, ValueError, "must be at least 1, got 0"),
        (batches(), True, TypeError, "must be a number of parameters or a fraction, got True"),
        (batches(), ONE_LAYER - 1, ValueError, "layer 0 alone has 96"),
        ([], 0.5, ValueError, "0 batches without a single label"),
        ([{"input_ids": token_ids()}], 0.5, ValueError, r"the tensor `labels`, got \['input_ids'\]"),
        ([{"input_ids": token_ids(), "labels": token_ids() * 0 - 100}], 0.5, ValueError, "without a single label"),
    ],
)
def test_what_cannot_be_suggested_is_refused(data: Any, budget: Any, error: type[Exception], message: str) -> None:
    model = prefixed(tiny_model())
    with pytest.raises(error, match=message):
        suggest_layers(model, data, budget)


def test_an_adapter_that_is_not_active_is_refused() -> None:
    model = prefixed(tiny_model())
    model.add_adapter("other", prefix_config())
    with pytest.raises(ValueError, match=r"'other' is not active in model.layers.0.self_attn"):
        suggest_layers(model, batches(), 0.5, "other")
    with pytest.raises(ValueError, match="no PREFIX_PLUS adapter named 'none'"):
        suggest_layers(model, batches(), 0.5, "none")


# ---------------------------------------------------------------------------------------------------- prune_layers

FORMS = [
    ("none", "projection"),
    *((form, sharing) for form in ("linear", "mlp") for sharing in ("none", "input", "projection", "all")),
]


@pytest.mark.parametrize(("reparameterization", "sharing"), FORMS)
def test_a_pruned_adapter_is_the_adapter_with_the_other_layers_hidden(
    reparameterization: str, sharing: str, tmp_path: Path
) -> None:
    model = prefixed(tiny_model(), task_type="CAUSAL_LM", reparameterization=reparameterization, sharing=sharing)
    base = tiny_model()
    ids = token_ids()
    hidden = prefix_layers(model)["model.layers.0.self_attn"]
    hidden.enable_adapters(False)
    expected = output_of(model, input_ids=ids)
    hidden.enable_adapters(True)
    before = {id(parameter) for parameter in adapter_parameters(model).values()}
    prefixes = prefix_key_values(model)

    prune_layers(model, [1, 2])

    assert torch.equal(output_of(model, input_ids=ids), expected)
    assert model.peft_config["default"].layers_to_transform == [1, 2]
    assert list(prefix_layers(model)) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert {id(parameter) for parameter in adapter_parameters(model).values()} <= before
    for name, pair in prefix_key_values(model).items():
        assert all(torch.equal(*tensors) for tensors in zip(pair, prefixes[name], strict=True))
    # the first layer computes what the base model's does, with the model's own config
    of_layers = [m(input_ids=ids, output_hidden_states=True).hidden_states for m in (model, base)]
    assert torch.equal(of_layers[0][1], of_layers[1][1])
    layers = model.get_base_model().model.layers
    assert layers[0].self_attn.config is layers[0].mlp.config

    fresh = get_peft_model(tiny_model(), model.peft_config["default"])
    assert list(adapter_parameters(model)) == list(adapter_parameters(fresh))
    assert model.get_nb_trainable_parameters()[0] == fresh.get_nb_trainable_parameters()[0]
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    assert torch.equal(output_of(loaded, input_ids=ids), expected)


@pytest.mark.parametrize("sharing", ["none", "input", "projection", "all"])
def test_training_goes_on_with_the_same_optimizer(sharing: str) -> None:
    """As it would with the other layers hidden from the start of the second step."""

    def train(is_pruned: bool) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer, PeftModel]:
        torch.manual_seed(0)
        model = prefixed(tiny_model(), reparameterization="mlp", sharing=sharing)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(3):
            if step == 1 and is_pruned:
                prune_layers(model, [-1, 1])
            elif step == 1:
                prefix_layers(model)["model.layers.0.self_attn"]._disable_adapters = True
            model(**batches()[0]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = {name: pair for name, pair in prefix_key_values(model).items() if ".0." not in name}
        return {f"{name} {i}": pair[i] for name, pair in kept.items() for i in (0, 1)}, optimizer, model

    found, optimizer, model = train(is_pruned=True)
    expected, _, _ = train(is_pruned=False)
    assert found.keys() == expected.keys() and len(found) == 4
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert all(optimizer.state[parameter]["step"] == 3 for parameter in adapter_parameters(model).values())


def test_gradients_of_what_is_gone_are_gone() -> None:
    model = prefixed(tiny_model())
    gone = dict(adapter_parameters(model))
    model(**batches()[0]).loss.backward()
    prune_layers(model, 2)
    kept = adapter_parameters(model)
    assert len(kept) == 2 and all(parameter.grad is not None for parameter in kept.values())
    assert all(parameter.grad is None for name, parameter in gone.items() if name not in kept)


def test_another_adapter_keeps_all_its_layers() -> None:
    model = prefixed(tiny_model(), reparameterization="linear", sharing="all")
    model.add_adapter("other", prefix_config())
    model.set_adapter("other")
    expected = output_of(model, input_ids=token_ids())
    prune_layers(model, [2])
    assert torch.equal(output_of(model, input_ids=token_ids()), expected)
    assert list(prefix_key_values(model)) == ["model.layers.2.self_attn"]
    assert len(prefix_key_values(model, "other")) == 3


@pytest.mark.parametrize("sharing", ["input", "projection", "all"])
def test_each_shape_keeps_its_shared_parts(sharing: str, tmp_path: Path) -> None:
    """Layers whose keys and values have another shape have a projection of their own, which also moves."""
    model = prefixed(two_shapes(), task_type="CAUSAL_LM", reparameterization="mlp", sharing=sharing)
    prefixes = prefix_key_values(model)
    prune_layers(model, [2, 3])
    model.save_pretrained(str(tmp_path))
    loaded = prefix_key_values(PeftModel.from_pretrained(two_shapes(), str(tmp_path)))
    assert [name.split(".")[-2] for name in loaded] == ["2", "3"]
    for name, pair in loaded.items():
        assert all(torch.equal(*tensors) for tensors in zip(pair, prefixes[name], strict=True))


def test_modules_that_write_the_formula_out_are_pruned_too() -> None:
    case = Case("CAUSAL_LM", "gptj", "GPTJForCausalLM")
    model, inputs = prefixed(tiny_model_of_case(case)), {"input_ids": token_ids() + 80}
    list(prefix_layers(model).values())[1].enable_adapters(False)
    expected = output_of(model, **inputs)
    prune_layers(model, [0])
    assert torch.equal(output_of(model, **inputs), expected)
    attention = model.get_base_model().transformer.h[1].attn
    assert not attention._forward_pre_hooks and not attention._forward_hooks


def test_a_model_without_peft_model_around_it() -> None:
    model = tiny_model()
    model.add_adapter(prefix_config(), "mine")
    prune_layers(model, [0], "mine")
    assert list(prefix_key_values(model, "mine")) == ["model.layers.0.self_attn"]
    tuner = PrefixPlusModel(tiny_model(), prefix_config(), "default")
    prune_layers(tuner, [0])
    assert list(prefix_key_values(tuner)) == ["model.layers.0.self_attn"]


@pytest.mark.parametrize(
    ("fields", "layers", "error", "message"),
    [
        ({}, [0, 3], ValueError, "names layer 3, which is out of range or has no attention module"),
        ({"layers_to_transform": [0, 1]}, [2], ValueError, "names layer 2"),
        ({}, [], ValueError, "is an empty list"),
        ({}, ["0"], TypeError, "must be an int, a list of ints or None"),
        ({"target_modules": r".*self_attn"}, [0], ValueError, "has the regular expression '.*self_attn'"),
    ],
)
def test_what_cannot_be_pruned_is_refused(fields: Any, layers: Any, error: type[Exception], message: str) -> None:
    model = prefixed(tiny_model(), **fields)
    with unchanged(model), pytest.raises(error, match=message):
        prune_layers(model, layers)


def test_layers_that_the_numbers_cannot_name_are_refused() -> None:
    sizes = {"num_layers": 2, "num_decoder_layers": 3}
    model = prefixed(tiny_model("t5", "SEQ_2_SEQ_LM", **sizes), layers_to_transform=[-1])
    assert sorted({name.partition(".layer.")[0] for name in prefix_key_values(model)}) == [
        "decoder.block.2",
        "encoder.block.1",
    ]
    with unchanged(model), pytest.raises(ValueError, match=r"would choose decoder.block.1.layer.0.SelfAttention too"):
        prune_layers(model, [1])
    prune_layers(model, [-1])
    assert len(prefix_key_values(model)) == 3


def test_a_pattern_and_names_go_on_counting() -> None:
    fields = {"layers_pattern": "layers", "layers_to_transform": [0, 1], "target_modules": ["self_attn"]}
    model = prefixed(tiny_model(), **fields)
    prune_layers(model, 1)
    config = model.peft_config["default"]
    assert (config.layers_pattern, config.layers_to_transform, config.target_modules) == ("layers", [1], ["self_attn"])
    state = {key: tensor for key, tensor in model.state_dict().items() if "prefix_plus" in key}
    other = get_peft_model(tiny_model(), config).eval()
    set_peft_model_state_dict(other, {key.replace(".default", ""): tensor for key, tensor in state.items()})
    assert torch.equal(output_of(other, input_ids=token_ids()), output_of(model, input_ids=token_ids()))
