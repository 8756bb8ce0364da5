"""A tiny random model of every architecture in transformers' auto mappings: the sizes, by rule; the exceptions, by table."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from tower_sizes import TOWER_SIZES
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto


VOCABULARY = 160
PAD_TOKEN, BOS_TOKEN, END_TOKEN = 1, 2, 3
FIRST_PLAIN_TOKEN = 64
"""Token ids from here on mean nothing special in any of the tiny models."""

MAPPINGS = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
"""The auto mappings that are swept, by PEFT's task type."""

RULES: list[tuple[str, Any]] = [
    (r"vocab_size|.*_vocab_size", VOCABULARY),
    (r"pad_token_id|pad_index|padding_idx", PAD_TOKEN),
    (r"bos_token_id|bos_index|decoder_start_token_id|cls_token_id", BOS_TOKEN),
    (r"eos_token_id|eos_index|sep_token_id", END_TOKEN),
    (r"forced_(bos|eos)_token_id", None),
    (r"type_vocab_size|.*_depth|hash_code_len", 2),
    (r"(.*_)?(query_heads|kv_heads|key_value_heads|num_key_value_heads|num_kv_heads)", 2),
    (r"(.*_)?(num_attention_heads|num_heads|n_heads?|attention_heads|num_heads_ipa|mamba_num_heads)", 4),
    (r"linear_num_(key|value)_heads", 2),
    (r"(.*_)?(head_dim|dim_head|d_head|d_kv|kv_channels|mamba_d_head)", 8),
    (r"(.*_)?lora_rank|laurel_rank|.*_rank", 8),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|dim|hidden_dim|output_dim|dim_model|width)", 32),
    (r"word_embed_proj_dim|.*_embed(ding)?_dim|d_latents|hidden_size_global|out_hidden_size|.*_output_dim", 32),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|dff|dim_ff|ffn_hidden_size|feed_forward_hidden_size|n_inner|d_inner)",
        48,
    ),
    (r"num_kv_shared_layers|num_mtp_layers|num_nextn_predict_layers|first_k_dense_replace", 0),
    (
        r"(.*_)?(num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks|num_decoder_layers|num_encoder_layers)",
        2,
    ),
    (r"n_group|topk_group|n_groups|mamba_n_groups|mamba_ngroups", 1),
    (r".*(per_tok|topk|top_k|top_k_experts|index_topk)", 2),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|n_experts|zero_expert_num|num_expert)", 4),
    (r".*shared_experts", 1),
    (r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|context_length)", 128),
    (r"max_target_positions", 128),
    (r"max_source_positions|sliding_window(_size)?|local_attention|.*attention_chunk_size", 8),
    (r"num_mel_bins|mamba_d_state|state_size|ssm_state_size|mamba_chunk_size|chunk_size", 8),
    (r"initializer_range|init_std", 0.1),
    (r".*(dropout|layerdrop|pdrop|drop_path)(_prob|_rate)?|.*_dropout_p(rob)?", 0.0),
    (r"(.*_)?(image_size|img_size)", 32),
    (r"patch_size", 8),
    (r"num_queries|num_object_queries|num_image_tokens|num_conv_pos_embeddings", 4),
    (r"num_conv_pos_embedding_groups", 2),
    (r"(num_)?frames(_per_clip)?", 2),
]
"""Values by a pattern of the field's name; the first that matches counts. A field whose default is None stays None…"""

LIST_RULES: list[tuple[str, Any]] = [
    (r"(.*_)?(depths|num_blocks|layers|num_layers)", 1),
    (r"(.*_)?(num_attention_heads|num_heads)", 2),
    (r"(.*_)?(hidden_sizes|conv_dim|tdnn_dim|embed_dims?)", 16),
]
"""The value of every entry of a list, by a pattern of the field's name."""

ALWAYS_SET = ("pad_token_id", "bos_token_id", "head_dim", "num_key_value_heads")
"""… but for these."""


def tiny_config(config_class: type[PreTrainedConfig], **values: Any) -> PreTrainedConfig:
    """Make a config of small, consistent sizes."""
    return config_class(**tiny_values(config_class, **values))


