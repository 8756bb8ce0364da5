"""How much attention the prefix draws, compared with the weights that eager attention returns."""

from __future__ import annotations

import copy
import math
import types
from typing import Any

import pytest
import torch
import transformers
from models import GATE_SCALE, prefix_config, prefixed, tiny_model, token_ids, unchanged
from peft import get_peft_model
from tiny_models import Case
from tiny_models import tiny_model as tiny_model_of_case

from peft_prefix_plus import prefix_attention_mass
from peft_prefix_plus.attention import Prefix
from peft_prefix_plus.attention import observed as mass_module


LENGTH = 3
RIGHT_PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
LEFT_PADDED = RIGHT_PADDED.flip(1)
TOLERANCE = dict(rtol=0, atol=1e-6)  # eager attention takes its softmax in float32, whatever the model's dtype


def mean_over_real(weights: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over the real queries of weights (batch, heads, queries), for each head."""
    mask = torch.ones(weights.shape[0], weights.shape[2]) if mask is None else mask
    return torch.stack([weights[:, head][mask.bool()].mean() for head in range(weights.shape[1])])


def expected_masses(attentions: Any, mask: torch.Tensor | None, columns: slice = slice(LENGTH)) -> list[torch.Tensor]:
    """What the model's own attention weights, which begin with the prefix, say."""
    return [mean_over_real(weights[..., columns].sum(dim=-1), mask) for weights in attentions]


def assert_masses(found: dict[str, torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for (name, mass), reference in zip(found.items(), expected, strict=True):
        assert reference.min() > 0.01 and reference.max() < 0.99, "a mass that is next to 0 or 1 tells nothing"
        torch.testing.assert_close(
            mass, reference, msg=lambda text, name=name: f"{name}: {text}", check_dtype=False, **TOLERANCE
        )


@pytest.fixture
def few_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few scores at a time that the queries come in several chunks, the last one shorter."""
    monkeypatch.setattr(mass_module, "MAX_SCORES", 2 * 2 * 4 * 7)


# ------------------------------------------------------------------------------------------- the formula


def drawn(tokens: int = 7, kv_tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor, Prefix]:
    query = torch.randn(2, 4, tokens, 8, dtype=torch.float64)
    key = torch.randn(2, 2, kv_tokens, 8, dtype=torch.float64)
    prefix = torch.randn(2, LENGTH, 8, dtype=torch.float64)
    return query, key, Prefix(prefix, prefix)


def formula(
    query: torch.Tensor,
    key: torch.Tensor,
    prefix: Prefix,
    added: Any,
    scale: float,
    softcap: Any = None,
    sinks: Any = None,
) -> torch.Tensor:
    """The first columns of softmax([s · Q P_Kᵀ ; s · Q Kᵀ + added ; sinks]), row by row."""
    found = torch.empty(*query.shape[:3], prefix.key.shape[1], dtype=torch.float64)
    added = torch.as_tensor(added, dtype=torch.float64).expand(*query.shape[:3], key.shape[2])
    for row, head, token in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        all_keys = torch.cat([prefix.key[head // 2], key[row, head // 2]])
        scores = scale * all_keys @ query[row, head, token]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores[LENGTH:] += added[row, head, token]
        if sinks is not None:
            scores = torch.cat([scores, sinks[head, None]])
        found[row, head, token] = scores.softmax(-1)[:LENGTH]
    return found


@pytest.mark.parametrize(
    "extra", [{}, {"softcap": 2.0}, {"sinks": torch.randn(4).double()}, {"softcap": 3.0, "sinks": torch.ones(4)}]
)
@pytest.mark.parametrize("form", ["none", "bool", "additive", "causal", "bias"])
def test_probabilities_of_the_prefix_are_the_formula(few_scores: None, form: str, extra: dict[str, Any]) -> None:
    query, key, prefix = drawn()
    visible = torch.rand(2, 1, 7, 9) < 0.6
    visible[0, :, 2] = False  # a query that sees nothing but the prefix
    bias = torch.randn(1, 4, 7, 9).double()
    later = torch.arange(9)[None, :] > torch.arange(7)[:, None]
    mask, added = {
        "none": (None, 0.0),
        "bool": (visible, torch.zeros(visible.shape).masked_fill(~visible, -math.inf)),
        "additive": (bias, bias),
        "causal": (None, torch.zeros(7, 9).masked_fill(later, -math.inf)),
        "bias": (visible, bias.masked_fill(~visible, -math.inf)),
    }[form]
    found = mass_module.prefix_probabilities(
        query, key, prefix, query, mask, form == "causal", 0.3, bias if form == "bias" else None, **extra
    )
    torch.testing.assert_close(found, formula(query, key, prefix, added, 0.3, **extra), rtol=0, atol=1e-12)


def of_call(
    implementation: str, query: torch.Tensor, key: torch.Tensor, prefix: Prefix, mask: Any, **kwargs: Any
) -> Any:
    config = types.SimpleNamespace(_attn_implementation=implementation)
    module = types.SimpleNamespace(config=config, is_causal=True)
    return mass_module.probabilities_of_call(module, query, key, mask, prefix, query, None, kwargs)


@pytest.mark.parametrize("size", [None, 3])
def test_flash_attention_counts_back_from_the_last_key(size: int | None) -> None:
    query, key, prefix = drawn()
    padding = torch.ones(2, 9).long()
    padding[0, :2] = 0
    distance = torch.arange(7)[:, None] + 2 - torch.arange(9)[None, :]
    visible = (distance >= 0) & (distance < (size or 9)) & padding[:, None, None, :].bool()
    added = torch.zeros(visible.shape).masked_fill(~visible, -math.inf)
    extra = {"softcap": 2.0, "sinks": torch.randn(4).double()}
    call = {"sliding_window": size, "softcap": extra["softcap"], "s_aux": extra["sinks"]}
    found = of_call("flash_attention_2", query, key, prefix, padding, scaling=0.3, **call)
    torch.testing.assert_close(found, formula(query, key, prefix, added, 0.3, **extra), rtol=0, atol=1e-12)


def test_flex_attentions_block_mask_is_read() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    query, key, prefix = drawn()
    block_mask = create_block_mask(lambda b, h, q, kv: kv <= q + b, B=2, H=None, Q_LEN=7, KV_LEN=9, device="cpu")
    later = torch.arange(9) > torch.arange(7)[:, None] + torch.arange(2)[:, None, None, None]
    added = torch.zeros(later.shape).masked_fill(later, -math.inf)
    found = of_call("flex_attention", query, key, prefix, block_mask, scaling=0.3)
    torch.testing.assert_close(found, formula(query, key, prefix, added, 0.3), rtol=0, atol=1e-12)


def test_calls_that_do_not_tell_are_refused() -> None:
    query, key, prefix = drawn()
    with pytest.raises(ValueError, match="The attention of SimpleNamespace returns no weights"):
        of_call("eager", query, key, prefix, None)
    with pytest.raises(ValueError, match="uses the paged cache"):
        of_call("sdpa", query, key, prefix, None, cache=object())
    with pytest.raises(ValueError, match="have 9 columns, expected 3 of the prefix and 9"):
        mass_module.probabilities_of_call(None, query, key, None, prefix, query, torch.rand(2, 4, 7, 9), {})


# ------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("mask", [None, RIGHT_PADDED, LEFT_PADDED], ids=["whole", "right", "left"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_decoders(few_scores: None, architecture: str, implementation: str, mask: torch.Tensor | None) -> None:
    inputs = {"input_ids": token_ids(), **({} if mask is None else {"attention_mask": mask})}
    torch.manual_seed(0)
    eager = prefixed(tiny_model(architecture, implementation="eager", dtype=torch.float64))
    torch.manual_seed(0)
    model = prefixed(tiny_model(architecture, implementation=implementation, dtype=torch.float64))
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    assert_masses(prefix_attention_mass(model, **inputs), expected_masses(attentions, mask))


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [("gemma2", "Gemma2ForCausalLM"), ("gpt_oss", "GptOssForCausalLM"), ("deepseek_v3", "DeepseekV3ForCausalLM")],
    ids=["soft-capped", "sinks", "latent"],
)
def test_special_scores(model_type: str, class_name: str) -> None:
    model = tiny_model_of_case(Case("CAUSAL_LM", model_type, class_name))
    model.set_attn_implementation("eager")
    adapted = prefixed(model)
    inputs = {"input_ids": token_ids() + 80, "attention_mask": LEFT_PADDED}
    with torch.no_grad():
        attentions = adapted(**inputs, output_attentions=True).attentions
    expected = expected_masses(attentions, LEFT_PADDED)
    assert_masses(prefix_attention_mass(adapted, **inputs), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("has_decoder_mask", [False, True])
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_each_part_of_an_encoder_decoder_has_its_own_mask(
    few_scores: None, architecture: str, has_decoder_mask: bool, implementation: str
) -> None:
    inputs = {"input_ids": token_ids(), "attention_mask": RIGHT_PADDED, "decoder_input_ids": token_ids(2, 5, seed=1)}
    decoder_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) if has_decoder_mask else None
    if has_decoder_mask:
        inputs["decoder_attention_mask"] = decoder_mask
    torch.manual_seed(0)
    eager = prefixed(tiny_model(architecture, "SEQ_2_SEQ_LM", "eager", torch.float64))
    torch.manual_seed(0)
    model = prefixed(tiny_model(architecture, "SEQ_2_SEQ_LM", implementation, torch.float64))
    with torch.no_grad():
        outputs = eager(**inputs, output_attentions=True)
    of_encoder = expected_masses(outputs.encoder_attentions, RIGHT_PADDED)
    of_self = expected_masses(outputs.decoder_attentions, decoder_mask)
    of_cross = expected_masses(outputs.cross_attentions, decoder_mask)
    of_decoder = [mass for pair in zip(of_self, of_cross, strict=True) for mass in pair]
    assert_masses(prefix_attention_mass(model, **inputs), of_encoder + of_decoder)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_encoders(implementation: str) -> None:
    inputs = {"input_ids": token_ids(), "attention_mask": RIGHT_PADDED}
    torch.manual_seed(0)
    eager = prefixed(tiny_model("bert", "SEQ_CLS", "eager", torch.float64))
    torch.manual_seed(0)
    model = prefixed(tiny_model("bert", "SEQ_CLS", implementation, torch.float64))
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    assert_masses(prefix_attention_mass(model, **inputs), expected_masses(attentions, RIGHT_PADDED))


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [("gptj", "GPTJForCausalLM"), ("bloom", "BloomForCausalLM"), ("falcon", "FalconForCausalLM")],
)
def test_modules_that_write_the_formula_out(few_scores: None, model_type: str, class_name: str) -> None:
    """Their weights are those of the real tokens: what is missing to one is on the prefix."""
    model = tiny_model_of_case(Case("CAUSAL_LM", model_type, class_name))
    eager = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    eager = prefixed(eager)
    torch.manual_seed(0)
    model = prefixed(model)
    inputs = {"input_ids": token_ids() + 80, "attention_mask": RIGHT_PADDED}
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    expected = [mean_over_real(1 - weights.sum(dim=-1), RIGHT_PADDED) for weights in attentions]
    assert_masses(prefix_attention_mass(model, **inputs), expected)


def test_queries_after_a_cache() -> None:
    torch.manual_seed(0)
    eager = prefixed(tiny_model("llama", implementation="eager", dtype=torch.float64))
    torch.manual_seed(0)
    model = prefixed(tiny_model("llama", implementation="sdpa", dtype=torch.float64))
    ids = token_ids()
    with torch.no_grad():
        attentions = eager(input_ids=ids, attention_mask=RIGHT_PADDED, output_attentions=True).attentions
        cache = model(input_ids=ids[:, :2], attention_mask=RIGHT_PADDED[:, :2]).past_key_values
    expected = expected_masses([weights[:, :, 2:] for weights in attentions], RIGHT_PADDED[:, 2:])
    found = prefix_attention_mass(model, input_ids=ids[:, 2:], attention_mask=RIGHT_PADDED, past_key_values=cache)
    assert_masses(found, expected)


def test_several_adapters_have_their_parts_of_the_mass() -> None:
    def made(implementation: str) -> Any:
        torch.manual_seed(0)
        model = prefixed(tiny_model("llama", implementation=implementation, dtype=torch.float64))
        model.add_adapter("other", prefix_config(num_virtual_tokens=5, layers_to_transform=[0, 2]))
        model.base_model.set_adapter(["other", "default"])
        return model.eval()

    model, inputs = made("sdpa"), {"input_ids": token_ids()}
    with torch.no_grad():
        attentions = made("eager")(**inputs, output_attentions=True).attentions
    both = [attentions[0], attentions[2]]
    names = ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    of_other, of_default = (
        prefix_attention_mass(model, "other", **inputs),
        prefix_attention_mass(model, "default", **inputs),
    )
    assert list(of_other) == names
    assert_masses(of_other, expected_masses(both, None, slice(5)))
    assert_masses({name: of_default[name] for name in names}, expected_masses(both, None, slice(5, 8)))
    total = prefix_attention_mass(model, **inputs)
    for name, mass in total.items():
        torch.testing.assert_close(mass, of_default[name] + of_other.get(name, 0.0))


@pytest.mark.parametrize(
    "model", [lambda: tiny_model(), lambda: tiny_model_of_case(Case("CAUSAL_LM", "gptj", "GPTJForCausalLM"))]
)
def test_a_gated_prefix_counts_by_its_gate(model: Any) -> None:
    adapted = prefixed(model(), gating=True)
    gate = torch.tensor([0.0, 1.0, -2.0, 0.1])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "prefix_plus_gate" in name:
                parameter.copy_(gate / GATE_SCALE)
    for mass in prefix_attention_mass(adapted, input_ids=token_ids()).values():
        torch.testing.assert_close(mass, gate.tanh().abs())


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = prefixed(tiny_model("llama")).train()
    inputs = {"input_ids": token_ids()}
    with torch.no_grad():
        expected = model(**inputs).logits
    with unchanged(model):
        prefix_attention_mass(model, **inputs)
        with pytest.raises(IndexError):
            prefix_attention_mass(model, input_ids=token_ids() + 1000)
    assert model.training
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_a_float32_adapter_over_a_bfloat16_model() -> None:
    model = prefixed(tiny_model("llama", dtype=torch.bfloat16))
    reference = prefixed(tiny_model("llama", dtype=torch.float32))
    reference.load_state_dict(model.state_dict())
    found = prefix_attention_mass(model, input_ids=token_ids())
    expected = prefix_attention_mass(reference, input_ids=token_ids())
    for name, mass in found.items():
        assert mass.dtype == torch.float32
        torch.testing.assert_close(
            mass, expected[name], rtol=0, atol=0.02
        )  # the model's own rounding of queries and keys


def test_a_vision_tower_has_no_padding() -> None:
    config = transformers.CLIPConfig(
        text_config=dict(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=2,
        ),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
        ),
    )
    model = transformers.CLIPModel._from_config(config, attn_implementation="eager").eval()
    adapted = get_peft_model(model, prefix_config(target_modules=["self_attn"])).eval()
    inputs = {"input_ids": token_ids(), "attention_mask": RIGHT_PADDED, "pixel_values": torch.randn(2, 3, 8, 8)}
    with torch.no_grad():
        outputs = adapted(**inputs, output_attentions=True)
    of_text = expected_masses(outputs.text_model_output.attentions, RIGHT_PADDED)
    of_images = expected_masses(outputs.vision_model_output.attentions, None)
    found = prefix_attention_mass(adapted, **inputs)
    assert_masses({name: mass for name, mass in found.items() if "text" in name}, of_text)
    assert_masses({name: mass for name, mass in found.items() if "vision" in name}, of_images)


def test_what_cannot_be_measured_is_refused() -> None:
    model = prefixed(tiny_model("llama"))
    ids = token_ids()
    with pytest.raises(ValueError, match="no active PREFIX_PLUS adapter named 'other'"):
        prefix_attention_mass(model, "other", input_ids=ids)
    with model.disable_adapter(), pytest.raises(ValueError, match="no active PREFIX_PLUS adapter"):
        prefix_attention_mass(model, input_ids=ids)
    with pytest.raises(ValueError, match="no active PREFIX_PLUS adapter"):
        prefix_attention_mass(tiny_model("llama"), input_ids=ids)
    with pytest.raises(ValueError, match=r"`attention_mask` must be of shape \(batch, tokens\).*got \(2, 1, 7, 7\)"):
        prefix_attention_mass(model, input_ids=ids, attention_mask=torch.ones(2, 1, 7, 7).bool())
    with pytest.raises(ValueError, match="marks every token as padding"):
        prefix_attention_mass(model, input_ids=ids, attention_mask=torch.zeros(2, 7).long())
    with pytest.raises(ValueError, match="`adapter_names` gives the rows"):
        prefix_attention_mass(model, input_ids=ids, adapter_names=["default", "default"])


def test_queries_that_the_mask_does_not_fit_are_refused() -> None:
    model = prefixed(tiny_model_of_case(Case("SEQ_CLS", "canine", "CanineForSequenceClassification")))
    inputs = {"input_ids": token_ids(2, 8) + 80}
    assert prefix_attention_mass(model, **inputs)
    mask = torch.ones(2, 8).long()
    mask[1, 6:] = 0
    with pytest.raises(ValueError, match="queries, so which of them are padding cannot be told"):
        prefix_attention_mass(model, **inputs, attention_mask=mask)
