"""The one place that touches the registries of PEFT and transformers.

`peft_prefix_plus` calls [`register`] when it is imported. Importing again, reloading and importing in worker processes
are harmless.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AttentionInterface


if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner


METHOD_NAME = "prefix_plus"


def peft_type(value: str) -> PeftType:
    """Return a member of `PeftType`. Unpickling calls this, which imports (and registers) the method."""
    return PeftType(value)


def _add_peft_type(value: str) -> PeftType:
    """Make `value` a true member of the enum `PeftType`, unless it is one."""
    if value in PeftType._value2member_map_:
        return PeftType(value)
    member: Any = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    member.__reduce_ex__ = lambda protocol: (peft_type, (value,))
    type.__setattr__(PeftType, value, member)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    return member


PREFIX_PLUS = _add_peft_type(METHOD_NAME.upper())


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner], attention_functions: dict[str, Any]) -> None:
    """
    Register the method with PEFT, its attention functions with transformers, and with torch a hook that runs when a
    module becomes another's child.

    Args:
        config_cls: The configuration class.
        model_cls: The tuner class.
        attention_functions: The attention functions by the name that a config selects them with.
    """
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(PREFIX_PLUS, None)  # a reload replaces the classes of the earlier import
    register_peft_method(name=METHOD_NAME, config_cls=config_cls, model_cls=model_cls)
    for name, function in attention_functions.items():
        AttentionInterface.register(name, function)


def watch_for_parent(module: Any, tell: str) -> Callable[[], None]:
    """
    Call a method of a new module with the module that it is made a child of.

    PEFT makes a tuner, then makes it the `base_model` of a `PeftModel`, and tells it nothing of that. Torch's hook on this is one for
    the whole process, so the watch is to be ended as soon as possible; it ends with the module in any case.

    Args:
        module (`nn.Module`): The new module.
        tell (`str`): The name of its method, called with the parent.

    Returns:
        `Callable`: Ends the watch.
    """
    reference = weakref.ref(module)

    def hook(parent: nn.Module, name: str, child: Any) -> None:
        if child is not None and child is reference():
            getattr(child, tell)(parent)

    handle = register_module_module_registration_hook(hook)
    return weakref.finalize(module, handle.remove)
