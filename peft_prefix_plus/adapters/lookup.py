"""Finding the layers of an adapter."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..layer import PrefixPlusLayer
from ..registration import METHOD_NAME


def prefix_layers(model: nn.Module) -> Iterator[tuple[str, PrefixPlusLayer]]:
    """Yield the name of every attention module that carries a prefix, and its [`PrefixPlusLayer`]."""
    for name, module in model.named_modules():
        if isinstance(module, PrefixPlusLayer):
            yield name.removesuffix(f".{METHOD_NAME}"), module


def base_of(model: nn.Module) -> nn.Module:
    """Return the base model of a `PeftModel` or a tuner, and any other model as it is."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def layers_with_adapter(model: nn.Module, adapter_name: str) -> list[tuple[str, PrefixPlusLayer]]:
    """
    Return the layers that have an adapter, by the names that their attention modules have in the base model.

    Args:
        model (`nn.Module`): A `PeftModel`, a [`PrefixPlusModel`], or a base model with adapters injected.
        adapter_name (`str`): The adapter.

    Raises:
        ValueError: If no layer has it.
    """
    layers = list(prefix_layers(base_of(model)))
    found = [(name, layer) for name, layer in layers if adapter_name in layer.prefix_plus_encoder]
    if not found:
        adapters = sorted({name for _, layer in layers for name in layer.prefix_plus_encoder})
        raise ValueError(f"There is no PREFIX_PLUS adapter named {adapter_name!r} in the model; it has {adapters}.")
    return found
