"""The one place that touches the registries of PEFT and transformers.

`peft_prefix_plus` calls [`register`] when it is imported. Importing again, reloading and importing in worker processes
are harmless.
"""

from __future__ import annotations

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
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface


if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner


METHOD_NAME = "prefix_plus"


def peft_type(value: str) -> PeftType:
    """Return a member of `PeftType`. Unpickling goes through here, so that it imports (and registers) the method."""
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
    Register the method with PEFT, its attention functions with transformers, and a hook with torch that says when a module
    becomes another's child.

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
    _tell_of_wrappers(model_cls)


_hook: RemovableHandle | None = None


def _tell_of_wrappers(model_cls: Any) -> None:
    """Let a tuner know the `PeftModel` that it becomes the `base_model` of: PEFT makes the tuner first, and then tells it nothing."""
    global _hook
    if _hook is not None:
        _hook.remove()

    def tell(parent: nn.Module, name: str, child: Any) -> None:
        if isinstance(child, model_cls):
            child.wrapped_by(parent)

    _hook = register_module_module_registration_hook(tell)
