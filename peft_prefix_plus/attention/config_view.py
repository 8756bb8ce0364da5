"""The view of a model's config that makes one attention module, and no other, call another attention function."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn


if TYPE_CHECKING:
    from typing_extensions import Self


def reads_implementation(module_class: type[nn.Module]) -> bool:
    """Whether the class's forward compares the name of the attention implementation with names it knows."""
    constants = inspect.unwrap(module_class.forward).__code__.co_consts
    names = {item for constant in constants for item in (constant if isinstance(constant, tuple) else (constant,))}
    return not names.isdisjoint({"eager", "sdpa", "flex_attention"})


class ImplementationName(str):
    """
    A string that compares equal to the name of one attention implementation, and is looked up as another.

    A few attention modules ask which implementation they run under (GPT-2, the sparse attention of DeepSeek 3.2): they
    must see their model's own, while the registry of attention functions must find ours.
    """

    own_name: str
    registered_name: str

    def __new__(cls, name: str, registered_name: str) -> Self:
        self = super().__new__(cls, name)
        self.own_name, self.registered_name = name, registered_name
        return self

    def __eq__(self, other: object) -> bool:
        return other == self.own_name or other == self.registered_name

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.registered_name)


class ConfigView:
    """
    A view of a config that differs from it only in `_attn_implementation`.

    Reading and writing any other attribute reads and writes the model's own config.

    Args:
        config: The model's config.
        implementation: The registered name of the attention function to call.
        is_compared: Whether the module compares the name (see [`reads_implementation`]).
    """

    def __init__(self, config: Any, implementation: str, is_compared: bool = False) -> None:
        vars(self).update(_config=config, _implementation=implementation, _is_compared=is_compared, _names={})
        if is_compared:
            self._name_of(config._attn_implementation)  # made beforehand: torch.compile can only look it up

    @property
    def _attn_implementation(self) -> str:
        return self._name_of(self._config._attn_implementation) if self._is_compared else self._implementation

    def _name_of(self, name: str) -> str:
        if name not in self._names:
            self._names[name] = ImplementationName(name, self._implementation)
        return self._names[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._config, self._implementation, self._is_compared)


def set_config(module: Any, config: Any) -> None:
    """Give an attention module another config, or a view of its own."""
    module.config = config


def model_config(module: nn.Module) -> Any:
    """Return the model's own config, whether or not the module has a view of it."""
    config: Any = module.config
    # told by its contents, not its class: a view made before the package was reloaded is a view too
    return vars(config)["_config"] if "_implementation" in vars(config) else config


def registered_name(module: Any) -> str:
    """Return the name of the attention function that a module's view of its config selects."""
    return vars(module.config)["_implementation"]


class _WithModelConfig:
    """An attention module as the base model has it: with the model's own config."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.config = model_config(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def with_model_config(module: Any) -> Any:
    """
    Show an attention function the module with the model's own config.

    One view cannot serve both the module's code and the functions below it: the code must find our function by the
    name, the functions their own, and a name has only one hash.
    """
    return _WithModelConfig(module)
