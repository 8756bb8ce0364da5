"""Sizes of tiny models of images, sounds and series, where the rules of tests/tiny_models.py get them wrong, by config class."""

from __future__ import annotations

from typing import Any


def rotary(*sections: int) -> dict[str, Any]:
    """Rotation by positions in time, height and width: how many planes turn with each."""
    return {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)},
    }


def rotary_heads(*sections: int) -> dict[str, Any]:
    """The same, where the config has no `head_dim`."""
    return {name: value for name, value in rotary(*sections).items() if name != "head_dim"}


SWIN = {
    "model_type": "swin",
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": 2,
    "patch_size": 2,
    "image_size": 32,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
DINO = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
DETR: dict[str, Any] = {"use_timm_backbone": False, "backbone_config": {**RESNET, "out_indices": [1, 2, 3, 4]}}
RT_DETR = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_indices": [2, 3, 4],
    },
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [32, 32, 32],
    "encode_proj_layers": [2],
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "num_denoising": 0,
}
HGNET = {
    "model_type": "hgnet_v2",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 8, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 8, 16, 16],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 3, 3],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "out_indices": [2, 3, 4],
}
HGNET_ALL = {**HGNET, "out_indices": [1, 2, 3, 4]}
GROUNDING = {
    "backbone_config": {**SWIN, "image_size": 64, "out_indices": [2, 3, 4]},
    "max_text_len": 16,
    "query_dim": 4,
    "disable_custom_kernels": True,
}
SAPIENS = {"head_config": {"upsample_out_channels": [8, 8], "upsample_kernel_size": 4, "conv_out_channels": [8, 8]}}
LW_BACKBONE = {
    "model_type": "lw_detr_vit",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "pretrain_image_size": 64,
    "patch_size": 8,
    "num_windows": 4,
    "window_block_indices": [0, 2],
    "out_indices": [2, 4],
}
SAM_DECODER = {"hidden_size": 32, "mlp_dim": 32, "iou_head_hidden_dim": 32}

