"""How much of attention's output comes from the prefix, compared with the formula in float64, and with modules run without it."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from models import GATE_SCALE, prefix_config, prefix_layers, prefixed, tiny_model, token_ids, unchanged
from peft import get_peft_model
from tiny_models import Case
from tiny_models import tiny_model as tiny_model_of_case
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_prefix_plus import PrefixPlusConfig, prefix_attention_mass, prefix_contribution, prefix_key_values
from peft_prefix_plus.attention import prefix_attention
from peft_prefix_plus.attention.watching import unwatched, watching


RIGHT_PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
LEFT_PADDED = RIGHT_PADDED.flip(1)
FORMS: dict[str, dict[str, Any]] = {"decoupled": {"decoupled": True}, "joint": {}, "gated": {"gating": True}}
CAP = 6.0


def mean_over_real(numbers: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over the real queries of numbers (batch, heads, queries), for each head."""
    mask = torch.ones(numbers.shape[0], numbers.shape[2]) if mask is None else mask
    return torch.stack([numbers[:, head][mask.bool()].mean() for head in range(numbers.shape[1])])


def share(given: torch.Tensor, of_real: torch.Tensor) -> torch.Tensor:
    """‖p‖ / (‖p‖ + ‖x‖) of vectors (…, dim)."""
    size, real = given.square().sum(-1).sqrt(), of_real.square().sum(-1).sqrt()
    return size / (size + real)


def assert_contributions(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-9
) -> None:
    assert list(found) == list(expected)
    for name, reference in expected.items():
        assert reference.min() > 0.01 and reference.max() < 0.99, "a contribution that is next to 0 or 1 tells nothing"
        torch.testing.assert_close(
            found[name],
            reference.to(found[name].dtype),
            rtol=0,
            atol=tolerance,
            msg=lambda text, n=name: f"{n}: {text}",
        )


# ------------------------------------------------------------------------------------------- the formula


