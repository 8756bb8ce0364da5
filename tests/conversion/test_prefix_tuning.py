"""Conversions from and to PEFT's PREFIX_TUNING: PEFT's own forward is the reference."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import adapter_parameters, joint_config
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_prefix_plus import from_prefix_tuning, prefix_key_values, to_prefix_tuning
from peft_prefix_plus.conversion.measured_rotations import Rotation


LENGTH, VOCABULARY = 5, 64
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
GROUPED = dict(SIZES, num_key_value_heads=2)


def llama(**rope):
    rope_parameters = {"rope_theta": 1e4, "rope_type": "default", **rope}
    return LlamaForCausalLM(LlamaConfig(**GROUPED, max_position_embeddings=64, rope_parameters=rope_parameters))


MODELS = {
    "llama": llama,
    "llama, positions divided": lambda: llama(rope_type="linear", factor=4.0),
    "llama 3, frequencies by band": lambda: llama(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    "llama, yarn, which also scales": lambda: llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "qwen3, keys normalised": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "gpt-neox, a quarter rotated": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **{**SIZES, "hidden_size": 64},
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        )
    ),
    "gpt-j, neighbours rotated, by a table": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, rotary_dim=4)
    ),
    "nanochat, rotated the other way": lambda: NanoChatForCausalLM(NanoChatConfig(**GROUPED)),
    "cohere, neighbours rotated": lambda: CohereForCausalLM(CohereConfig(**GROUPED)),
    "gemma 3, two rotaries": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **GROUPED,
            head_dim=8,
            sliding_window=40,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "llama 4, one layer without positions": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **GROUPED,
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=2,
            num_experts_per_tok=1,
            no_rope_layers=[1, 0, 1],
            attention_chunk_size=40,
        )
    ),
}


def build(make):
    torch.manual_seed(0)
    return make().eval()


def with_prefix_tuning(base, **fields):
    """PEFT's model, whose prefix has standard deviation 1 by default."""
    torch.manual_seed(2)
    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH, **fields}
    return get_peft_model(copy.deepcopy(base), PrefixTuningConfig(**fields)).eval()


def texts(padding=None, tokens=9):
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, tokens))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :2] = 0
    elif padding == "right":
        mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, inputs):
    """Output at real tokens."""
    return model(**inputs)[0][inputs["attention_mask"].bool()]


def assert_equal_outputs(model, expected, base):
    """Logits are PEFT's own, with rounding far below 1e-5 at logits of about 1, and the prefix has an effect."""
    for padding in (None, "left", "right"):
        inputs = texts(padding)
        torch.testing.assert_close(logits(model, inputs), logits(expected, inputs), rtol=0, atol=1e-5)
    assert (logits(base, texts()) - logits(expected, texts())).abs().max() > 1e-2


def state(model):
    """What may not change where a conversion is refused."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "flags": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "training": [module.training for module in model.modules()],
    }


def assert_same_state(model, before):
    after = state(model)
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(after["tensors"].pop(name), tensor)
    assert not after.pop("tensors")
    assert after == before


@pytest.fixture(autouse=True)
def quiet_windows():
    """The tests of windows look at their warning themselves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Both methods give the same output for up to")
        yield


# ------------------------------------------------------------------------------------------------------ equal outputs


@pytest.mark.parametrize("name", MODELS)
def test_converted_adapters_give_the_same_output_and_come_back_the_same(name, tmp_path):
    base = build(MODELS[name])
    theirs = with_prefix_tuning(base)
    theirs.save_pretrained(tmp_path / "theirs")

    ours = from_prefix_tuning(tmp_path / "theirs", copy.deepcopy(base)).eval()
    assert_equal_outputs(ours, theirs, base)
    generations = [
        model.generate(**texts("left"), max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (ours, theirs)
    ]
    assert torch.equal(*generations)

    to_prefix_tuning(ours, save_directory=tmp_path / "back")
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").eval()
    assert_equal_outputs(back, theirs, base)
    embeddings = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "back")]
    torch.testing.assert_close(*embeddings, rtol=0, atol=1e-5)  # rotated in float64, rounded to float32 twice


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_prefix_that_a_projection_produces_is_converted(is_saved, tmp_path):
    base = build(llama)
    theirs = with_prefix_tuning(base, prefix_projection=True, encoder_hidden_size=12)
    theirs.save_pretrained(tmp_path)
    carrier = copy.deepcopy(theirs)
    ours = from_prefix_tuning(tmp_path, copy.deepcopy(base)) if is_saved else from_prefix_tuning(carrier)
    assert_equal_outputs(ours.eval(), theirs, base)
    if not is_saved:
        assert ours.get_base_model() is carrier.get_base_model()


