"""All-or-nothing operations on a model."""

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

    It keeps the attributes of every module and configuration, and the contents of dictionaries, lists and sets among
    them; adding, loading, switching and deleting adapters changes nothing else. Parameters are kept as objects, with
    their gradients and `requires_grad`. Their values are kept for one adapter only, because no operation changes
    others.

    Args:
        model (`nn.Module`): The model: a `PeftModel`, a tuner or a base model.
        configs (`Iterable[PeftConfig]`): Further configurations, beside those of the model's adapters.
        adapter_name (`str`, *optional*): The adapter whose parameters' values may change.
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
        """Restore everything. An interrupt meanwhile is raised afterwards."""
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
    """
    Restore the contents of a dictionary, list or set, in their order. It stays the same object, because others may
    refer to it.
    """
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
    """The modules that change if adapters are only activated, or switched off and on."""
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
    Restore a model if the block ends with an error, an interrupt or a lack of memory.

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


@contextmanager
def restored_afterwards(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """
    Restore a model when the block ends, however it ends.

    Args:
        model (`nn.Module`): The model.
        modules (`Iterable[nn.Module]`, *optional*): The modules that the block may change; `None` means all.
    """
    snapshot = Snapshot(model, modules=modules)
    try:
        yield
    finally:
        snapshot.restore()