def calls_of(model: Any, inputs: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]]:
    """Queries, keys and values as they enter each module's attention, and the cosines and sines that turned them."""
    found: dict[str, Any] = {}
    embeddings: dict[str, Any] = {}
    watchers, hooks = {}, []
    for name, layer in prefix_layers(model).items():

        def keep(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            embeddings[name] = kwargs["position_embeddings"]

        def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, name: str = name, **kwargs: Any) -> Any:
            found[name] = (query, key, value, embeddings[name])
            with unwatched():
                return prefix_attention(module, query, key, value, *args, **kwargs)

        hooks.append(layer.attention.register_forward_pre_hook(keep, with_kwargs=True))
        watchers[layer.attention] = attend
    with torch.no_grad(), watching(watchers, {}):
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def turned_back(query: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Queries before Llama's rotation: turned by the angles with the other sign."""
    cos, sin = (each.double()[:, None] for each in embeddings)
    first, second = query.chunk(2, dim=-1)
    return query * cos - torch.cat([-second, first], dim=-1) * sin


def formula(model: Any, names: list[str], call: Any, module: str, mask: torch.Tensor | None) -> Any:
    """What each adapter and the real tokens give to the output of a Llama's attention, (batch, heads, tokens, dim) each."""
    query, key, value, embeddings = call
    batch, heads, tokens, dim = query.shape
    layer = prefix_layers(model)[module]
    given = {name: torch.zeros_like(query) for name in names}
    of_real = torch.zeros_like(query)
    free = turned_back(query, embeddings)
    prefixes = {name: prefix_key_values(model, name)[module] for name in names}
    for row, head, token in itertools.product(range(batch), range(heads), range(tokens)):
        group = head // (heads // key.shape[1])
        real_scores = key[row, group] @ query[row, head, token] / math.sqrt(dim)
        for other in range(tokens):
            if other > token or (mask is not None and not mask[row, other]):
                real_scores[other] = -math.inf
        scores = {}
        for name, (prefix_key, _) in prefixes.items():
            own = free if layer.is_position_free[name] else query
            scores[name] = prefix_key[group].double() @ own[row, head, token] / math.sqrt(dim)
        joint = [name for name in names if not (model.peft_config[name].decoupled or model.peft_config[name].gating)]
        shared = torch.cat([*[scores[name] for name in joint], real_scores]).exp()
        start = 0
        for name in names:
            prefix_value = prefixes[name][1][group].double()
            if name in joint:
                weights = shared[start : start + len(prefix_value)] / shared.sum()
                start += len(prefix_value)
            elif model.peft_config[name].decoupled:
                capped = CAP * torch.tanh(scores[name] / CAP)
                weights = capped / (1 + torch.exp(-capped))
            else:
                gate = GATE_SCALE * layer.prefix_plus_gate[name][head].double()
                weights = torch.tanh(gate) * scores[name].exp() / scores[name].exp().sum()
            given[name][row, head, token] = weights @ prefix_value
        of_real[row, head, token] = (shared[start:] / shared.sum()) @ value[row, group]
    return given, of_real


def flash(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any) -> Any:
    """What flash attention promises, in the dtype of its inputs: a 2-D mask, and queries that are the last of the keys."""
    tokens, kv_tokens = query.shape[2], key.shape[2]
    visible = torch.ones(tokens, kv_tokens, dtype=torch.bool).tril(kv_tokens - tokens)[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None].bool()
    return plain(query, key, value, visible, scaling), None


def flex(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any) -> Any:
    """What flex attention promises, in the dtype of its inputs: a block mask."""
    mask_mod = attention_mask.mask_mod
    visible = create_mask(mask_mod, query.shape[0], 1, query.shape[2], key.shape[2], device="cpu")
    return plain(query, key, value, visible, scaling), None


def plain(query: Any, key: Any, value: Any, visible: Any, scaling: float) -> Any:
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


IMPLEMENTATIONS = {"eager": None, "sdpa": None, "flash_attention_2": flash, "flex_attention": flex}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation; in the place of a kernel that is not for CPUs or float64, what it promises."""
    function = IMPLEMENTATIONS[request.param]
    if function is flex:  # transformers compiles its masks, which takes long

        def not_compiled(*args: Any, **kwargs: Any) -> Any:
            return create_block_mask(*args, **{**kwargs, "_compile": False})

        monkeypatch.setattr(masking_utils, "create_block_mask", not_compiled)
    if function is not None:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, request.param, function)
    return request.param


def llama(implementation: str, **fields: Any) -> Any:
    model = prefixed(tiny_model("llama", dtype=torch.float64), **fields).double()
    model.get_base_model().config._attn_implementation = implementation
    return model


@pytest.mark.parametrize("mask", [None, RIGHT_PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("position_free", [True, False], ids=["free", "fixed"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_measured_by_its_formula(
    implementation: str, form: str, position_free: bool, mask: torch.Tensor | None
) -> None:
    model = llama(implementation, position_free=position_free, **FORMS[form])
    inputs = {"input_ids": token_ids(), **({} if mask is None else {"attention_mask": mask})}
    expected = {}
    for name, call in calls_of(model, inputs).items():
        given, of_real = formula(model, ["default"], call, name, mask)
        expected[name] = mean_over_real(share(given["default"], of_real), mask)
    # eager attention takes its softmax in float32, and rotary angles are float32 in any model
    assert_contributions(prefix_contribution(model, **inputs), expected, 1e-6)


def test_adapters_of_all_forms_are_measured_together_and_apart() -> None:
    model = llama("sdpa")
    model.add_adapter("decoupled", prefix_config(num_virtual_tokens=5, decoupled=True))
    model.add_adapter("gated", prefix_config(num_virtual_tokens=4, gating=True, layers_to_transform=[0, 2]))
    model.add_adapter("fixed", prefix_config(num_virtual_tokens=2, position_free=False))
    names = ["fixed", "decoupled", "gated", "default"]
    model.base_model.set_adapter(names)
    model.double().eval()
    inputs = {"input_ids": token_ids(), "attention_mask": LEFT_PADDED}
    expected: dict[Any, dict[str, torch.Tensor]] = {name: {} for name in [None, *names]}
    for module, call in calls_of(model, inputs).items():
        present = [name for name in names if name != "gated" or module[13] in "02"]
        given, of_real = formula(model, present, call, module, LEFT_PADDED)
        given[None] = sum(given.values())
        for name, vectors in given.items():
            expected[name][module] = mean_over_real(share(vectors, of_real), LEFT_PADDED)
    for name, contributions in expected.items():
        assert_contributions(prefix_contribution(model, name, **inputs), contributions, 1e-6)


# ------------------------------------------------------------------------------------------- other architectures


OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "o")


def outputs_by_head(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Of each module: its output before the output projection with the prefix and, for the same input, without it."""
    found: dict[str, Any] = {}
    hooks, heads = [], model.config.num_attention_heads
    for name, layer in prefix_layers(model).items():
        projection = next(child for each in OUTPUT_PROJECTIONS if (child := getattr(layer.attention, each, None)))

        def keep(module: Any, args: Any, name: str = name) -> None:
            found.setdefault(name, []).append(args[0].unflatten(-1, (heads, -1)).transpose(1, 2).double())

        def again(module: Any, args: Any, kwargs: Any, output: Any, name: str = name, layer: Any = layer) -> None:
            if len(found[name]) == 1:
                layer.enable_adapters(False)
                module(*args, **kwargs)
                layer.enable_adapters(True)

        hooks.append(projection.register_forward_pre_hook(keep))
        hooks.append(layer.attention.register_forward_hook(again, with_kwargs=True))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("form", ["decoupled", "gated"])
@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("gptj", "GPTJForCausalLM"),
        ("bloom", "BloomForCausalLM"),
        ("falcon", "FalconForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
    ],
)
def test_what_is_added_to_a_modules_output_is_its_contribution(model_type: str, class_name: str, form: str) -> None:
    model = prefixed(tiny_model_of_case(Case("CAUSAL_LM", model_type, class_name)), **FORMS[form]).double()
    inputs = {"input_ids": token_ids() + 80, "attention_mask": RIGHT_PADDED}
    expected = {
        name: mean_over_real(share(with_prefix - without, without), RIGHT_PADDED)
        for name, (with_prefix, without) in outputs_by_head(model, inputs).items()
    }
    assert_contributions(prefix_contribution(model, **inputs), expected, 1e-6)


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [("gptj", "GPTJForCausalLM"), ("bloom", "BloomForCausalLM"), ("falcon", "FalconForCausalLM")],
)
def test_a_joint_prefix_takes_from_the_real_tokens_where_modules_write_the_formula_out(
    model_type: str, class_name: str
) -> None:
    base = tiny_model_of_case(Case("CAUSAL_LM", model_type, class_name))
    eager: Any = type(base)._from_config(copy.deepcopy(base.config), attn_implementation="eager").eval()
    eager.load_state_dict(base.state_dict())
    torch.manual_seed(0)
    eager = prefixed(eager).double()
    torch.manual_seed(0)
    model = prefixed(base).double()
    inputs = {"input_ids": token_ids() + 80, "attention_mask": RIGHT_PADDED}
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    expected = {}
    for weights, (name, (with_prefix, without)) in zip(
        attentions, outputs_by_head(model, inputs).items(), strict=True
    ):
        of_real = weights.double().sum(-1, keepdim=True) * without  # what is missing to one is on the prefix
        expected[name] = mean_over_real(share(with_prefix - of_real, of_real), RIGHT_PADDED)
    assert_contributions(prefix_contribution(model, **inputs), expected, 1e-6)


