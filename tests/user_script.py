"""What a user writes, for `make lint`: basedpyright must know every type in it, as a user's editor does."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import assert_type

from peft_prefix_plus import (
    LayerSuggestion,
    PrefixPlusConfig,
    Residual,
    flatten,
    from_prefix_tuning,
    initialize_from_key_values,
    prefix_attention_mass,
    prefix_contribution,
    prefix_key_values,
    prefix_plus_param_groups,
    prune_layers,
    suggest_layers,
)
from peft_prefix_plus.config import Reparameterization, Sharing


def use_what_is_public(path: Path) -> None:
    config = PrefixPlusConfig(task_type="CAUSAL_LM", reparameterization="mlp", sharing="all", layers_to_transform=[-1])
    assert_type(config.reparameterization, Reparameterization | None)
    assert_type(config.sharing, Sharing)
    PrefixPlusConfig(reparameterization="linaer")  # pyright: ignore[reportArgumentType]
    PrefixPlusConfig(init_weights="zeros")  # pyright: ignore[reportArgumentType]

    model = get_peft_model(LlamaForCausalLM(LlamaConfig()), config)
    tokens = torch.arange(8)[None]
    assert_type(prefix_key_values(model), dict[str, tuple[torch.Tensor, torch.Tensor]])
    assert_type(prefix_attention_mass(model, input_ids=tokens), dict[str, torch.Tensor])
    assert_type(prefix_contribution(model, input_ids=tokens), dict[str, torch.Tensor])
    assert_type(initialize_from_key_values(model, prefix_key_values(model)), dict[str, Residual])
    assert_type(suggest_layers(model, [{"input_ids": tokens, "labels": tokens}], 0.5), LayerSuggestion)
    torch.optim.AdamW(prefix_plus_param_groups(model, lr=1e-3))
    prune_layers(model, [0])
    flatten(model)
    assert_type(from_prefix_tuning(str(path), LlamaForCausalLM(LlamaConfig())), PeftModel)