TOWER_SIZES: dict[str, dict[str, Any]] = {
    # sound
    "GraniteSpeech5EncoderConfig": {"num_key_value_heads": 4},
    "Wav2Vec2BertConfig": {"vocab_size": 160},
    "Wav2Vec2ConformerConfig": {"vocab_size": 160},
    "DiaDecoderConfig": {"num_channels": 9},
    "MimiConfig": {
        "num_filters": 8,
        "upsample_groups": 32,
        "codebook_size": 16,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
    },
    "FunAsrNanoConfig": {"adaptor_config": {"intermediate_size": 8}},
    "VitsConfig": {
        "upsample_initial_channel": 32,
        "posterior_encoder_num_wavenet_layers": 2,
        "flow_size": 32,
        "spectrogram_bins": 16,
        "duration_predictor_filter_channels": 16,
    },
    "FastSpeech2ConformerHifiGanConfig": {"upsample_initial_channel": 32, "model_in_dim": 8},
    "SeamlessM4TConfig": {"upsample_initial_channel": 32},
    "SeamlessM4Tv2Config": {"upsample_initial_channel": 32},
    "Qwen2_5OmniBigVGANConfig": {"upsample_initial_channel": 64},
    "Qwen2_5OmniDiTConfig": {
        "num_embeds": 16,
        "emb_dim": 16,
        "enc_channels": [16, 16, 16, 16, 48],
        "enc_dim": 16,
        "enc_attention_channels": 8,
        "enc_se_channels": 8,
    },
    # images: stages, windows and patches that must agree
    "SwinConfig": {"window_size": 2, "patch_size": 2, "embed_dim": 16, "encoder_stride": 16},
    "Swinv2Config": {"window_size": 2, "patch_size": 2, "embed_dim": 16, "encoder_stride": 16},
    "Swin2SRConfig": {"window_size": 4, "patch_size": 1},
    "DonutSwinConfig": {"window_size": 2, "patch_size": 2, "embed_dim": 16},
    "MaskFormerSwinConfig": {"window_size": 2, "patch_size": 2, "embed_dim": 16},
    "BitConfig": {"num_groups": 1},
    "LevitConfig": {
        "drop_path_rate": 0,
        "hidden_sizes": [16, 32, 32],
        "key_dim": [8, 8, 8],
        "image_size": 64,
        "patch_size": 16,
    },
    "TimesformerConfig": {"drop_path_rate": 0},
    "MobileViTV2Config": {"patch_size": 2, "image_size": 64},
    "BeitConfig": {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
    "PerceiverConfig": {"image_size": 32, "qk_channels": 32, "v_channels": 32},
    "SuperPointConfig": {
        "encoder_hidden_sizes": [8, 8, 8, 8],
        "decoder_hidden_size": 16,
        "keypoint_decoder_dim": 65,
        "descriptor_decoder_dim": 16,
    },
    "Sapiens2Config": SAPIENS,
    "VitPoseBackboneConfig": {"part_features": 8},
    "VitPoseConfig": {
        "backbone_config": {"model_type": "vitpose_backbone", **DINO, "image_size": [64, 64], "patch_size": [16, 16]}
    },
    "UperNetConfig": {"backbone_config": {**SWIN, "out_indices": [1, 2, 3, 4]}, "auxiliary_in_channels": 64},
    "MaskFormerConfig": {"backbone_config": SWIN},
    "Mask2FormerConfig": {"backbone_config": {**SWIN, "out_indices": [1, 2, 3, 4]}, "num_feature_levels": 3},
    "OneFormerConfig": {"backbone_config": {**SWIN, "out_indices": [1, 2, 3, 4]}, "task_seq_len": 8},
    "VitMatteConfig": {
        "backbone_config": {**DINO, "model_type": "vitdet"},
        "fusion_hidden_sizes": [32, 16, 16, 8],
        "convstream_hidden_sizes": [8, 8, 8],
    },
    "EfficientLoFTRConfig": {"out_features": [8, 8, 16, 32], "stage_num_blocks": [1, 1, 1, 1], "hidden_size": 32},
    "EfficientNetConfig": {"width_coefficient": 0.2, "depth_coefficient": 0.3, "hidden_dim": 16, "depth_divisor": 8},
    "AlignVisionConfig": {"width_coefficient": 0.2, "depth_coefficient": 0.3, "hidden_dim": 16},
    "DepthAnythingConfig": {"neck_hidden_sizes": [16, 16, 16, 16]},
    # detection
    "DetrConfig": {**DETR, "d_model": 32, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "ConditionalDetrConfig": DETR,
    "DeformableDetrConfig": {**DETR, "disable_custom_kernels": True},
    "TableTransformerConfig": DETR,
    "DabDetrConfig": {**DETR, "query_dim": 4},
    "RTDetrConfig": RT_DETR,
    "RTDetrV2Config": RT_DETR,
    "DFineConfig": {**RT_DETR, "backbone_config": HGNET},
    "Deimv2Config": {**RT_DETR, "backbone_config": HGNET},
    "PPDocLayoutV2Config": {**RT_DETR, "backbone_config": HGNET},
    "PPDocLayoutV3Config": {**RT_DETR, "backbone_config": HGNET_ALL, "x4_feat_dim": 8},
    "PPDocLayoutV4Config": {**RT_DETR, "backbone_config": HGNET},
    "LwDetrConfig": {"backbone_config": LW_BACKBONE, "projector_scale_factors": [1.0], "group_detr": 1},
    "RfDetrConfig": {"group_detr": 1},
    "GroundingDinoConfig": GROUNDING,
    "MMGroundingDinoConfig": GROUNDING,
    # masks
    "SamPromptEncoderConfig": {"hidden_size": 32},
    "SamVisionConfig": {"output_channels": 32, "num_pos_feats": 16, "window_size": 2, "global_attn_indexes": [1]},
    "SamMaskDecoderConfig": SAM_DECODER,
    "Sam2HieraDetConfig": {
        "hidden_size": 16,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 2, 2, 1],
        "embed_dim_per_stage": [16, 16, 32, 32],
        "num_attention_heads_per_stage": [2, 2, 2, 2],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [4],
    },
    "Sam2VisionConfig": {
        "backbone_channel_list": [32, 32, 16, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 32,
    },
    "Sam2PromptEncoderConfig": {"image_size": 64, "patch_size": 16},
    "Sam2MaskDecoderConfig": SAM_DECODER,
    "Sam3TrackerConfig": {
        "vision_config": {
            "model_type": "sam3_vision_model",
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        }
    },
    "SamHQPromptEncoderConfig": {"hidden_size": 32},
    "SamHQVisionConfig": {"output_channels": 32, "num_pos_feats": 16, "window_size": 2, "global_attn_indexes": [1]},
    "SamHQMaskDecoderConfig": {**SAM_DECODER, "vit_dim": 32},
    # text and images
    "Qwen2VLTextConfig": rotary_heads(2, 1, 1),
    "Qwen2_5_VLTextConfig": rotary_heads(2, 1, 1),
    "Qwen2_5OmniTextConfig": rotary_heads(2, 1, 1),
    "Qwen2_5OmniTalkerConfig": rotary(2, 1, 1),
    "PaddleOCRTextConfig": rotary(2, 1, 1),
    "Glm4vTextConfig": rotary_heads(2, 1, 1),
    "Glm4vMoeTextConfig": rotary(1, 1, 0),
    "GlmOcrTextConfig": rotary(2, 1, 1),
    "Cosmos3EdgeTextConfig": rotary(2, 1, 1),
    "Ernie4_5_VLMoeTextConfig": {**rotary_heads(1, 1, 2), "moe_k": 2},
    "HunYuanVLTextConfig": rotary(1, 1, 1, 1),
    "ChameleonConfig": {"vocabulary_map": {"<image>": 4}},
    "ChameleonVQVAEConfig": {
        "base_channels": 32,
        "latent_channels": 32,
        "channel_multiplier": [1, 1],
        "resolution": 32,
        "num_embeddings": 16,
    },
    "Emu3Config": {"vocabulary_map": {"<image>": 4}},
    "Emu3VQVAEConfig": {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "codebook_size": 16,
        "hidden_size": 32,
        "num_attention_heads": 1,
    },
    "JanusVQVAEConfig": {
        "base_channels": 32,
        "latent_channels": 32,
        "channel_multiplier": [1, 1],
        "num_embeddings": 16,
    },
    "DeepseekOcr2TextConfig": {
        "mlp_layer_types": ["dense", "sparse"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Florence2VisionConfig": {
        "embed_dim": [16, 16, 16, 16],
        "num_groups": [2, 2, 2, 2],
        "window_size": 2,
        "projection_dim": 32,
    },
    "Granite4VisionConfig": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "2/4"},
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1, -2], "text_hidden_size": 32},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "Glm5NextTextConfig": {"index_topk": 16, "qk_rope_head_dim": 0, "head_dim": 0},
    "Dots3NoteVisionConfig": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "Dots3NoteAudioConfig": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 16},
}