def tiny_values(config_class: type[PreTrainedConfig], **given: Any) -> dict[str, Any]:
    """Return the arguments of [`tiny_config`]: by rule, unless `OVERRIDES` or the caller says otherwise."""
    given = {**OVERRIDES.get(config_class.__name__, {}), **given}
    values: dict[str, Any] = {}
    special_token = END_TOKEN + 1
    for field in dataclasses.fields(config_class):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if re.fullmatch(r".*token_(id|index)", field.name) and isinstance(default, int):
            values[field.name] = special_token
            special_token += 1
        sub_config = _sub_config(config_class, field.name, given.get(field.name))
        if sub_config is not None:
            values[field.name] = {
                "model_type": sub_config.model_type,
                **tiny_values(sub_config, **given.pop(field.name, {})),
            }
            continue
        is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if is_number or field.name in ALWAYS_SET:
            rule = next((value for pattern, value in RULES if re.fullmatch(pattern, field.name)), ...)
            if rule is not ...:
                values[field.name] = float(rule) if isinstance(default, float) and rule is not None else rule
        if isinstance(default, (list, tuple)) and all(isinstance(entry, int) for entry in default):
            rule = next((value for pattern, value in LIST_RULES if re.fullmatch(pattern, field.name)), ...)
            if rule is not ...:
                values[field.name] = [rule] * len(default)
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has no grouped heads
    values.update(_layer_kinds(config_class))
    values.update(given)
    return values


def _sub_config(config_class: type[PreTrainedConfig], name: str, given: Any) -> type[PreTrainedConfig] | None:
    """The class of a config inside a config, or `None`; where any class may stand, the one given, or else that of the default."""
    declared = (config_class.sub_configs or {}).get(name)
    if isinstance(given, dict) and "model_type" in given:
        declared = CONFIG_MAPPING[given["model_type"]]
    if declared is AutoConfig:
        declared = type(getattr(config_class(), name, None))
    is_config = isinstance(declared, type) and issubclass(declared, PreTrainedConfig)
    return declared if is_config and dataclasses.is_dataclass(declared) else None


def _layer_kinds(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """One layer of each kind that the default config has."""
    default = config_class()
    kinds: dict[str, list[str]] = {}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        types = getattr(default, name, None)
        if isinstance(types, (list, tuple)) and len(set(types)) > 1 and all(isinstance(item, str) for item in types):
            kinds[name] = list(dict.fromkeys(types))
    if not kinds:
        return {}
    length = max(len(types) for types in kinds.values())
    values: dict[str, Any] = {name: (types * length)[:length] for name, types in kinds.items()}
    fields = {field.name for field in dataclasses.fields(config_class)}
    if "num_hidden_layers" in fields:
        values["num_hidden_layers"] = length
    return {name: value for name, value in values.items() if name in fields}


OVERRIDES: dict[str, dict[str, Any]] = {
    **TOWER_SIZES,
    # what the published models have and the default config has not
    "DebertaConfig": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2Config": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    # kinds of layers that are given by other fields than layer_types
    "BambaConfig": {"attn_layer_indices": [1]},
    "JambaConfig": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    # sizes that must agree
    "CodeGenConfig": {"rotary_dim": 4},
    "GPTJConfig": {"rotary_dim": 4},
    "Mamba2Config": {"num_heads": 8},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Ernie4_5_MoeConfig": {"moe_k": 2},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "MptAttentionConfig": {"attn_pdrop": 0},
    "LiltConfig": {"hidden_size": 48, "channel_shrink_ratio": 2},
    "LayoutLMv3Config": {"coordinate_size": 6, "shape_size": 4, "input_size": 16, "patch_size": 8},
    "xLSTMConfig": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0, "mlstm_round_up_to_multiple_of": 4},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "CanineConfig": {"local_transformer_stride": 2, "downsampling_rate": 2, "num_hash_buckets": 64},
    "BigBirdConfig": {"attention_type": "original_full"},
    "BigBirdPegasusConfig": {"attention_type": "original_full"},
    "XmodConfig": {"default_language": "en_XX"},
    "T5Config": {"decoder_start_token_id": BOS_TOKEN},
    "EsmConfig": {"vocab_size": VOCABULARY, "mask_token_id": 4},
    "CohereCompassTextConfig": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "ZambaConfig": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "ReformerConfig": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
    },
    "EsmcConfig": {"num_key_value_heads": 4},
    "EncoderDecoderConfig": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "FunnelConfig": {"block_sizes": [1, 1], "bos_token_id": BOS_TOKEN},
}
"""What the rules get wrong, by config class."""

