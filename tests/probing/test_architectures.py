"""The method on every kind of architecture: decoders, encoders, encoder-decoders, vision-language models."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    PAD_TOKEN,
    VOCABULARY,
    adapter_parameters,
    loss_of,
    output_of,
    prefix_layers,
    prefixed,
    task_inputs,
    tiny_model,
    token_ids,
)
from peft import PeftModel

from peft_prefix_plus.probing.probe import probe


DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
ENCODER_DECODERS = ("t5", "bart")

CASES = [
    *((name, "CAUSAL_LM") for name in (*DECODERS, "bart")),
    *((name, "SEQ_2_SEQ_LM") for name in ENCODER_DECODERS),
    *((name, task) for name in ENCODERS for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")),
    *((name, "SEQ_CLS") for name in ("llama", "gemma3", "gpt2", "opt")),
    *((name, "TOKEN_CLS") for name in ("qwen2", "gpt_neox", "t5")),
    *((name, "QUESTION_ANS") for name in ("llama", "t5", "bart")),
    *((name, "FEATURE_EXTRACTION") for name in ("mistral", "bart")),
    *((name, None) for name in ("llama", "gemma3", "gpt2", "bart", "bert", "modernbert")),
]
EACH_CASE = pytest.mark.parametrize(("architecture", "task_type"), CASES)
EACH_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def needs(architecture: str, implementation: str) -> None:
    if implementation not in ARCHITECTURES[architecture].implementations:
        pytest.skip(f"{architecture} has no {implementation} attention")


@EACH_IMPLEMENTATION
@EACH_CASE
def test_a_training_step_changes_every_adapter_parameter_and_nothing_else(architecture, task_type, implementation):
    needs(architecture, implementation)
    model = prefixed(tiny_model(architecture, task_type, implementation), task_type=task_type)
    adapter = adapter_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)

    loss_of(model.train(), **task_inputs(task_type)).backward()
    optimizer.step()

    assert adapter
    for name, parameter in model.named_parameters():
        if name in adapter:
            assert not torch.equal(parameter, before[name]), name
            assert parameter.grad.isfinite().all(), name
        elif ".modules_to_save." not in name:
            assert torch.equal(parameter, before[name]), name


@EACH_IMPLEMENTATION
@EACH_CASE
def test_the_prefix_changes_the_output_and_disabled_it_is_the_base_model(architecture, task_type, implementation):
    needs(architecture, implementation)
    inputs = task_inputs(task_type)
    model = tiny_model(architecture, task_type, implementation)
    expected = output_of(model, **inputs)

    model = prefixed(model, task_type=task_type)

    assert (output_of(model, **inputs) - expected).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(output_of(model, **inputs), expected)


@EACH_CASE
def test_a_saved_and_loaded_adapter_gives_the_same_output(architecture, task_type, tmp_path):
    inputs = task_inputs(task_type)
    model = prefixed(tiny_model(architecture, task_type), task_type=task_type)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_model(architecture, task_type), tmp_path)

    assert type(loaded) is type(model)
    assert torch.equal(output_of(loaded, **inputs), output_of(model, **inputs))


@EACH_CASE
def test_eager_and_sdpa_agree(architecture, task_type):
    needs(architecture, "sdpa")
    inputs = task_inputs(task_type)
    outputs = []
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(1)  # the same prefix
        outputs.append(
            output_of(prefixed(tiny_model(architecture, task_type, implementation), task_type=task_type), **inputs)
        )

    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@EACH_IMPLEMENTATION
@pytest.mark.parametrize("architecture", [*DECODERS, *ENCODER_DECODERS])
def test_greedy_generation_with_and_without_cache_agrees(architecture, implementation):
    needs(architecture, implementation)
    task_type = "SEQ_2_SEQ_LM" if architecture in ENCODER_DECODERS else "CAUSAL_LM"
    model = tiny_model(architecture, task_type, implementation)
    inputs = {"input_ids": token_ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD_TOKEN}
    base = model.generate(**inputs, **options)
    model = prefixed(model, task_type=task_type)

    cached = model.generate(**inputs, **options)

    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    assert not torch.equal(cached, base)


def positions_of(model: torch.nn.Module, architecture: str, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The positions of the real tokens of a padded batch, where a model takes them and does not count itself."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if not takes_positions or architecture in ("opt", "roberta"):
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@EACH_IMPLEMENTATION
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", [*DECODERS, *ENCODERS])
def test_a_padded_batch_gives_what_its_rows_give_alone(architecture, side, implementation):
    needs(architecture, implementation)
    if architecture == "distilbert" and side == "left":
        pytest.skip("DistilBERT counts positions from the left, padding or not")
    task_type = "CAUSAL_LM" if architecture in DECODERS else "TOKEN_CLS"
    base = tiny_model(architecture, task_type, implementation)
    model = prefixed(base, task_type=task_type)
    lengths, width = (4, 9), 9
    ids = torch.full((len(lengths), width), PAD_TOKEN)
    mask = torch.zeros_like(ids)
    spans = [slice(width - length, width) if side == "left" else slice(length) for length in lengths]
    for row, (span, length) in enumerate(zip(spans, lengths, strict=True)):
        ids[row, span] = token_ids(1, length, seed=row)[0]
        mask[row, span] = 1

    batch = output_of(model, input_ids=ids, attention_mask=mask, **positions_of(base, architecture, mask))

    for row, span in enumerate(spans):
        alone = output_of(model, input_ids=ids[row : row + 1, span])
        torch.testing.assert_close(batch[row, span], alone[0], atol=1e-5, rtol=1e-5)


@EACH_IMPLEMENTATION
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_an_encoder_is_not_seen_by_cross_attention(side, implementation):
    model = prefixed(tiny_model("t5", "SEQ_2_SEQ_LM", implementation), task_type="SEQ_2_SEQ_LM")
    row, padding = token_ids(1, 5), torch.full((1, 3), PAD_TOKEN)
    decoder_ids = token_ids(1, 4, seed=1)
    ids = torch.cat([padding, row] if side == "left" else [row, padding], dim=1)

    padded = output_of(model, input_ids=ids, attention_mask=(ids != PAD_TOKEN).long(), decoder_input_ids=decoder_ids)

    alone = output_of(model, input_ids=row, decoder_input_ids=decoder_ids)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_a_prefix_is_seen_beyond_the_sliding_window():
    # One layer and a window of four tokens: the last of twelve tokens can reach no prefix by way of earlier tokens.
    model = prefixed(tiny_model("mistral", num_hidden_layers=1), task_type="CAUSAL_LM")
    base = tiny_model("mistral", num_hidden_layers=1)

    change = output_of(model, input_ids=token_ids(1, 12)) - output_of(base, input_ids=token_ids(1, 12))

    assert change[0, -1].abs().max() > 1e-2


SEQ2SEQ_KINDS = {
    "t5": {
        "encoder": {f"encoder.block.{layer}.layer.0.SelfAttention" for layer in range(2)},
        "self": {f"decoder.block.{layer}.layer.0.SelfAttention" for layer in range(2)},
        "cross": {f"decoder.block.{layer}.layer.1.EncDecAttention" for layer in range(2)},
    },
    "bart": {
        "encoder": {f"model.encoder.layers.{layer}.self_attn" for layer in range(2)},
        "self": {f"model.decoder.layers.{layer}.self_attn" for layer in range(2)},
        "cross": {f"model.decoder.layers.{layer}.encoder_attn" for layer in range(2)},
    },
}


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_kinds_of_attention_in_an_encoder_decoder(architecture):
    found = probe(tiny_model(architecture, "SEQ_2_SEQ_LM"))

    assert {name: geometry.kind for name, geometry in found.items()} == {
        name: kind for kind, names in SEQ2SEQ_KINDS[architecture].items() for name in names
    }


@pytest.mark.parametrize("cross_prefix", [True, False])
@pytest.mark.parametrize("encoder_prefix", [True, False])
@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_encoder_and_cross_attention_can_be_switched_off(architecture, encoder_prefix, cross_prefix):
    base = tiny_model(architecture, "SEQ_2_SEQ_LM")
    inputs = task_inputs("SEQ_2_SEQ_LM")
    with torch.no_grad():
        encoded = base(**inputs).encoder_last_hidden_state
    model = prefixed(base, task_type="SEQ_2_SEQ_LM", encoder_prefix=encoder_prefix, cross_prefix=cross_prefix)

    kinds = {"self": True, "encoder": encoder_prefix, "cross": cross_prefix}
    expected = {name for kind, names in SEQ2SEQ_KINDS[architecture].items() if kinds[kind] for name in names}
    assert set(prefix_layers(model)) == expected
    with torch.no_grad():
        is_same = torch.equal(model(**inputs).encoder_last_hidden_state, encoded)
    assert is_same == (not encoder_prefix)


def test_an_encoder_decoder_without_encoder_and_cross_prefix_generates_from_the_encoders_output():
    base = tiny_model("t5", "SEQ_2_SEQ_LM")
    model = prefixed(base, task_type="SEQ_2_SEQ_LM", encoder_prefix=False)
    inputs = {"input_ids": token_ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with model.disable_adapter(), torch.no_grad():
        encoded = base.encoder(**inputs)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": inputs["attention_mask"]}

    assert torch.equal(
        model.generate(encoder_outputs=encoded, **options), model.generate(input_ids=inputs["input_ids"], **options)
    )


def vision_language_model(implementation: str = "sdpa") -> torch.nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**ARCHITECTURES["llama"].sizes)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=VOCABULARY - 1, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()


def image_inputs() -> dict[str, torch.Tensor]:
    ids = token_ids(1, 9).clamp(max=VOCABULARY - 2)
    ids[0, 1:4] = VOCABULARY - 1  # the four patches of an image, less its class token
    ids[0, 4] = VOCABULARY - 1
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}


@EACH_IMPLEMENTATION
def test_in_a_vision_language_model_only_the_language_model_is_prefixed(implementation):
    base = vision_language_model(implementation)
    expected = output_of(base, **image_inputs())
    model = prefixed(base, task_type="CAUSAL_LM")

    assert set(prefix_layers(model)) == {f"model.language_model.layers.{layer}.self_attn" for layer in range(3)}
    assert (output_of(model, **image_inputs()) - expected).abs().max() > 1e-2
    loss_of(model, **image_inputs()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter_parameters(model).values())
    with model.disable_adapter():
        assert torch.equal(output_of(model, **image_inputs()), expected)


def test_the_vision_tower_is_prefixed_when_target_modules_names_it(tmp_path):
    model = prefixed(
        vision_language_model(),
        task_type="CAUSAL_LM",
        target_modules=r".*vision_tower.*\.self_attn",
        num_virtual_tokens=2,
    )

    layers = prefix_layers(model)
    assert len(layers) == 3
    assert all(".vision_tower." in name for name in layers)
    loss_of(model, **image_inputs()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter_parameters(model).values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vision_language_model(), tmp_path)
    assert torch.equal(output_of(loaded, **image_inputs()), output_of(model, **image_inputs()))


def test_a_text_suffix_that_both_towers_have_prefixes_both():
    model = prefixed(vision_language_model(), task_type="CAUSAL_LM", target_modules=["self_attn"])

    assert len(prefix_layers(model)) == 6
