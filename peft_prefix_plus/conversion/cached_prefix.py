"""
Converting adapters of PEFT's methods whose prefix is a cache to PREFIX_PLUS adapters with the same output, and back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapters.lookup import layers_with_adapter
from ..adapters.snapshot import all_or_nothing, restored_afterwards
from ..config import PrefixPlusConfig
from ..model import PrefixPlusModel
from ..probing.modules import attention_modules
from ..probing.recording import evaluating
from ..probing.targets import select_modules
from ..saving.prefix_tuning_folder import save_cached_prefix
from ..saving.reading import find_file, load_config
from ..starting.initialization import initialize_from_key_values
from .arguments import check_base_model, check_fixed_positions, check_joint
from .exactness import (
    check_equal,
    exact_up_to,
    measured_rotations,
    prefixes_in,
    random_text,
    record_attention,
    run_with_cache,
    warn_of_length,
)
from .flatten import prefix_key_values


PROMPT_EMBEDDINGS = "prompt_embeddings"
"""The name under which PEFT saves a prefix."""


@dataclass(frozen=True)
class CachedPrefix:
    """
    A method of PEFT that passes its prefix to the model as the cache of tokens before the text.

    Attributes:
        peft_type (`PeftType`): The method.
        config_class (`type`): The class of its configurations.
        fields (`dict`): Fields of a configuration that only this method has.
    """

    peft_type: PeftType
    config_class: type[PrefixTuningConfig | CartridgeConfig]
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.peft_type.value)


def from_cached_prefix(
    method: CachedPrefix,
    adapter: str | os.PathLike[str] | PeftModel,
    model: nn.Module | None,
    adapter_name: str,
    allow_pickle: bool,
    **hub_arguments: Any,
) -> PeftModel:
    """Convert an adapter of a method to a PREFIX_PLUS adapter with the same output: see [`from_prefix_tuning`]."""
    _check_arguments(adapter, model)
    base: Any = adapter.get_base_model() if isinstance(adapter, PeftModel) else model
    with all_or_nothing(base), evaluating(base):  # PEFT leaves a model that it loads onto in evaluation mode
        source = (
            adapter if isinstance(adapter, PeftModel) else _load(method, adapter, base, allow_pickle, hub_arguments)
        )
        source_config = _check_source(method, source)
        length = source_config.num_virtual_tokens
        exact = exact_up_to(base, length, method.name)
        inputs = random_text(base, exact)
        with evaluating(source):
            recorded, expected = record_attention(base, lambda: source(**inputs))
        prefixed = prefixes_in(recorded, inputs["input_ids"].shape[1], length, method.name)
        rotations, rounding = measured_rotations(base, source, prefixed, inputs, length, method.name)
        key_values = {name: (rotations[name].rotate(key, -length), value) for name, (key, value) in prefixed.items()}
        saved_modules = {
            key.removeprefix("base_model."): tensor.clone()
            for key, tensor in get_peft_model_state_dict(source, adapter_name=str(source.active_adapter)).items()
            if key != PROMPT_EMBEDDINGS
        }
        _take_off_wrappers(base)

        config = _plus_config(base, source_config, list(prefixed))
        result = get_peft_model(base, config, adapter_name=adapter_name)
        initialize_from_key_values(result, key_values, adapter_name)
        _fill_saved_modules(result, adapter_name, saved_modules)
        with evaluating(result):
            found = result(**inputs)[0]
        check_equal(base, found, expected, rounding, length, method.name)
    warn_of_length(exact)
    return result


def to_cached_prefix(
    method: CachedPrefix, model: PeftModel, adapter_name: str, save_directory: str | os.PathLike[str] | None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Convert a PREFIX_PLUS adapter to an adapter of a method with the same output: see [`to_prefix_tuning`]."""
    if not isinstance(model, PeftModel):
        raise TypeError(f"`model` must be a PeftModel with a PREFIX_PLUS adapter, got {type(model).__name__}.")
    layers = layers_with_adapter(model, adapter_name)
    base: Any = model.get_base_model()
    prefixes = prefix_key_values(model, adapter_name)
    config = _cached_config(method, base, model.peft_config[adapter_name], prefixes)
    check_fixed_positions(method.name, adapter_name, layers)
    length = config.num_virtual_tokens
    exact = exact_up_to(base, length, method.name)
    inputs = random_text(base, exact)
    with restored_afterwards(model), evaluating(base):
        model.base_model.set_adapter(adapter_name)  # type: ignore[operator]
        expected = model(**inputs)[0]
        carrier = PeftModel(base, config)  # the plain class: the one of the task would wrap the head anew
        if (config.token_dim, config.num_attention_heads) != _token_shape(prefixes):
            raise ValueError(
                f"{method.name} takes {type(base).__name__}'s keys for {config.num_attention_heads} heads of "
                f"{config.token_dim} numbers together; they are {_token_shape(prefixes)[1]} of {_token_shape(prefixes)[0]}."
            )
        rotations, rounding = measured_rotations(base, carrier, prefixes, inputs, length, method.name)
        columns = []
        for name, (key, value) in prefixes.items():
            columns += [rotations[name].rotate(key, length), value]  # (kv_heads, tokens, head_dim) each
        embeddings = torch.cat([column.transpose(0, 1).flatten(1).float().cpu() for column in columns], dim=1)
        prompt_encoder: Any = carrier.prompt_encoder["default"]
        prompt_encoder.load_prompt_embeddings(embeddings)
        _, found = record_attention(base, lambda: run_with_cache(base, carrier, inputs, length, is_seen=True))
        check_equal(base, found, expected, rounding, length, method.name)

    config.modules_to_save = model.peft_config[adapter_name].modules_to_save  # type: ignore[attr-defined]
    state_dict = {PROMPT_EMBEDDINGS: embeddings.contiguous()}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if PrefixPlusModel.prefix not in key:
            state_dict[f"base_model.{key.removeprefix('base_model.model.')}"] = tensor.detach().cpu().clone()
    if save_directory is not None:
        save_cached_prefix(config, state_dict, save_directory)
    warn_of_length(exact)
    return config, state_dict