_AUDIO_CODES = {"guidance_scale": 1.0, "decoder_start_token_id": BOS_TOKEN, "num_return_sequences": 1}

GENERATION: dict[str, dict[str, Any]] = {
    "MusicgenForCausalLM": _AUDIO_CODES,
    "MusicgenMelodyForCausalLM": _AUDIO_CODES,
}
"""What a model's generation configuration must say, by model class."""

UNREAD_MODULES = {
    "CanineForSequenceClassification": ".*final_char_encoder.*",  # its classifier reads what comes before
}
"""Attention modules whose output a head does not read, as a pattern, by model class."""

NO_TEXT_LOSS = {
    "MusicgenForCausalLM",  # its labels have a dimension of their own for the codebooks
    "MusicgenMelodyForCausalLM",  # the same
    "GitForCausalLM",  # its loss leaves out as many tokens as an image has patches, image or not
}
"""Models whose loss does not take a text as its labels, by model class: they train on the cross-entropy of their logits."""

UNBUILDABLE: dict[str, str] = {
    "Gemma4AssistantForCausalLM": "makes drafts for another model, whose keys and values its forward takes as arguments",
    "Gemma4UnifiedAssistantForCausalLM": "makes drafts for another model, whose keys and values its forward takes as arguments",
    "Gemma3nForConditionalGeneration": "needs the libraries timm and Pillow for its vision tower; its language model is tested",
    "LayoutLMv2ForSequenceClassification": "needs the library detectron2 for its vision tower",
    "VoxtralRealtimeForConditionalGeneration": "takes a prefix, but its forward wants sound beside the text, which the tests do not make",
}
"""Architectures that are not built here, by model class, with the reason."""


@dataclass(frozen=True)
class Case:
    """An architecture of one of the auto mappings."""

    task_type: str
    model_type: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.task_type}-{self.class_name}"


def cases() -> list[Case]:
    """Every model class of the mappings, once per mapping."""
    found: dict[tuple[str, str], Case] = {}
    for task_type, mapping in MAPPINGS.items():
        for model_type, class_names in mapping.items():
            for class_name in [class_names] if isinstance(class_names, str) else class_names:
                found.setdefault((task_type, class_name), Case(task_type, model_type, class_name))
    return list(found.values())


def model_class(case: Case) -> type[nn.Module]:
    return getattr(transformers, case.class_name)


def tiny_model(case: Case, seed: int = 0) -> Any:
    """Build the tiny model of a case, in evaluation mode. No parameter is exactly zero, so that gradients pass."""
    config_class = CONFIG_MAPPING[case.model_type]
    cls: Any = model_class(case)
    if isinstance(getattr(cls, "config_class", None), type) and cls.config_class is not PreTrainedConfig:
        config_class = cls.config_class
    config = tiny_config(config_class)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.nan_to_num_(0.0, 0.0, 0.0).add_(0.02 * torch.randn_like(parameter))
    for name, value in GENERATION.get(case.class_name, {}).items():
        setattr(model.generation_config, name, value)
    return model.eval()


def token_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (batch, tokens), generator=generator)


def inputs_of(
    case: Case, model: Any, batch: int = 2, tokens: int = 7, with_labels: bool = False
) -> dict[str, torch.Tensor]:
    """Inputs of a case's task, without padding; classification of encoder-decoders wants an end token in every row."""
    ids = token_ids(batch, tokens)
    is_encoder_decoder = model.config.is_encoder_decoder
    inputs = {"input_ids": ids}
    if case.task_type == "SEQ_CLS":
        labels = torch.arange(batch) % 2
        if is_encoder_decoder:
            ids[:, -1] = END_TOKEN
    elif case.task_type == "SEQ_2_SEQ_LM" and is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids(batch, tokens - 2, seed=1)
        labels = token_ids(batch, tokens - 2, seed=3)
    else:
        labels = ids.clone()
    if with_labels:
        inputs["labels"] = labels
    return inputs