def test_a_reparameterized_prefix_becomes_an_adapter_that_peft_loads_alone(tmp_path, run_in_new_process):
    base = build(llama)
    fields = dict(reparameterization="mlp", sharing="all", encoder_dim=6, init_weights=False)
    config = joint_config(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **fields, position_free=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    base.save_pretrained(tmp_path / "base")
    config, tensors = to_prefix_tuning(model, save_directory=tmp_path / "adapter")
    assert config.token_dim == 16 and config.num_attention_heads == 2 and config.num_layers == 3
    assert tensors["prompt_embeddings"].shape == (LENGTH, 3 * 2 * 16)

    program = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
base, adapter, inputs, output = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
assert "peft_prefix_plus" not in sys.modules
with torch.no_grad():
    torch.save(model(**torch.load(inputs)).logits, output)
"""
    torch.save(texts(), tmp_path / "inputs")
    run_in_new_process(program, tmp_path / "base", tmp_path / "adapter", tmp_path / "inputs", tmp_path / "output")
    found = torch.load(tmp_path / "output")[texts()["attention_mask"].bool()]
    torch.testing.assert_close(found, logits(model, texts()), rtol=0, atol=1e-5)
    assert (found - logits(base, texts())).abs().max() > 1e-2


def test_an_adapter_is_found_in_a_folder_of_a_directory_and_by_its_name_on_the_hub(tmp_path):
    base = build(llama)
    theirs = with_prefix_tuning(base)
    theirs.save_pretrained(tmp_path / "directory" / "folder")
    ours = from_prefix_tuning(tmp_path / "directory", copy.deepcopy(base), subfolder="folder")
    assert_equal_outputs(ours.eval(), theirs, base)

    cached = tmp_path / "models--user--name"  # as huggingface_hub keeps what it has downloaded
    theirs.save_pretrained(cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    ours = from_prefix_tuning("user/name", copy.deepcopy(base), cache_dir=tmp_path)
    assert_equal_outputs(ours.eval(), theirs, base)
    (cached / "snapshots" / "0123" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'user/name'.*adapter_model\.safetensors cannot be loaded from the Hub"):
        from_prefix_tuning("user/name", copy.deepcopy(base), cache_dir=tmp_path)


def test_heads_that_are_saved_in_full_go_along(tmp_path):
    config = LlamaConfig(**GROUPED, num_labels=3, pad_token_id=0)
    base = build(lambda: LlamaForSequenceClassification(config))
    theirs = with_prefix_tuning(base, task_type="SEQ_CLS")
    with torch.no_grad():
        theirs.base_model.score.modules_to_save["default"].weight.add_(1.0)  # as if trained
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(**texts()).logits

    ours = from_prefix_tuning(tmp_path / "theirs", copy.deepcopy(base)).eval()
    to_prefix_tuning(ours, save_directory=tmp_path / "back")
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").eval()
    carried = from_prefix_tuning(theirs).eval()
    for model in (ours, back, carried):
        with torch.no_grad():
            torch.testing.assert_close(model(**texts()).logits, expected, rtol=0, atol=1e-5)
    assert "score" in ours.peft_config["default"].modules_to_save
    trainable = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in ours.named_parameters() if ".default" in name}


def test_a_converted_adapter_trains_on_and_keeps_what_its_configuration_said(tmp_path):
    base = build(llama)
    base.name_or_path = "some/base"
    theirs = with_prefix_tuning(base)
    theirs.peft_config["default"].revision = "v1"
    theirs.save_pretrained(tmp_path)
    model = from_prefix_tuning(tmp_path, base, adapter_name="mine")
    config = model.peft_config["mine"]
    assert (config.task_type, config.num_virtual_tokens, config.reparameterization) == ("CAUSAL_LM", LENGTH, "none")
    assert (config.base_model_name_or_path, config.revision) == ("some/base", "v1")
    assert (config.target_modules, config.inference_mode) == (None, False)
    inputs = texts()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(model, "mine").items()}
    assert len(gradients) == 6 and all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_model_in_bfloat16_is_converted(tmp_path):
    base = build(llama).to(torch.bfloat16)
    theirs = with_prefix_tuning(base)
    theirs.save_pretrained(tmp_path)
    ours = from_prefix_tuning(tmp_path, copy.deepcopy(base)).eval()
    exact = from_prefix_tuning(tmp_path, build(llama))
    for name, pair in prefix_key_values(ours).items():  # the measured rotation is the exact one, not a rounded one
        for found, expected in zip(pair, prefix_key_values(exact)[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=2**-8, atol=2**-8)


def test_an_inactive_adapter_is_converted_and_the_model_left_as_it_was():
    base = build(llama)
    model = get_peft_model(copy.deepcopy(base), joint_config(task_type="CAUSAL_LM", gating=True))
    model.add_adapter(
        "other", joint_config(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights=False, position_free=False)
    )
    before = state(model)
    _, tensors = to_prefix_tuning(model, "other")
    assert_same_state(model, before)
    assert model.active_adapters == ["default"]

    theirs = with_prefix_tuning(base, num_virtual_tokens=4)
    theirs.prompt_encoder["default"].load_prompt_embeddings(tensors["prompt_embeddings"])
    model.set_adapter("other")
    assert_equal_outputs(model.eval(), theirs, base)


# ------------------------------------------------------------------------------------------------------ how far


BOUNDED = {
    "a sliding window": (
        lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=12)),
        12,
        "sliding_window",
    ),
    "chunks": (
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(
                **GROUPED,
                head_dim=8,
                intermediate_size_mlp=48,
                num_local_experts=2,
                num_experts_per_tok=1,
                attention_chunk_size=12,
            )
        ),
        12,
        "attention_chunk_size",
    ),
    "a scale of queries by position": (
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(
                **GROUPED,
                head_dim=8,
                intermediate_size_mlp=48,
                num_local_experts=2,
                num_experts_per_tok=1,
                no_rope_layers=[0, 0, 0],
                attention_chunk_size=64,
                attn_temperature_tuning=True,
                floor_scale=13,
            )
        ),
        12,
        "floor_scale",
    ),
    "dynamic frequencies": (lambda: llama(rope_type="dynamic", factor=4.0), 64, "'dynamic'"),
    "frequencies for long texts": (
        lambda: llama(
            rope_type="longrope",
            factor=4.0,
            short_factor=[1.0] * 4,
            long_factor=[3.0] * 4,
            original_max_position_embeddings=12,
        ),
        12,
        "'longrope'",
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_the_length_up_to_which_outputs_are_equal_is_said_and_is_right(name):
    make, bound, reason = BOUNDED[name]
    base = build(make)
    theirs = with_prefix_tuning(base)
    with pytest.warns(UserWarning, match=f"for up to {bound - LENGTH} tokens of text.*{reason}"):
        ours = from_prefix_tuning(copy.deepcopy(theirs)).eval()
    with pytest.warns(UserWarning, match=f"for up to {bound - LENGTH} tokens of text.*{reason}"):
        to_prefix_tuning(ours)
    for tokens, is_equal in ((bound - LENGTH, True), (bound - LENGTH + 1, False)):
        inputs = texts(tokens=tokens)
        difference = (logits(ours, inputs) - logits(theirs, inputs)).abs().max()
        assert (difference < 1e-5) == is_equal


def test_a_prefix_as_long_as_the_window_is_refused():
    base = build(lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=LENGTH)))
    with pytest.raises(ValueError, match=r"not even for one token.*5 virtual tokens.*`sliding_window` = 5"):
        from_prefix_tuning(with_prefix_tuning(base))


# ------------------------------------------------------------------------------------------------------ refusals


INEXACT = {
    "gpt-2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)),
        r"not exact for GPT2LMHeadModel.*positions by 5.*transformer\.h\.0\.attn.*learned",
    ),
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        ),
        r"not exact for OPTForCausalLM.*learned",
    ),
    "bloom": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
        r"not exact for BloomForCausalLM.*ALiBi",
    ),
    "falcon with alibi": (
        lambda: FalconForCausalLM(
            FalconConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                alibi=True,
                new_decoder_architecture=True,
                num_kv_heads=4,
            )
        ),
        r"not exact for FalconForCausalLM.*ALiBi",
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_models_on_which_the_outputs_cannot_be_equal_are_refused_and_left_as_they_were(name, tmp_path):
    make, message = INEXACT[name]
    base = build(make).train()
    base.lm_head.weight.requires_grad_(False)
    theirs = with_prefix_tuning(base)
    theirs.save_pretrained(tmp_path)
    before = state(base)
    with pytest.raises(ValueError, match=message):
        from_prefix_tuning(tmp_path, base)
    assert_same_state(base, before)

    before = state(theirs)
    with pytest.raises(ValueError, match=message):
        from_prefix_tuning(theirs)
    assert_same_state(theirs, before)

    config = joint_config(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, init_weights=False)
    ours = get_peft_model(base, config)
    before = state(ours)
    with pytest.raises(ValueError, match=message):
        to_prefix_tuning(ours, save_directory=tmp_path / "never")
    assert_same_state(ours, before)
    assert not (tmp_path / "never").exists()


def test_a_refused_classifier_gets_its_own_head_back(tmp_path):
    config = LlamaConfig(**GROUPED, num_labels=3, pad_token_id=0)
    base = build(lambda: LlamaForSequenceClassification(config))
    theirs = with_prefix_tuning(base, task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path)
    carrier_before, base_before = state(theirs), state(base)
    for model, arguments in ((theirs, (theirs,)), (base, (tmp_path, base))):
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        hook = inner.model.register_forward_hook(change_output_of_prefix_plus)
        with pytest.raises(ValueError, match="not exact for LlamaForSequenceClassification"):
            from_prefix_tuning(*arguments)
        hook.remove()
    assert_same_state(theirs, carrier_before)
    assert_same_state(base, base_before)


def change_output_of_prefix_plus(module, inputs, output):
    """A hook that makes the new adapter's output another one, so that it is refused last of all."""
    if hasattr(module.layers[0].self_attn, "prefix_plus"):
        output.last_hidden_state.add_(100.0)


def test_a_pickled_adapter_is_loaded_on_request_only(tmp_path):
    base = build(llama)
    theirs = with_prefix_tuning(base)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    before = state(base)
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors.*allow_pickle=True"):
        from_prefix_tuning(tmp_path, base)
    assert_same_state(base, before)
    assert_equal_outputs(from_prefix_tuning(tmp_path, copy.deepcopy(base), allow_pickle=True).eval(), theirs, base)


def test_what_is_no_prefix_tuning_adapter_is_refused(tmp_path):
    base = build(llama)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="must be one of PREFIX_TUNING, got LORA"):
        from_prefix_tuning(lora)
    lora.save_pretrained(tmp_path)
    before = state(base)
    with pytest.raises(ValueError, match="must be one of PREFIX_TUNING, got LORA"):
        from_prefix_tuning(tmp_path, base)
    assert_same_state(base, before)
    with pytest.raises(ValueError, match="`task_type` is None"):
        from_prefix_tuning(PeftModel(base, PrefixTuningConfig(num_virtual_tokens=LENGTH)))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2))
    with pytest.raises(ValueError, match="encoder-decoder"):
        from_prefix_tuning(with_prefix_tuning(t5, task_type="SEQ_2_SEQ_LM"))