# ------------------------------------------------------------------------------------------------------ what comes in


def _check_arguments(adapter: Any, model: Any) -> None:
    if isinstance(adapter, PeftModel):
        if model is not None:
            raise TypeError("`model` must be None where `adapter` is a PeftModel, which has its base model already.")
    else:
        check_base_model(model, os.fspath(adapter))


def _load(
    method: CachedPrefix, adapter: Any, base: Any, allow_pickle: bool, hub_arguments: dict[str, Any]
) -> PeftModel:
    """Put a saved adapter on the base model, as PEFT loads it."""
    name = os.fspath(adapter)
    _check_type(method, load_config(name, **hub_arguments))
    if not allow_pickle and find_file(name, SAFETENSORS_WEIGHTS_NAME, **hub_arguments) is None:
        raise ValueError(
            f"The adapter {name!r} has no {SAFETENSORS_WEIGHTS_NAME}. If its weights are in another format and you "
            "trust where it comes from, pass allow_pickle=True; otherwise load it with PEFT and save it anew."
        )
    return PeftModel.from_pretrained(base, name, **hub_arguments)


def _check_source(method: CachedPrefix, source: PeftModel) -> Any:
    """Return the active adapter's configuration, or raise if it cannot be converted."""
    config = source.active_peft_config
    _check_type(method, config)
    _check_task(method, source.get_base_model(), config.task_type)
    return config


def _check_type(method: CachedPrefix, config: PeftConfig) -> None:
    if config.peft_type != method.peft_type:
        raise ValueError(f"The adapter must be one of {method.name}, got {PeftType(config.peft_type).value}.")


def _check_task(method: CachedPrefix, base: Any, task_type: str | None) -> None:
    if task_type is None:
        raise ValueError(
            f"The adapter's `task_type` is None, and without one {method.name} has no effect. Set it, for instance to "
            "'CAUSAL_LM'."
        )
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder model. {method.name} moves the positions in its decoder, which "
            "changes learned positions and position biases, so adapters are not converted."
        )


def _plus_config(base: Any, source: Any, prefixed: list[str]) -> PrefixPlusConfig:
    """The configuration of the adapter that prefixes the same modules."""
    config = PrefixPlusConfig(
        task_type=source.task_type,
        num_virtual_tokens=source.num_virtual_tokens,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        modules_to_save=getattr(source, "modules_to_save", None),
        decoupled=False,
        position_free=False,
    )
    if list(select_modules(base, config).modules) != prefixed:
        config.target_modules = prefixed
    return config


def _cached_config(method: CachedPrefix, base: Any, config: Any, prefixes: Mapping[str, Any]) -> Any:
    """Return the configuration of a method for these prefixes, or raise if it has none for them."""
    _check_task(method, base, config.task_type)
    check_joint(method.name, config)
    layers = [name for name in attention_modules(base) if name in prefixes]
    everywhere = list(select_modules(base, PrefixPlusConfig()).modules)
    num_layers = base.config.get_text_config().num_hidden_layers
    if layers != everywhere or len(layers) != num_layers:
        raise ValueError(
            f"{method.name} puts a prefix into every layer, but adapter has one in {len(layers)} attention modules of "
            f"{len(everywhere)} in {num_layers} layers. A choice of layers cannot be expressed in it."
        )
    shapes = {tuple(tensor.shape) for pair in prefixes.values() for tensor in pair}
    if len(shapes) > 1:
        raise ValueError(
            f"{method.name} has one shape for the keys and values of all layers, but those of this model are of "
            f"(heads, tokens, dim) {' and '.join(map(str, sorted(shapes)))}."
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise ValueError(
            f"{method.name} does not work with gradient checkpointing, so it cannot be verified. Call "
            "model.gradient_checkpointing_disable() first."
        )
    token_dim, num_heads = _token_shape(prefixes)
    return method.config_class(
        task_type=config.task_type,
        num_virtual_tokens=config.num_virtual_tokens,
        num_layers=num_layers,
        token_dim=token_dim,
        num_attention_heads=num_heads,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        **method.fields,
    )


def _token_shape(prefixes: Mapping[str, Any]) -> tuple[int, int]:
    """The `token_dim` and `num_attention_heads` of these prefixes, as PEFT calls them."""
    key, _ = next(iter(prefixes.values()))
    return key.shape[0] * key.shape[2], key.shape[0]


def _take_off_wrappers(base: nn.Module) -> None:
    """Put the modules that PEFT has wrapped to save them back in place, so that another adapter can add its own wrappers."""
    for name, module in list(base.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            base.set_submodule(name, module.original_module)


def _fill_saved_modules(model: PeftModel, adapter_name: str, saved_modules: Mapping[str, torch.Tensor]) -> None:
    """Give a new adapter its modules that are saved in full."""
    if not saved_modules:
        return
    state_dict = dict(get_peft_model_state_dict(model, adapter_name=adapter_name))
    for key, tensor in state_dict.items():
        name = key.removeprefix("base_model.model.")
        if name in saved_modules:
            state_dict[key] = saved_modules[name].to(tensor)
    set_peft_model_state_dict(model, state_dict, adapter_name=adapter_name)
