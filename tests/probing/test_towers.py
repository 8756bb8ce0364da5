"""Models of images and speech: their attention modules are found, or named in `target_modules`."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import adapter_parameters, prefix_config, prefix_layers
from peft import PeftModel, get_peft_model

from peft_prefix_plus.probing.probe import probe


SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
IMAGE = dict(image_size=16, patch_size=8)
TEXT = dict(vocab_size=64, max_position_embeddings=32, bos_token_id=0, eos_token_id=3, pad_token_id=1)
WHISPER = dict(
    vocab_size=64,
    num_mel_bins=8,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_source_positions=16,
    max_target_positions=32,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=3,
    decoder_start_token_id=2,
)


def vit():
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **IMAGE))
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def clip():
    config = transformers.CLIPConfig(
        text_config={**SIZES, **TEXT}, vision_config={**SIZES, **IMAGE}, projection_dim=16
    )
    inputs = {"input_ids": torch.tensor([[5, 6, 3], [7, 8, 3]]), "pixel_values": torch.randn(2, 3, 16, 16)}
    return transformers.CLIPModel(config), inputs


def clip_text():
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES, **TEXT))
    return model, {"input_ids": torch.tensor([[5, 6, 3], [7, 8, 3]])}


def whisper():
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))
    return model, {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.tensor([[2, 5], [2, 6]])}


def trocr():
    decoder = dict(
        vocab_size=64,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**SIZES, **IMAGE), transformers.TrOCRConfig(**decoder)
    )
    model = transformers.VisionEncoderDecoderModel(config)
    return model, {"pixel_values": torch.randn(2, 3, 16, 16), "decoder_input_ids": torch.tensor([[2, 5], [2, 6]])}


def idefics():
    config = transformers.IdeficsConfig(
        **SIZES,
        vocab_size=64,
        additional_vocab_size=2,
        use_resampler=True,
        cross_layer_interval=1,
        vision_config=dict(embed_dim=32, **SIZES, **IMAGE),
        perceiver_config=dict(resampler_n_latents=4, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=8),
    )
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    return transformers.IdeficsForVisionText2Text(config), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 1, 3, 16, 16),
        "image_attention_mask": torch.ones(2, 3, 1, dtype=torch.long),
    }


CASES = {
    "vit": (vit, None, 2),
    "clip, its text model": (clip_text, None, 2),
    "clip, the text side": (clip, r".*text_model.*self_attn", 2),
    "clip, the image side": (clip, r".*vision_model.*self_attn", 2),
    "trocr": (trocr, None, 6),
    "idefics, its language model": (idefics, r"model\.layers\..*self_attn", 2),
    "whisper, all": (whisper, None, 6),
    "whisper, the encoder": (whisper, r".*\.encoder\..*self_attn", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_prefix_in_a_tower_works(case, tmp_path):
    build, target_modules, count = CASES[case]
    torch.manual_seed(0)
    model, inputs = build()
    model.eval().requires_grad_(False)
    expected = output_of(model, inputs)

    tuned = get_peft_model(model, prefix_config(target_modules=target_modules)).eval()
    assert len(prefix_layers(tuned)) == count
    changed = output_of(tuned, inputs)
    assert not torch.allclose(changed, expected, atol=1e-5)
    with tuned.disable_adapter():
        assert torch.equal(output_of(tuned, inputs), expected)
    main_output(tuned(**inputs)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in adapter_parameters(tuned).values())

    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tuned.unload(), tmp_path).eval()
    assert torch.equal(output_of(loaded, inputs), changed)


def output_of(model, inputs):
    with torch.no_grad():
        return main_output(model(**inputs))


def main_output(outputs):
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(outputs[name] for name in names if name in outputs)


def test_the_kinds_of_attention_in_an_image_to_text_model():
    model, _ = trocr()
    kinds = {name: geometry.kind for name, geometry in probe(model.eval()).items()}
    assert {kinds[name] for name in kinds if name.startswith("encoder.")} == {"encoder"}
    assert {kinds[name] for name in kinds if name.endswith("self_attn")} == {"self"}
    assert {kinds[name] for name in kinds if name.endswith("encoder_attn")} == {"cross"}


@pytest.mark.parametrize("build", [idefics], ids=lambda build: build.__name__)
def test_a_model_that_needs_an_image_beside_its_text_takes_an_adapter(build):
    model, inputs = build()
    tuned = get_peft_model(model.eval(), prefix_config()).eval()
    expected = output_of(tuned.get_base_model(), inputs)
    with tuned.disable_adapter():
        assert not torch.allclose(output_of(tuned, inputs), expected)
    assert any("layers" in name for name in prefix_layers(tuned))