def test_the_base_model_is_asked_for_where_it_is_missing():
    base = build(llama)
    with pytest.raises(TypeError, match=r"must be the base model.*'adapter'.*got NoneType"):
        from_prefix_tuning("adapter")
    with pytest.raises(TypeError, match=r"must be the base model.*got PeftModelForCausalLM with adapters"):
        from_prefix_tuning("adapter", with_prefix_tuning(base))
    with pytest.raises(TypeError, match="must be None"):
        from_prefix_tuning(with_prefix_tuning(base), base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gating": True}, "gating=True"),
        ({"layers_to_transform": [0, -1]}, "in 2 attention modules of 3 in 3 layers"),
        ({"task_type": None}, "`task_type` is None"),
    ],
)
def test_what_prefix_tuning_cannot_express_is_refused(fields, message):
    model = get_peft_model(build(llama), joint_config(**{"task_type": "CAUSAL_LM", **fields}))
    with pytest.raises(ValueError, match=message):
        to_prefix_tuning(model)


def test_keys_and_values_of_different_shapes_are_refused():
    latent = dict(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, head_dim=4)
    experts = dict(n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    base = build(lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES, **latent, **experts)))
    model = get_peft_model(base, joint_config(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    with pytest.raises(ValueError, match=r"one shape.*\(4, 5, 6\) and \(4, 5, 12\)"):
        to_prefix_tuning(model)


def test_only_models_with_the_adapter_are_taken():
    model = get_peft_model(build(llama), joint_config(task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match=r"must be a PeftModel.*got LlamaForCausalLM"):
        to_prefix_tuning(model.get_base_model())
    with pytest.raises(ValueError, match="named 'other'"):
        to_prefix_tuning(model, "other")
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        to_prefix_tuning(model)


# ------------------------------------------------------------------------------------------------------ rotations


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_a_rotation_is_a_product_of_complex_numbers(is_interleaved):
    frequencies = (1.0, 0.1, 0.01)
    vectors = torch.randn(2, 4, 10, dtype=torch.float64)
    rotated = Rotation(frequencies, 2, is_interleaved).rotate(vectors, -7)
    first, second = ([2, 4, 6], [3, 5, 7]) if is_interleaved else ([2, 3, 4], [5, 6, 7])
    expected = torch.complex(vectors[..., first], vectors[..., second]) * torch.exp(-7j * torch.tensor(frequencies))
    torch.testing.assert_close(torch.complex(rotated[..., first], rotated[..., second]), expected, rtol=0, atol=1e-6)
    for untouched in (slice(0, 2), slice(8, 10)):
        assert torch.equal(rotated[..., untouched], vectors[..., untouched])
    assert torch.equal(Rotation().rotate(vectors, 7), vectors)
