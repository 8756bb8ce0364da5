"""What a conversion is given: a base model, and of which task; an adapter, and whether others have one of its form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from torch import nn

from ..config import PrefixPlusConfig
from ..layer import PrefixPlusLayer


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


def check_joint(method: str, config: PrefixPlusConfig) -> None:
    """Raise a ValueError unless a prefix shares the softmax of the real tokens, as it does in another method."""
    for name in ("gating", "decoupled"):
        if getattr(config, name):
            raise ValueError(
                f"In {method} the prefix shares the softmax of the real tokens, so an adapter with {name}=True cannot be "
                "expressed in it. Train one with decoupled=False, position_free=False."
            )


def check_fixed_positions(method: str, adapter_name: str, layers: Iterable[tuple[str, PrefixPlusLayer]]) -> None:
    """Raise a ValueError unless an adapter's prefix is at fixed positions, as it is in another method."""
    if any(layer.reads_unrotated(adapter_name) for _, layer in layers):
        raise ValueError(
            f"In {method} the prefix is at fixed positions, so adapter {adapter_name!r}, which is position-free, cannot be "
            "expressed in it. Train one with position_free=False."
        )
