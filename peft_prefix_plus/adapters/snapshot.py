"""What adding an adapter may change in a model, kept so that it can be undone."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class Snapshot:
    """
    The state of a model before an adapter is added to it: which parameters are trainable, which modules PEFT has
    wrapped for `modules_to_save`, which adapters are active.

    Args:
        model (`nn.Module`): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._active = {
            module: list(module.active_adapters)
            for module in model.modules()
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        }
        self._has_adapters = "peft_config" in vars(model)

    def restore(self, model: nn.Module, adapter_name: str) -> None:
        """
        Undo what PEFT did to the model when it added an adapter whose layers are gone already.

        Args:
            model (`nn.Module`): The model.
            adapter_name (`str`): The adapter.
        """
        for name, module in list(model.named_modules()):
            if not isinstance(module, AuxiliaryTrainingWrapper):
                continue
            if module in self._active:
                module.delete_adapter(adapter_name, new_active_adapters=[])
            else:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.original_module)
        for module, active_adapters in self._active.items():
            module.set_adapter(active_adapters)
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad = requires_grad
        if not self._has_adapters and "peft_config" in vars(model):
            del model.peft_config
