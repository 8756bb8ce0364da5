"""The tuner: which modules of a model carry which adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _delete_auxiliary_adapter, _ExcludedModule
from torch import nn

from .attention import check_implementation, model_config
from .config import PrefixPlusConfig
from .encoders import KVShape
from .layer import PrefixPlusLayer, attach, detach
from .registration import METHOD_NAME
from .targets import Selection, select_modules


class PrefixPlusModel(BaseTuner):
    """
    Puts learned keys and values before the real ones in the attention of chosen layers of a frozen model.

    Made by [`get_peft_model`] from a [`PrefixPlusConfig`]. Every chosen attention module gets a [`PrefixPlusLayer`] as a
    child and a view of its config that makes it, and no other module, call attention with a prefix. Base weights, masks,
    positions, caches and all other layers stay the base model's.

    Args:
        model (`nn.Module`): The model to adapt.
        peft_config (`PrefixPlusConfig` or `dict[str, PrefixPlusConfig]`): The configuration, or one by adapter name.
        adapter_name (`str`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Make the adapter's parameters on the meta device.
        state_dict (`dict[str, torch.Tensor]`, *optional*): Choose modules by a checkpoint's keys instead of the config.

    Raises:
        ValueError: If the configuration does not fit the model. The model is then left as it was.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
    >>> model.print_trainable_parameters()
    trainable params: 2,560 || all params: 97,344 || trainable%: 2.6298

    ```
    """

    prefix: str = f"{METHOD_NAME}_"
    tuner_layer_cls = PrefixPlusLayer
    target_module_mapping: dict[str, list[str]] = {}

    # Set while an adapter is being injected.
    _selection: Selection | None = None

    # ------------------------------------------------------------------------------------------------ building

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Add an adapter's layers to the model, or raise and leave the model as it was.

        Args:
            model (`nn.Module`): The model.
            adapter_name (`str`): The adapter, whose configuration is in `peft_config`.
            autocast_adapter_dtype (`bool`, defaults to `True`): As in PEFT.
            low_cpu_mem_usage (`bool`, defaults to `False`): Make the parameters on the meta device.
            state_dict (`dict[str, torch.Tensor]`, *optional*): Choose modules by a checkpoint's keys.
        """
        config: Any = self.peft_config[adapter_name]
        self._selection = select_modules(model, config)
        self._shared_parts: dict[tuple[str, KVShape | None], nn.Module] = {}
        for name in self._selection.modules:
            check_implementation(model_config(model.get_submodule(name))._attn_implementation)
        if state_dict is not None:
            # PEFT takes what stands before the last ".prefix_plus_" of a key for the adapted module's name
            state_dict = {
                key.replace(f".{METHOD_NAME}.{self.prefix}", f".{self.prefix}"): value
                for key, value in state_dict.items()
            }
        try:
            with _restoring_trainability_on_error(model):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            self._remove_adapter(model, adapter_name)
            raise
        finally:
            del self._selection, self._shared_parts

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # `target_modules=None` stays None, so that a saved adapter finds its modules by itself

    def _check_target_module_exists(self, peft_config: PrefixPlusConfig, key: str) -> bool | _ExcludedModule:  # type: ignore[override]
        selection = self._selection or select_modules(self.model, peft_config)
        return _ExcludedModule() if key in selection.excluded else key in selection.modules

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert self._selection is not None
        geometry = self._selection.modules[current_key]
        attach(target).update_layer(adapter_name, peft_config, geometry, self._shared_parts)

    # ------------------------------------------------------------------------------------------------ adapters

    def prefix_layers(self) -> Iterator[tuple[str, PrefixPlusLayer]]:
        """Yield the name of every attention module that carries a prefix, and its [`PrefixPlusLayer`]."""
        return prefix_layers(self.model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Set the active adapter, or several at once: their prefixes then stand one after the other.

        Args:
            adapter_name (`str` or `list[str]`): The name or names.
            inference_mode (`bool`, defaults to `False`): Whether to freeze the activated adapters.

        Raises:
            ValueError: If there is no adapter of that name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"There is no adapter named {unknown[0]!r}; the adapters are {sorted(self.peft_config)}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Delete an adapter. If it was the only active one, the first of the remaining ones becomes active.

        Args:
            adapter_name (`str`): The name.

        Raises:
            ValueError: If there is no adapter of that name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(
                f"There is no adapter named {adapter_name!r}; the adapters are {sorted(self.peft_config)}."
            )
        del self.peft_config[adapter_name]
        active = [name for name in self.active_adapters if name != adapter_name]
        if not active and self.peft_config:
            active = [next(iter(self.peft_config))]
            warnings.warn(
                f"Adapter {adapter_name} was active and is now deleted. The active adapter is now {active[0]}.",
                stacklevel=2,
            )
        self._remove_adapter(self.model, adapter_name)
        _delete_auxiliary_adapter(self.model, adapter_name=adapter_name, new_active_adapters=active)
        if active:
            self.set_adapter(active)
        else:
            self.active_adapter = []

    def _remove_adapter(self, model: nn.Module, adapter_name: str) -> None:
        """Take an adapter's parameters out of every layer, and the layer off every module that it leaves bare."""
        for _, layer in list(prefix_layers(model)):
            layer.delete_adapter(adapter_name)
            if not layer.prefix_plus_encoder:
                detach(layer.attention)

    def unload(self) -> nn.Module:
        """
        Return the base model, with every trace of the adapters removed.

        Returns:
            `nn.Module`: The base model, with the modules and config objects that it had before.
        """
        for _, layer in list(self.prefix_layers()):
            detach(layer.attention)
        return super().unload()

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A PREFIX_PLUS adapter cannot be merged: a prefix is keys and values that attention reads beside the real "
            "ones, and no change of the base model's weights computes the same. Keep the adapter loaded (its cost is "
            "that of `num_virtual_tokens` more positions), use `flatten(model)` to drop the reparameterization, or "
            "`unload()` to get the base model back."
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in PrefixPlusLayer.adapter_layer_names:
            key = key.replace(f".{container}.{adapter_name}.", f".{container}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)


def prefix_layers(model: nn.Module) -> Iterator[tuple[str, PrefixPlusLayer]]:
    """Yield the name of every attention module that carries a prefix, and its [`PrefixPlusLayer`]."""
    for name, module in model.named_modules():
        if isinstance(module, PrefixPlusLayer):
            yield name.removesuffix(f".{METHOD_NAME}"), module


@contextmanager
def _restoring_trainability_on_error(model: nn.Module) -> Iterator[None]:
    trainability = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except Exception:
        for parameter, requires_grad in trainability:
            parameter.requires_grad = requires_grad
        raise
