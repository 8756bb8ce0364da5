"""How the probe reaches attention: wrappers of several models, models that cannot be run, inputs that the user gives."""

from __future__ import annotations

import time

import beyond_text
import pytest
import tiny_models
import torch
import transformers
from models import adapter_parameters, prefix_config, prefix_layers, tiny_model, unchanged
from peft import PeftModel, get_peft_model
from tiny_models import cases, tiny_config
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig, example_inputs
from peft_prefix_plus.probing import targets as targets_module
from peft_prefix_plus.probing.probe import probe


TOKENS = torch.tensor([[5, 6, 7]])


class TwoEncoders(nn.Module):
    """A retriever: one model for questions, another for documents."""

    def __init__(self) -> None:
        super().__init__()
        self.query = tiny_model("bert", None)
        self.doc = tiny_model("distilbert", None, seed=1)

    def forward(self, query: torch.Tensor, doc: torch.Tensor) -> torch.Tensor:
        return (self.query(query).last_hidden_state[:, 0] * self.doc(doc).last_hidden_state[:, 0]).sum(-1)


class WithAnArgumentOfItsOwn(PreTrainedModel):
    """A model whose forward wants more than tokens."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, weights: torch.Tensor, **kwargs) -> torch.Tensor:
        return (self.bert(input_ids).last_hidden_state * weights[..., None]).sum()


def with_an_argument_of_its_own() -> WithAnArgumentOfItsOwn:
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return WithAnArgumentOfItsOwn(BertConfig(**sizes)).eval()


def test_all_models_in_a_wrapper_get_prefixes(tmp_path):
    model = TwoEncoders().eval()
    with torch.no_grad():
        expected = model(TOKENS, TOKENS)
    tuned = get_peft_model(model, prefix_config()).eval()

    assert {name.split(".")[0] for name in prefix_layers(tuned)} == {"query", "doc"}
    assert len(prefix_layers(tuned)) == 4
    tuned(TOKENS, TOKENS).sum().backward()
    assert all(parameter.grad.any() for parameter in adapter_parameters(tuned).values())
    with torch.no_grad():
        changed = tuned(TOKENS, TOKENS)
        assert not torch.allclose(changed, expected)
    tuned.save_pretrained(tmp_path)
    base = tuned.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS, TOKENS), changed)
    assert len(prefix_layers(get_peft_model(loaded.unload(), prefix_config(target_modules=r"doc\..*")))) == 2


def test_a_model_with_a_required_argument_is_reached_through_the_model_in_it():
    tuned = get_peft_model(with_an_argument_of_its_own(), prefix_config())

    assert len(prefix_layers(tuned)) == 2
    tuned(TOKENS, weights=torch.ones(1, 3)).backward()
    assert all(parameter.grad.any() for parameter in adapter_parameters(tuned).values())


def test_a_models_own_dummy_inputs_are_taken(monkeypatch):
    called = []

    def dummy_inputs(self):
        return {"input_ids": TOKENS, "weights": torch.ones(1, 3)}

    monkeypatch.setattr(WithAnArgumentOfItsOwn, "dummy_inputs", property(dummy_inputs))
    model = with_an_argument_of_its_own()
    model.register_forward_hook(lambda *_: called.append(True))
    get_peft_model(model, prefix_config())

    assert called


def test_example_inputs_say_what_is_reached(tmp_path):
    model = TwoEncoders().eval()
    with example_inputs(query=TOKENS, doc=TOKENS):
        assert len(prefix_layers(get_peft_model(model, prefix_config()))) == 4

    config = transformers.CLIPConfig(
        text_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
        ),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        projection_dim=16,
    )
    clip = transformers.CLIPModel(config).eval()
    with example_inputs(input_ids=TOKENS, pixel_values=torch.randn(1, 3, 16, 16).double()):
        tuned = get_peft_model(clip, prefix_config())
        assert len(prefix_layers(tuned)) == 4
        tuned.save_pretrained(tmp_path)
        PeftModel.from_pretrained(tuned.unload(), tmp_path)


def test_example_inputs_that_the_model_does_not_take_are_refused_and_change_nothing():
    model = with_an_argument_of_its_own()
    with (
        unchanged(model),
        example_inputs(pixels=TOKENS),
        pytest.raises(ValueError, match=r"WithAnArgumentOfItsOwn cannot be run on the example inputs \['pixels'\]"),
    ):
        get_peft_model(model, prefix_config())
    get_peft_model(model, prefix_config())  # they are forgotten


def test_attention_modules_of_a_model_that_cannot_be_run_are_probed_alone():
    class Unrunnable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = tiny_model("llama").model.layers

        def forward(self, secret: object) -> None:
            raise RuntimeError("not here")

    alone, whole = probe(Unrunnable()), probe(tiny_model("llama"))

    assert list(alone) == [name.removeprefix("model.") for name in whole]
    assert list(alone.values()) == list(whole.values())  # kind, shape, heads, rotation
    assert all(geometry.key.std() > 0 for geometry in alone.values())


@pytest.mark.parametrize(
    ("class_name", "part"),
    [("DetrForObjectDetection", "model.decoder.layers"), ("SamModel", "mask_decoder.transformer.layers")],
    ids=["positions that are added", "keys beside queries"],
)
def test_attention_modules_of_other_arguments_are_probed_alone(class_name, part):
    class Unrunnable(nn.Module):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

    case = next(case for group in beyond_text.cases().values() for case in group if case.class_name == class_name)
    model = tiny_models.tiny_model(case)
    whole = probe(model)
    alone = probe(Unrunnable(model.get_submodule(part)))

    expected = {name.replace(part, "layers"): each for name, each in whole.items() if name.startswith(f"{part}.")}
    assert list(alone) == list(expected)
    for name, geometry in alone.items():
        assert geometry.shape == expected[name].shape
        assert geometry.num_query_heads == expected[name].num_query_heads
        assert geometry.scale == expected[name].scale
        assert geometry.key.std() > 0


def test_scores_less_their_maximum_over_all_are_refused_with_the_reason():
    class ShiftedAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            query, key, value = (each(hidden_states) for each in (self.q_proj, self.k_proj, self.v_proj))
            scores = query @ key.transpose(-1, -2)
            return torch.softmax(scores - scores.max(), dim=-1) @ value

    model = nn.Sequential(ShiftedAttention())
    with unchanged(model), pytest.raises(ValueError, match=r"ShiftedAttention.*its products go through max, sub"):
        get_peft_model(model, prefix_config())


def test_what_can_be_run_in_no_way_names_the_way_out():
    class Unrunnable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = tiny_model("bert", None).encoder.layer[0].attention.self
            self.attention.query = self.attention.key = self.attention.value = nn.Identity()

    model = Unrunnable()
    with unchanged(model), pytest.raises(ValueError, match=r"Unrunnable.*no linear projections.*example_inputs"):
        get_peft_model(model, prefix_config())


MIXTURES = [
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "DbrxForCausalLM",
]


@pytest.mark.parametrize("class_name", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mixtures_of_experts_without_weights_have_the_geometry_of_those_with_them(class_name, dtype):
    case = next(case for case in cases() if case.class_name == class_name)
    model_class = getattr(transformers, class_name)
    config = tiny_config(transformers.CONFIG_MAPPING[case.model_type])
    with torch.device("meta"):
        empty = model_class._from_config(config, dtype=dtype)

    assert probe(empty) == probe(model_class._from_config(config, dtype=torch.float32))


@pytest.mark.parametrize("sharing", ["none", "all"])
def test_an_mlp_encoder_can_be_made_on_the_meta_device(sharing):
    with torch.device("meta"):
        model = get_peft_model(
            tiny_model(), prefix_config(reparameterization="mlp", sharing=sharing, prefix_scaling=1.0)
        )

    assert all(parameter.is_meta for parameter in adapter_parameters(model).values())


# ---------------------------------------------------------------------------------------------------- patterns and lists

SLOW_PATTERNS = ["(.*)*(.*)*Y", "((.*)*)*Y", r"(?:\w|\w\w|\.)*Y", ".*" * 20 + "Y"]


@pytest.mark.parametrize("pattern", SLOW_PATTERNS)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_patterns_that_backtrack_end_soon(field, pattern):
    fields = {field: pattern, **({"layers_to_transform": 0} if field == "layers_pattern" else {})}
    started = time.monotonic()
    with pytest.raises(ValueError, match=field):
        get_peft_model(tiny_model(), PrefixPlusConfig(**fields))

    assert time.monotonic() - started < 10


def test_a_pattern_that_takes_too_long_is_named(monkeypatch):
    def late(pattern, name, timeout):
        assert timeout <= 5
        raise TimeoutError

    monkeypatch.setattr(targets_module.regex, "fullmatch", late)
    with pytest.raises(ValueError, match=r"'\.\*attn' takes more than .* seconds to match the name 'model\.layers\.0"):
        get_peft_model(tiny_model(), PrefixPlusConfig(target_modules=".*attn"))


@pytest.mark.parametrize("field", ["layers_to_transform", "target_modules", "exclude_modules", "modules_to_save"])
def test_lists_without_end_are_refused_at_once(field):
    entries = [0 if field == "layers_to_transform" else "a"] * 10**7
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"`{field}` must have at most 10000 entries, got 10000000"):
        PrefixPlusConfig(**{field: entries})

    assert time.monotonic() - started < 5


def test_repeated_layers_count_once():
    tuned = get_peft_model(tiny_model(), prefix_config(layers_to_transform=[0, -1] * 5000))

    assert sorted(prefix_layers(tuned)) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]


@pytest.mark.parametrize(
    "fields",
    [
        {"encoder_dropout": 10**400},
        {"prefix_scaling": 10**400},
        {"num_virtual_tokens": 10**400},
        {"encoder_dim": 2**40},
        {"target_modules": "x" * 20_000},
        {"exclude_modules": "(?:" * 3000 + ")" * 3000},
        {"layers_to_transform": 0, "layers_pattern": "(?x)layers#"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_numbers_and_patterns_that_nothing_can_hold_are_refused(fields):
    with pytest.raises(ValueError, match=f"`{list(fields)[-1]}`") as caught:
        PrefixPlusConfig(**fields)

    assert len(str(caught.value)) < 500


def test_a_group_in_layers_pattern_takes_no_other_groups_place():
    tuned = get_peft_model(tiny_model(), prefix_config(layers_to_transform=0, layers_pattern="(?P<stack>layers)"))

    assert list(prefix_layers(tuned)) == ["model.layers.0.self_attn"]
