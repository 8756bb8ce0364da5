"""
Adapters of other PEFT methods on the same model.

PEFT keeps one dict of configurations on a model, and the modules that it saves copies of (`modules_to_save`), for the
adapters of all methods. A method's own layers are no other's business; these two are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..registration import PREFIX_PLUS


def require_free_name(model: nn.Module, adapter_name: str) -> None:
    """Raise if an adapter of another method has the name: PEFT would save both as one."""
    other: Any = (getattr(model, "peft_config", None) or {}).get(adapter_name)
    if other is not None and other.peft_type != PREFIX_PLUS:
        raise ValueError(
            f"The model has an adapter named {adapter_name!r} already, of {other.peft_type.value}. Give the new one a name "
            "of its own, for instance get_peft_model(model, config, adapter_name='prefix')."
        )


def require_unwrapped(model: nn.Module, config: Any) -> None:
    """Raise if a further adapter is to be loaded by a wrapper around the wrapper of the first: its modules have other names there."""
    has_prefix = isinstance(model, PeftModel) and model.peft_type == PREFIX_PLUS
    if has_prefix and config.awaits_weights:
        raise ValueError(
            "The model is a PeftModel with PREFIX_PLUS adapters already. Load a further adapter into it by "
            "model.load_adapter(directory, adapter_name='other'), or give PeftModel.from_pretrained the base model, "
            "model.unload()."
        )


@contextmanager
def keeping_others_modules(model: nn.Module, adapter_names: Collection[str]) -> Iterator[None]:
    """
    Leave the modules that PEFT saves copies of as they are, where the copy in use is not one of these adapters': PEFT
    switches off those of other methods' adapters.
    """
    others = [
        (module, list(module.active_adapters), [(each, each.requires_grad) for each in module.parameters()])
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and set(module.active_adapters).isdisjoint(adapter_names)
    ]
    yield
    for module, active_adapters, requires_grad in others:
        if active_adapters and not module.active_adapters:
            module.set_adapter(active_adapters)
            for parameter, value in requires_grad:
                parameter.requires_grad = value


def leave_modules_to_others(model: nn.Module, adapter_names: Collection[str], configs: Mapping[str, Any]) -> None:
    """
    Take the copies of these adapters out of the modules that PEFT saves copies of. Where one was in use, that of another
    method's active adapter is put to use; where none is left, the module itself is put back.

    Args:
        model (`nn.Module`): The base model.
        adapter_names (`Collection[str]`): The adapters.
        configs (`Mapping[str, PeftConfig]`): The configurations of all adapters.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active = {name for layer in layers for name in layer.active_adapters if name in configs}
    for path, module in list(model.named_modules()):
        if not isinstance(module, AuxiliaryTrainingWrapper) or module._adapters.isdisjoint(adapter_names):
            continue
        with keeping_others_modules(module, adapter_names):
            for name in adapter_names:
                module.delete_adapter(name, new_active_adapters=None)
        remaining = sorted(active.intersection(module._adapters))
        if not module._adapters:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original_module)
        elif remaining and not module.active_adapters:
            module.set_adapter(remaining[0], inference_mode=configs[remaining[0]].inference_mode)
