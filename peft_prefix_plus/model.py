"""The tuner: which modules of a model carry which adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapters.checkpoints import CONTAINERS, check_adapter_name, check_checkpoint, loadable_keys
from .adapters.composition import check_combination, combined_config, combined_prefixes
from .adapters.lookup import layers_with_adapter, prefix_layers
from .adapters.operations import act_as_a_whole
from .adapters.other_methods import (
    keeping_others_modules,
    leave_modules_to_others,
    require_free_name,
    require_unwrapped,
)
from .adapters.references import ModelReference
from .adapters.rows import pass_rows, stop_passing_rows
from .adapters.running import keeping_prefixes, naming_rows
from .adapters.shared import PrefixPlusModule, remove_shared_parts, shared_parts
from .adapters.snapshot import all_or_nothing, what_switching_changes
from .attention import attention_family, model_config
from .config import PrefixPlusConfig
from .encoders import ENCODERS, SHARED_PARTS
from .layer import PrefixPlusLayer, attach, detach
from .probing.modules import calls_attention_interface
from .probing.targets import Selection, resolve_position_free, select_modules, select_saved_modules, warn_of_impossible
from .registration import METHOD_NAME, PREFIX_PLUS, watch_for_parent
from .starting.fitting import fit, repeated
from .starting.quiet import start_quietly


BASE_MODEL_NAME = "__base__"
"""What stands for no adapter in `adapter_names`."""


class PrefixPlusModel(BaseTuner):
    """
    Puts learned keys and values before the real ones in the attention of chosen layers of a frozen model.

    [`get_peft_model`] makes it from a [`PrefixPlusConfig`]. Every chosen attention module gets a [`PrefixPlusLayer`]
    as a child, and a view of its config that makes only this module call attention with a prefix. Base weights, masks,
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
    trainable params: 2,824 || all params: 97,864 || trainable%: 2.8856

    ```
    """

    prefix: str = f"{METHOD_NAME}_"
    tuner_layer_cls = PrefixPlusModule
    target_module_mapping: dict[str, list[str]] = {}

    # Set while an adapter is being injected: its modules, and its configuration with what `position_free` resolved to.
    _selection: Selection | None = None
    _resolved: PrefixPlusConfig | None = None

    # The `PeftModel` around this tuner, if there is one, and what ends the wait for it.
    _wrapper = ModelReference(None)
    _end_watch: Any = staticmethod(lambda: None)

    # ------------------------------------------------------------------------------------------------ building

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        require_unwrapped(model, config)
        require_free_name(model, adapter_name)
        with all_or_nothing(model, config) as before:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
            # A tuner of another method shares this dict through the model, and takes it from there when it is unloaded.
            self.peft_config = self.peft_config
        # The model before an adapter that waits for its weights, to go back to if they do not fit.
        self.before_loading = {adapter_name: before} if config.awaits_weights else {}
        self._end_watch = watch_for_parent(self, "_wrapped_by")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        self._end_watch()  # a `PeftModel` calls this when it has made the tuner its child
        vars(self).pop("_end_watch", None)  # it cannot be pickled
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _wrapped_by(self, parent: nn.Module) -> None:
        """Remember the module that this tuner becomes a child of."""
        if isinstance(parent, PeftModel):
            self._wrapper = ModelReference(parent)
            act_as_a_whole(parent)

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
        target_modules = config.target_modules
        with all_or_nothing(self):
            resolved = replace(config)  # which checks the fields again: they can have been set since
            if state_dict is None:
                self._selection = select_modules(model, config)
            else:
                self._selection = select_saved_modules(model, config, state_dict)
            resolved.position_free = resolve_position_free(model, config, self._selection)
            self._resolved = resolved
            for name in self._selection.modules:
                module = model.get_submodule(name)
                if calls_attention_interface(module):
                    attention_family(model_config(module)._attn_implementation)
            remove_shared_parts(model, adapter_name)  # those of an adapter that this one replaces
            with keeping_others_modules(model, self._adapter_names()):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            config.target_modules = target_modules  # PEFT shortens a long list of names to a set
            if adapter_name in self.active_adapters:
                # PEFT leaves its copy of a module inactive where an adapter of another method has one too
                self.set_adapter(self.active_adapter, inference_mode=config.inference_mode)
            check_adapter_name(model, adapter_name)
            self._start_as_measured(model, adapter_name)
            if not config.awaits_weights:
                warn_of_impossible(model, self._selection)
            self._selection = self._resolved = None

    def _start_as_measured(self, model: nn.Module, adapter_name: str) -> None:
        """Start the prefix from the measured queries, or keys and values, of the base model."""
        given: Any = self.peft_config[adapter_name]
        config = self._resolved
        assert self._selection is not None and config is not None
        geometries = self._selection.modules
        is_quiet = config.init_weights is True and not config.gating and not config.decoupled
        if any(geometry.key.is_meta for geometry in geometries.values()):
            if not given.awaits_weights and (
                config.prefix_scaling is None or is_quiet or config.init_weights == "activations"
            ):
                warnings.warn(
                    f"{type(model).__name__} has no weights yet (it is on the meta device), so its keys and values could not "
                    "be measured: the prefix is scaled as if their standard deviation were 1, and starts at random. Load the "
                    "weights first, if the adapter is to be trained here.",
                    stacklevel=2,
                )
            return
        encoders = {name: layer.encoder(adapter_name) for name, layer in layers_with_adapter(model, adapter_name)}
        if any(encoder.is_empty() for encoder in encoders.values()):
            return  # to be filled by a checkpoint; a configuration read from a file may as well be trained anew
        if is_quiet:
            start_quietly(encoders, geometries, bool(config.position_free))
        if config.init_weights != "activations":
            return
        length, keeps_values = config.num_virtual_tokens, not config.decoupled
        fit(
            encoders,
            {
                name: (
                    repeated(geometry.unrotated_key if config.position_free else geometry.key, length),
                    repeated(geometry.value, length) * keeps_values,
                )
                for name, geometry in geometries.items()
            },
        )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # `target_modules=None` stays None, so that a saved adapter finds its modules by itself

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:  # the model has no token embeddings: a detector that ties its heads, for instance
            return []

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
        assert self._selection is not None and self._resolved is not None
        geometry = self._selection.modules[current_key]
        # made only now: PEFT takes a model that has a tuner layer at the start for one that it has frozen already
        config = self._resolved
        shares = ENCODERS[str(config.reparameterization)].shares_parts and bool(SHARED_PARTS[config.sharing])
        shared = shared_parts(self.model, adapter_name) if shares else nn.ModuleDict({})
        attach(target, self.peft_config).update_layer(adapter_name, config, geometry, shared)

    # ------------------------------------------------------------------------------------------------ adapters

    def prefix_layers(self) -> Iterator[tuple[str, PrefixPlusLayer]]:
        """Yield the name of every attention module that carries a prefix, and its [`PrefixPlusLayer`]."""
        return prefix_layers(self.model)

    def resolved_config(self, adapter_name: str = "default") -> PrefixPlusConfig:
        """
        Return an adapter's configuration as it is saved, with the value that `position_free` resolved to on this
        model.

        Args:
            adapter_name (`str`, defaults to `"default"`): The adapter.

        Returns:
            `PrefixPlusConfig`: A copy. `peft_config` keeps the configuration that the adapter was made from.

        Raises:
            ValueError: If there is no PREFIX_PLUS adapter of that name.
        """
        _, layer = layers_with_adapter(self.model, adapter_name)[0]
        config: Any = self.peft_config[adapter_name]
        return replace(config, position_free=layer.is_position_free[adapter_name])

    def _adapter_names(self) -> list[str]:
        """The names of the adapters of this method; `peft_config` also has those of other methods on the model."""
        return [name for name, config in self.peft_config.items() if config.peft_type == PREFIX_PLUS]

    def _check_adapters(self, names: Sequence[str]) -> None:
        for name in names:
            config: Any = self.peft_config.get(name)
            own = sorted(self._adapter_names())
            if config is None:
                raise ValueError(f"There is no adapter named {name!r}; the adapters are {own}.")
            if name not in own:
                raise ValueError(
                    f"The adapter {name!r} is one of {config.peft_type.value}: set, delete or unload it by the PeftModel "
                    f"that added it, or by the functions of peft.functional. The adapters of PREFIX_PLUS are {own}."
                )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Set the active adapter, or several at once, whose prefixes are then concatenated. An empty list switches all
        prefixes off. Adapters of other methods on the model stay as they are.

        Args:
            adapter_name (`str` or `list[str]`): The name or names.
            inference_mode (`bool`, defaults to `False`): Whether to freeze the activated adapters.

        Raises:
            ValueError: If there is no PREFIX_PLUS adapter of that name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._check_adapters(names)
        switched = what_switching_changes(self)
        with all_or_nothing(self, modules=switched), keeping_others_modules(self.model, self._adapter_names()):
            if names:
                super().set_adapter(adapter_name, inference_mode=inference_mode)
                return
            for module in self.model.modules():  # PEFT's own function refuses an empty list
                if isinstance(module, (PrefixPlusModule, AuxiliaryTrainingWrapper)):
                    module.set_adapter([])
            self.active_adapter = []

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Delete an adapter. If it was the only active one, the first of the remaining ones becomes active.

        Args:
            adapter_name (`str`): The name.

        Raises:
            ValueError: If there is no PREFIX_PLUS adapter of that name.
        """
        self._check_adapters([adapter_name])
        with all_or_nothing(self):
            del self.peft_config[adapter_name]
            active = [name for name in self.active_adapters if name != adapter_name]
            was_active = adapter_name in self.active_adapters
            if was_active and not active and self._adapter_names():
                active = self._adapter_names()[:1]
                warnings.warn(
                    f"Adapter {adapter_name} was active and is now deleted. The active adapter is now {active[0]}.",
                    stacklevel=2,
                )
            _remove_adapter(self.model, adapter_name)
            with keeping_others_modules(self.model, [adapter_name, *self._adapter_names()]):
                for module in self.model.modules():
                    if isinstance(module, AuxiliaryTrainingWrapper):
                        # PEFT refuses several adapters here, of which a module has one at most
                        own = [name for name in active if name in module._adapters]
                        module.delete_adapter(adapter_name, new_active_adapters=own)
            if was_active and active:
                self.set_adapter(active)
            elif was_active:
                self.active_adapter = []
            # A `PeftModel` names one adapter and looks its configuration up in each call. PEFT gives it another name only where
            # exactly one is active afterwards.
            wrapper = self._wrapper()
            remaining = [*active, *self._adapter_names(), *self.peft_config]
            if (
                wrapper is not None
                and wrapper.base_model is self
                and wrapper.active_adapter == adapter_name
                and remaining
            ):
                wrapper.active_adapter = remaining[0]

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """
        Combine several adapters into a new one, which is not active yet. The others stay.

        Args:
            adapters (`list[str]`): The adapters.
            weights (`list[float]`): A weight for each.
            adapter_name (`str`): The name of the new adapter.
            combination_type (`str`, defaults to `"cat"`):
                `"cat"`: concatenate the prefixes; the output is that of all adapters active at once, and all weights
                must be 1. `"linear"`: the weighted sum of keys, values and gates, for adapters of equal length.

        Raises:
            ValueError: If there is no PREFIX_PLUS adapter of a name, `adapter_name` is taken, or the adapters cannot
                be combined (see [`compose`]). The model is then as it was.
        """
        self._check_adapters(adapters)
        configs = {name: self.resolved_config(name) for name in adapters}
        check_combination({**self.peft_config, **configs}, adapters, weights, adapter_name, combination_type)
        prefixes, gates = combined_prefixes(self.model, adapters, weights, combination_type)
        num_tokens = next(iter(prefixes.values()))[0].shape[1]
        with all_or_nothing(self):
            self.peft_config[adapter_name] = combined_config(list(configs.values()), num_tokens)
            self.inject_adapter(self.model, adapter_name)
            layers = dict(layers_with_adapter(self.model, adapter_name))
            fit({name: layer.encoder(adapter_name) for name, layer in layers.items()}, prefixes)
            with torch.no_grad():
                for name, gate in gates.items():
                    layers[name].prefix_plus_gate[adapter_name].copy_(gate)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with all_or_nothing(self, modules=what_switching_changes(self)):
            super()._enable_adapter_layers(enabled)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """
        Let each row of a batch use the adapter that `adapter_names`, an argument of forward or generate, names for it.

        Raises:
            ValueError: If the model is in training mode, or there is no adapter of a name.
        """
        if self.before_loading:
            self.before_loading.clear()  # what is used is not to be taken away any more
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("`adapter_names` cannot be used in training. Call model.eval() first.")
        unknown = [name for name in adapter_names if name not in (BASE_MODEL_NAME, *self._adapter_names())]
        if unknown:
            raise ValueError(
                f"`adapter_names` has {unknown[0]!r}; the adapters are {sorted(self._adapter_names())}, and "
                f"{BASE_MODEL_NAME!r} stands for none."
            )
        rows: dict[nn.Module, list[str]] = {layer: list(adapter_names) for _, layer in self.prefix_layers()}
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                rows[module] = [name if name in module._adapters else BASE_MODEL_NAME for name in adapter_names]
                pass_rows(module)
        with naming_rows(rows):
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the base model does. Each call produces each layer's prefix once."""
        with keeping_prefixes():
            return self.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """
        Generate by continuous batching, as the base model does, with the active adapters.

        Raises:
            ValueError: If `adapter_names` is given.
        """
        if adapter_names is not None:
            raise ValueError(
                f"`generate_batch` got `adapter_names` = {list(adapter_names)!r}, but continuous batching packs the inputs into "
                "rows of its own: all of them get the active adapters. Call it once per adapter, with that adapter active, or "
                "use `generate`, which takes `adapter_names`."
            )
        return self.model.generate_batch(*args, **kwargs)

    def unload(self) -> nn.Module:
        """
        Return the base model, with every trace of the adapters removed. Adapters of other methods stay.

        Returns:
            `nn.Module`: The base model, with the modules and config objects that it had before.
        """
        for _, layer in list(self.prefix_layers()):
            detach(layer.attention)
        remove_shared_parts(self.model)
        stop_passing_rows(self.model)
        if len(self._adapter_names()) < len(self.peft_config):
            leave_modules_to_others(self.model, self._adapter_names(), self.peft_config)
            for name in self._adapter_names():
                del self.peft_config[name]
            self.active_adapter = []
            return self.model
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.set_adapter([])  # or else the active adapter's copy of the module would stay in the model
        return super().unload()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(
            parent, child_name, new_module
        )  # PEFT's copies a weight, which not every module in `modules_to_save` has

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
        for container in CONTAINERS:
            key = key.replace(f".{container}.{adapter_name}.", f".{container}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """
        Rename and cast a checkpoint's tensors to the names and dtypes that they have in the model.

        Raises:
            ValueError: If the checkpoint does not fit the adapter. Nothing is loaded then.
        """
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        config.awaits_weights = False
        expected = model.state_dict()
        check_checkpoint(expected, adapter_name, state_dict, loadable_keys(model, adapter_name))
        # Loading with `low_cpu_mem_usage` takes the tensors themselves: they must have the right dtype, and memory of
        # their own, for in that of the file their alignment is any, and with it the rounding of products.
        return {
            key: tensor.to(expected[key].dtype, copy=True) if key in expected else tensor
            for key, tensor in state_dict.items()
        }


def _remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter's parameters from every layer, and the layer from every module that then has no adapter."""
    for _, layer in list(prefix_layers(model)):
        layer.remove_adapter(adapter_name)
        if not layer.prefix_plus_encoder:
            detach(layer.attention)
    remove_shared_parts(model, adapter_name)
