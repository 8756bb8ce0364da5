"""What a conversion is given: whether it is a base model, and of which task."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn


def check_base_model(model: Any, adapter: str) -> None:
    """
    Raise unless a model is one without adapters.

    Args:
        model: The model.
        adapter (`str`): The adapter that is to be put on it, for the error.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(model, PeftModel) or not isinstance(model, nn.Module) or "peft_config" in vars(model):
        raise TypeError(
            f"`model` must be the base model, without adapters, that the adapter {adapter!r} was trained on; "
            f"got {type(model).__name__}" + (" with adapters." if isinstance(model, nn.Module) else ".")
        )


def task_type_of(base: Any) -> str | None:
    """Return the task type of a language model, which its class's name tells; `None` for other models."""
    name = type(base).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")) and not getattr(base.config, "is_encoder_decoder", False):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None
