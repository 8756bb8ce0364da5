"""Operations on a model that are done as a whole or not at all, however they end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .checkpoints import loadable_keys


class Snapshot:
    """
    The state of a model and its adapters' configurations, to go back to.

    Kept are the attributes of every module and configuration, and what the dictionaries, lists and sets among them hold: that is
    all that adding, loading, switching and deleting adapters changes. Parameters are kept as objects, with their gradients and
    whether they are trainable. Their numbers are kept of one adapter only, for no operation changes others.

    Args:
        model (`nn.Module`): The model: a `PeftModel`, a tuner or a base model.
        configs (`Iterable[PeftConfig]`): Configurations beside those of the model's adapters.
        adapter_name (`str`, *optional*): The adapter whose numbers may change.
        modules (`Iterable[nn.Module]`, *optional*): The modules that may change, apart from their parameters; `None` means all.
    """

    def __init__(
        self,
        model: nn.Module,
        configs: Iterable[Any] = (),
        adapter_name: str | None = None,
        modules: Iterable[nn.Module] | None = None,
    ) -> None:
        modules = list(model.modules() if modules is None else modules)
        adapters: Any = getattr(model, "peft_config", None)
        known = list(adapters.values()) if isinstance(adapters, dict) else []
        self._classes = [(module, type(module)) for module in modules]
        self._containers: list[tuple[Any, Any]] = []
        for each in {id(each): each for each in (*modules, *known, *configs)}.values():
            attributes = vars(each)
            self._containers.append((attributes, dict(attributes)))
            for value in attributes.values():
                if isinstance(value, (dict, list, set)):
                    self._containers.append((value, _copy(value)))
        self._parameters = [(each, each.requires_grad, each.grad) for each in model.parameters()]
        self._numbers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if adapter_name is not None:
            state = model.state_dict(keep_vars=True)
            tensors = [state[key] for key in sorted(loadable_keys(model, adapter_name) & state.keys())]
            self._numbers = [(each, each.data, each.detach().clone()) for each in tensors]

    def restore(self) -> None:
        """Put everything back. An interrupt meanwhile is raised when that is done."""
        try:
            self._restore()
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        for container, contents in self._containers:
            _refill(container, contents)
        for module, own_class in self._classes:
            if type(module) is not own_class:
                module.__class__ = own_class
        for tensor, data, numbers in self._numbers:
            tensor.data = data  # a cast gives a parameter other memory
            data.copy_(numbers)
        for parameter, requires_grad, grad in self._parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad
            if parameter.grad is not grad:
                parameter.grad = grad


EMPTY: dict[Any, Any] = {}
"""What most dictionaries of modules hold; one for all of them keeps a snapshot quick."""


def _copy(container: Any) -> Any:
    if isinstance(container, dict):
        # by items: what shards a model has dictionaries of its own, which cannot be copied
        return dict(container.items()) if container else EMPTY
    return container.copy()


def _refill(container: Any, contents: Any) -> None:
    """Give a dictionary, list or set back what it held, in that order. Others may refer to it, so it stays the object that it is."""
    if isinstance(container, dict):
        if list(container) == list(contents) and all(container[key] is value for key, value in contents.items()):
            return
        container.clear()
        container.update(contents)
    elif isinstance(container, list):
        container[:] = contents
    elif container != contents:
        container.clear()
        container.update(contents)


def what_switching_changes(model: nn.Module) -> list[nn.Module]:
    """The modules that change where adapters are only activated or switched off and on."""
    kinds = (PeftModel, BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


@contextmanager
def all_or_nothing(
    model: nn.Module,
    *configs: Any,
    adapter_name: str | None = None,
    modules: Iterable[nn.Module] | None = None,
) -> Iterator[Snapshot]:
    """
    Leave a model as it was if the block ends by an error, an interrupt or a lack of memory.

    Args:
        model (`nn.Module`): The model, and what wraps it as far as that changes.
        configs (`PeftConfig`): Configurations that the block may change, beside those of the model's adapters.
        adapter_name (`str`, *optional*): The adapter whose parameters the block writes, if it writes any.
        modules (`Iterable[nn.Module]`, *optional*): The modules that the block may change; `None` means all.
    """
    snapshot = Snapshot(model, configs, adapter_name, modules)
    try:
        yield snapshot
    except BaseException:
        snapshot.restore()
        raise