@pytest.mark.parametrize("has_decoder_mask", [False, True])
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_each_part_of_an_encoder_decoder_has_its_own_mask(architecture: str, has_decoder_mask: bool) -> None:
    model = prefixed(tiny_model(architecture, "SEQ_2_SEQ_LM", dtype=torch.float64), decoupled=True).double()
    inputs = {"input_ids": token_ids(), "attention_mask": RIGHT_PADDED, "decoder_input_ids": token_ids(2, 5, seed=1)}
    decoder_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) if has_decoder_mask else None
    if has_decoder_mask:
        inputs["decoder_attention_mask"] = decoder_mask
    expected = {
        name: mean_over_real(
            share(with_prefix - without, without), decoder_mask if "decoder" in name else RIGHT_PADDED
        )
        for name, (with_prefix, without) in outputs_by_head(model, inputs).items()
    }
    assert_contributions(prefix_contribution(model, **inputs), expected)


def test_queries_after_a_cache() -> None:
    model, ids = llama("sdpa", decoupled=True), token_ids()
    whole = prefix_contribution(model, input_ids=ids)
    first = prefix_contribution(model, input_ids=ids[:, :2])
    with torch.no_grad():
        cache = model(input_ids=ids[:, :2]).past_key_values
    rest = prefix_contribution(model, input_ids=ids[:, 2:], past_key_values=cache)
    for name, mean in whole.items():
        torch.testing.assert_close((2 * first[name] + 5 * rest[name]) / 7, mean, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------- what it is for


@pytest.mark.parametrize("fields", [{}, {"gating": True}, {"decoupled": False}], ids=["decoupled", "gated", "joint"])
@pytest.mark.parametrize("is_inline", [False, True], ids=["interface", "inline"])
def test_a_prefix_contributes_nothing_before_training(is_inline: bool, fields: dict[str, Any]) -> None:
    base = tiny_model_of_case(Case("CAUSAL_LM", "gptj", "GPTJForCausalLM")) if is_inline else tiny_model()
    model = get_peft_model(base, PrefixPlusConfig(task_type="CAUSAL_LM", **fields))
    for of_heads in prefix_contribution(model, input_ids=token_ids()).values():
        assert torch.equal(of_heads, torch.zeros(4))


def test_values_without_end_contribute_everything() -> None:
    model = prefixed(tiny_model(), decoupled=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".value"):
                parameter.mul_(1e6)
    for of_heads in prefix_contribution(model, input_ids=token_ids()).values():
        assert (of_heads > 0.999).all() and (of_heads <= 1.0).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_float32_adapter_over_a_bfloat16_model(form: str) -> None:
    model = prefixed(tiny_model("llama", dtype=torch.bfloat16), **FORMS[form])
    reference = prefixed(tiny_model("llama", dtype=torch.float32), **FORMS[form])
    reference.load_state_dict(model.state_dict())
    expected = prefix_contribution(reference, input_ids=token_ids())
    for name, of_heads in prefix_contribution(model, input_ids=token_ids()).items():
        assert of_heads.dtype == torch.float32
        # the model's own rounding of queries, keys and outputs
        torch.testing.assert_close(of_heads, expected[name], rtol=0, atol=0.02)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = prefixed(tiny_model("llama"), decoupled=True).train()
    with unchanged(model):
        prefix_contribution(model, input_ids=token_ids())
        with pytest.raises(IndexError):
            prefix_contribution(model, input_ids=token_ids() + 1000)
    assert model.training


def test_what_cannot_be_measured_is_refused() -> None:
    model, ids = prefixed(tiny_model("llama"), decoupled=True), token_ids()
    with pytest.raises(ValueError, match=r"is decoupled.*Use prefix_contribution"):
        prefix_attention_mass(model, input_ids=ids)
    with pytest.raises(ValueError, match="no active PREFIX_PLUS adapter named 'other'"):
        prefix_contribution(model, "other", input_ids=ids)
    with model.disable_adapter(), pytest.raises(ValueError, match="no active PREFIX_PLUS adapter"):
        prefix_contribution(model, input_ids=ids)
    with pytest.raises(ValueError, match="marks every token as padding"):
        prefix_contribution(model, input_ids=ids, attention_mask=torch.zeros(2, 7).long())
    with pytest.raises(ValueError, match="`adapter_names` gives the rows"):
        prefix_contribution(model, input_ids=ids, adapter_names=["default", "default"])
