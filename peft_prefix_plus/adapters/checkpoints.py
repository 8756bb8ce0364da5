"""Whether a checkpoint fits an adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..layer import PrefixPlusLayer
from ..registration import METHOD_NAME
from ..saving.weights import ADVICE
from .shared import SharedParts


CONTAINERS = (*PrefixPlusLayer.adapter_layer_names, *SharedParts.adapter_layer_names)
"""The names of the dictionaries that hold parameters by adapter."""


def adapter_keys(state_dict: Mapping[str, torch.Tensor], adapter_name: str) -> set[str]:
    """Return the keys of a model's state dict that are an adapter's."""
    containers = "|".join(CONTAINERS)
    is_adapter_key = re.compile(rf"(?:^|\.){METHOD_NAME}\.(?:{containers})\.{re.escape(adapter_name)}(?:\.|$)")
    return {key for key in state_dict if is_adapter_key.search(key)}


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Raise if PEFT, which finds an adapter's name anywhere between the dots of a key, would mix up the keys."""
    for key in adapter_keys(model.state_dict(), adapter_name):
        if f"base_model.model.{key}".split(".").count(adapter_name) > 1:
            raise ValueError(
                f"An adapter of this model cannot be named {adapter_name!r}: this is a part of the parameter name "
                f"{key!r}, so PEFT could not tell its adapters apart when saving. Choose another name."
            )


def loadable_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """Return the keys of a model's state dict that an adapter's checkpoint may fill: the adapter's own, and its copies of modules."""
    loadable = adapter_keys(model.state_dict(), adapter_name)
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            path = name.replace("_fsdp_wrapped_module.", "")  # which FSDP's state dict does not have
            loadable.update(f"{path}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())
    return loadable


def check_checkpoint(
    expected: Mapping[str, torch.Tensor],
    adapter_name: str,
    state_dict: Mapping[str, torch.Tensor],
    loadable: Collection[str],
) -> None:
    """
    Raise unless a checkpoint has exactly the tensors of an adapter, and they are finite real numbers.

    Args:
        expected (`Mapping[str, torch.Tensor]`): The model's state dict.
        adapter_name (`str`): The adapter.
        state_dict (`Mapping[str, torch.Tensor]`): The checkpoint, with the model's keys.
        loadable (`Collection[str]`): The model's keys that it may have.
    """
    for key in sorted(adapter_keys(expected, adapter_name)):
        if key not in state_dict:
            raise ValueError(
                f"The checkpoint does not fit adapter {adapter_name!r}: it has no tensor for {key}, of shape "
                f"{tuple(expected[key].shape)}. {ADVICE}"
            )
    for key, tensor in state_dict.items():
        model_key = key if key in expected else key.removeprefix("base_model.model.")
        if model_key not in expected:
            raise ValueError(
                f"The checkpoint does not fit adapter {adapter_name!r}: it has a tensor {key}, of shape "
                f"{tuple(tensor.shape)}, and the model has none of that name. {ADVICE}"
            )
        if tensor.shape != expected[model_key].shape:
            raise ValueError(
                f"The checkpoint does not fit adapter {adapter_name!r}: {key} has shape {tuple(tensor.shape)} in it "
                f"and {tuple(expected[model_key].shape)} in the model. {ADVICE}"
            )
        if model_key not in loadable:
            raise ValueError(
                f"The checkpoint of adapter {adapter_name!r} has a tensor {key}, which is not the adapter's: loading it would change "
                "the base model or another adapter. Remove it from the file, or name its module in `modules_to_save` when you "
                "train."
            )
        if expected[model_key].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(
                f"The checkpoint does not fit adapter {adapter_name!r}: {key} has dtype {tensor.dtype}, expected real numbers in "
                "floating point. Save it in float32, bfloat16 or float16."
            )
        if not bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all()):
            raise ValueError(
                f"The checkpoint of adapter {adapter_name!r} has NaN or Inf in {key}. Its training has probably diverged: load an "
                "earlier checkpoint."
            )
