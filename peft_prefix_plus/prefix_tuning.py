"""Adapters of PEFT's PREFIX_TUNING into PREFIX_PLUS adapters with the same output, and back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import (
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
from safetensors.torch import save_file
from torch import nn

from .config import PrefixPlusConfig
from .conversion import prefix_key_values
from .geometry import attention_modules, evaluating, recording
from .initialization import initialize_from_key_values
from .model import PrefixPlusModel, layers_with_adapter
from .rotation import Rotation, candidate_rotations, closest_rotation
from .targets import select_modules


NUM_TOKENS = 16
"""Length of the random text on which a conversion is measured and verified."""

TOLERANCE = {torch.float64: 5e-5, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""
How much of the norm of its keys or queries a rotation may leave unexplained, by the base model's dtype. Rounding leaves about
a tenth of this in 16 layers (rotary angles are float32 in any dtype).
"""

OUTPUT_TOLERANCE = 1e-5
"""How far the outputs may differ where moving the text alone changes nothing, as a multiple of the largest (and of 1)."""

ROUNDING = 8.0
"""How many times further they may differ than moving the text alone changes them, which is rounding where rotations fit."""

PROMPT_EMBEDDINGS = "prompt_embeddings"
"""The name under which PEFT saves a prefix."""


def from_prefix_tuning(
    adapter: str | os.PathLike[str] | PeftModel,
    model: nn.Module | None = None,
    adapter_name: str = "default",
    allow_pickle: bool = False,
    **hub_arguments: Any,
) -> PeftModel:
    """
    Turn an adapter of PEFT's PREFIX_TUNING into a PREFIX_PLUS adapter with the same output.

    PREFIX_TUNING moves the real tokens' positions by L_p, the length of the prefix. With rotary positions R, a query at
    position t there meets a prefix's key k as (R(t + L_p) q)ᵀ k = (R(t) q)ᵀ R(−L_p) k: the keys that do the same with the
    positions left alone are k rotated back by L_p positions. Values stay. Which rotation a model's attention modules apply is
    measured on their own keys, and the logits of both methods are compared on a random text before anything is returned.

    Args:
        adapter (`str`, `os.PathLike` or `PeftModel`):
            A directory or a repository on the Hub with the saved adapter, or a model that has it as its active adapter.
            Such a `PeftModel` gives its base model to the result, and is not to be used afterwards.
        model (`nn.Module`, *optional*): The base model, where `adapter` is not a model itself. It is adapted in place.
        adapter_name (`str`, defaults to `"default"`): The name of the new adapter.
        allow_pickle (`bool`, defaults to `False`):
            Also load an adapter that was not saved in the safetensors format. PEFT then unpickles tensors only.
        hub_arguments: `revision`, `subfolder`, `token`, `cache_dir` and so on, as for [`PeftModel.from_pretrained`].

    Returns:
        `PeftModel`: The model with the new adapter, `reparameterization="none"`, which can be trained on.

    Raises:
        TypeError: If `model` is missing or has adapters, or is given along with a `PeftModel`.
        ValueError: If there is no PREFIX_TUNING adapter, or no prefix here gives the same output on this model: where
            positions are learned or biases (GPT-2, OPT, Bloom, T5), moving them changes more than keys. The model is
            then left as it was.

    Warns:
        UserWarning: If the outputs are equal up to some length of text only: beyond a sliding window PREFIX_TUNING's prefix
            is lost and this one is not, and rotary frequencies that depend on the length change L_p tokens earlier there.

    Example:

    ```py
    >>> from peft import PrefixTuningConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import from_prefix_tuning

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
    >>> from_prefix_tuning(model).peft_config["default"].peft_type.value
    'PREFIX_PLUS'

    ```
    """
    _check_arguments(adapter, model)
    base: Any = adapter.get_base_model() if isinstance(adapter, PeftModel) else model
    with _undone_on_error(base) as take_off_wrappers, _training_flags_kept(base):
        source = adapter if isinstance(adapter, PeftModel) else _load(adapter, base, allow_pickle, hub_arguments)
        source_config = _check_source(source)
        length = source_config.num_virtual_tokens
        exact = _check_length(base, length)
        inputs = _random_text(base, exact)
        with evaluating(source):
            recorded, expected = _record(base, lambda: source(**inputs))
        prefixed = _prefixed_by(recorded, inputs["input_ids"].shape[1], length)
        rotations, rounding = _rotations(base, source, prefixed, inputs, length)
        key_values = {name: (rotations[name].rotate(key, -length), value) for name, (key, value) in prefixed.items()}
        saved_modules = {
            key.removeprefix("base_model."): tensor.clone()
            for key, tensor in get_peft_model_state_dict(source, adapter_name=str(source.active_adapter)).items()
            if key != PROMPT_EMBEDDINGS
        }
        take_off_wrappers()

        config = _plus_config(base, source_config, list(prefixed))
        result = get_peft_model(base, config, adapter_name=adapter_name)
        try:
            initialize_from_key_values(result, key_values, adapter_name)
            _fill_saved_modules(result, adapter_name, saved_modules)
            with evaluating(result), torch.no_grad():
                found = result(**inputs)[0]
            _check_equal(base, found, expected, rounding, length)
        except BaseException:
            assert isinstance(result.base_model, PrefixPlusModel)
            result.base_model.unload()
            raise
    _warn_of_length(exact)
    return result


def to_prefix_tuning(
    model: PeftModel, adapter_name: str = "default", save_directory: str | os.PathLike[str] | None = None
) -> tuple[PrefixTuningConfig, dict[str, torch.Tensor]]:
    """
    Turn a PREFIX_PLUS adapter into one of PEFT's PREFIX_TUNING with the same output, which PEFT loads without this package.

    The inverse of [`from_prefix_tuning`]: the keys are rotated by L_p positions. A reparameterization is computed; only the
    prefix remains.

    Args:
        model (`PeftModel`): A model with the adapter, which is left as it is.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        save_directory (`str` or `os.PathLike`, *optional*): A directory to save `adapter_config.json` and
            `adapter_model.safetensors` in.

    Returns:
        `tuple[PrefixTuningConfig, dict[str, torch.Tensor]]`: The configuration, and the tensors as PEFT saves them:
        `prompt_embeddings`, (num_virtual_tokens, num_layers · 2 · kv_heads · head_dim), and those of `modules_to_save`.

    Raises:
        TypeError: If `model` is not a `PeftModel`.
        ValueError: If PREFIX_TUNING cannot express the adapter (a gate, some layers only, cross-attention or an encoder, keys
            and values of different shapes), or does not give the same output on this model.

    Warns:
        UserWarning: As [`from_prefix_tuning`].
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"`model` must be a PeftModel with a PREFIX_PLUS adapter, got {type(model).__name__}.")
    layers_with_adapter(model, adapter_name)  # raises if there is no such adapter
    base: Any = model.get_base_model()
    prefixes = prefix_key_values(model, adapter_name)
    config = _tuning_config(base, model.peft_config[adapter_name], prefixes)
    length = config.num_virtual_tokens
    exact = _check_length(base, length)
    inputs = _random_text(base, exact)
    with _only_active(model, adapter_name), evaluating(base):
        expected = model(**inputs)[0]
        carrier = PeftModel(base, config)  # the plain class: the one of the task would wrap the head anew
        if (config.token_dim, config.num_attention_heads) != _token_shape(prefixes):
            raise ValueError(
                f"PREFIX_TUNING takes {type(base).__name__}'s keys for {config.num_attention_heads} heads of "
                f"{config.token_dim} numbers together; they are {_token_shape(prefixes)[1]} of {_token_shape(prefixes)[0]}."
            )
        rotations, rounding = _rotations(base, carrier, prefixes, inputs, length)
        columns = []
        for name, (key, value) in prefixes.items():
            columns += [rotations[name].rotate(key, length), value]  # (kv_heads, tokens, head_dim) each
        embeddings = torch.cat([column.transpose(0, 1).flatten(1).float().cpu() for column in columns], dim=1)
        prompt_encoder: Any = carrier.prompt_encoder["default"]
        prompt_encoder.load_prompt_embeddings(embeddings)
        _, found = _record(base, lambda: _run_with_cache(base, carrier, inputs, length, is_seen=True))
        _check_equal(base, found, expected, rounding, length)

    config.modules_to_save = model.peft_config[adapter_name].modules_to_save  # type: ignore[attr-defined]
    state_dict = {PROMPT_EMBEDDINGS: embeddings.contiguous()}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if PrefixPlusModel.prefix not in key:
            state_dict[f"base_model.{key.removeprefix('base_model.model.')}"] = tensor.detach().cpu().clone()
    if save_directory is not None:
        os.makedirs(save_directory, exist_ok=True)
        save_file(state_dict, os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        config.save_pretrained(os.fspath(save_directory))
    _warn_of_length(exact)
    return config, state_dict


# ------------------------------------------------------------------------------------------------------ what comes in


def _check_arguments(adapter: Any, model: Any) -> None:
    if isinstance(adapter, PeftModel):
        if model is not None:
            raise TypeError("`model` must be None where `adapter` is a PeftModel, which has its base model already.")
    elif isinstance(model, PeftModel) or not isinstance(model, nn.Module) or "peft_config" in vars(model):
        raise TypeError(
            f"`model` must be the base model, without adapters, that the adapter {os.fspath(adapter)!r} was trained on; "
            f"got {type(model).__name__}" + (" with adapters." if isinstance(model, nn.Module) else ".")
        )


def _load(adapter: Any, base: Any, allow_pickle: bool, hub_arguments: dict[str, Any]) -> PeftModel:
    """Put a saved adapter on the base model, as PEFT loads it."""
    name = os.fspath(adapter)
    _check_type(PeftConfig.from_pretrained(name, **hub_arguments))
    if not allow_pickle and not _has_safetensors(name, hub_arguments):
        raise ValueError(
            f"The adapter {name!r} has no {SAFETENSORS_WEIGHTS_NAME} that can be found. If its weights are in another format and you "
            "trust where it comes from, pass allow_pickle=True; otherwise load it with PEFT and save it anew."
        )
    return PeftModel.from_pretrained(base, name, **hub_arguments)


def _has_safetensors(name: str, hub_arguments: Mapping[str, Any]) -> bool:
    subfolder = hub_arguments.get("subfolder")
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, subfolder or "", SAFETENSORS_WEIGHTS_NAME))
    try:
        hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME, **hub_arguments)
    except EntryNotFoundError:
        return False
    return True


def _check_source(source: PeftModel) -> Any:
    """Return the active adapter's configuration, or raise if it cannot be converted."""
    config = source.active_peft_config
    _check_type(config)
    _check_task(source.get_base_model(), config.task_type)
    return config


def _check_type(config: PeftConfig) -> None:
    if config.peft_type != PeftType.PREFIX_TUNING:
        raise ValueError(f"The adapter must be one of PREFIX_TUNING, got {PeftType(config.peft_type).value}.")


def _check_task(base: Any, task_type: str | None) -> None:
    if task_type is None:
        raise ValueError(
            "The adapter's `task_type` is None, and without one PREFIX_TUNING has no effect. Set it, for instance to "
            "'CAUSAL_LM'."
        )
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder model. PREFIX_TUNING moves the positions in its decoder, which "
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
    )
    if list(select_modules(base, config).modules) != prefixed:
        config.target_modules = prefixed
    return config


def _tuning_config(base: Any, config: Any, prefixes: Mapping[str, Any]) -> PrefixTuningConfig:
    """Return the configuration of PREFIX_TUNING for these prefixes, or raise if it has none for them."""
    _check_task(base, config.task_type)
    for name in ("gating", "decoupled"):
        if getattr(config, name):
            raise ValueError(
                f"In PREFIX_TUNING the prefix shares the softmax of the real tokens, so an adapter with {name}=True cannot be "
                "expressed in it."
            )
    layers = [name for name in attention_modules(base) if name in prefixes]
    everywhere = list(select_modules(base, PrefixPlusConfig()).modules)
    num_layers = base.config.get_text_config().num_hidden_layers
    if layers != everywhere or len(layers) != num_layers:
        raise ValueError(
            f"PREFIX_TUNING puts a prefix into every layer, but adapter has one in {len(layers)} attention modules of "
            f"{len(everywhere)} in {num_layers} layers. A choice of layers cannot be expressed in it."
        )
    shapes = {tuple(tensor.shape) for pair in prefixes.values() for tensor in pair}
    if len(shapes) > 1:
        raise ValueError(
            "PREFIX_TUNING has one shape for the keys and values of all layers, but those of this model are of "
            f"(heads, tokens, dim) {' and '.join(map(str, sorted(shapes)))}."
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise ValueError(
            "PREFIX_TUNING does not work with gradient checkpointing, so it cannot be verified. Call "
            "model.gradient_checkpointing_disable() first."
        )
    token_dim, num_heads = _token_shape(prefixes)
    return PrefixTuningConfig(
        task_type=config.task_type,
        num_virtual_tokens=config.num_virtual_tokens,
        num_layers=num_layers,
        token_dim=token_dim,
        num_attention_heads=num_heads,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _token_shape(prefixes: Mapping[str, Any]) -> tuple[int, int]:
    """The `token_dim` and `num_attention_heads` of these prefixes, as PREFIX_TUNING calls them."""
    key, _ = next(iter(prefixes.values()))
    return key.shape[0] * key.shape[2], key.shape[0]


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


# ------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class _Attended:
    """The queries, keys and values of one attention module on a text, (heads or kv_heads, tokens, dim) each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def _random_text(base: Any, exact: tuple[int, str] | None) -> dict[str, torch.Tensor]:
    """A row of random token ids, none of which means something special, the same every time; no longer than is exact."""
    num_tokens = NUM_TOKENS if exact is None else min(NUM_TOKENS, exact[0])
    special = {
        number
        for name, value in base.config.get_text_config().to_dict().items()
        if name.endswith(("token_id", "token_index"))
        for number in (value if isinstance(value, list) else [value])
    }
    vocabulary = getattr(base.get_input_embeddings(), "num_embeddings", None)
    if vocabulary is None:
        raise ValueError(
            f"{type(base).__name__} takes no plain text as input, so a conversion cannot be verified on it."
        )
    plain = torch.tensor([number for number in range(vocabulary) if number not in special])
    ids = plain[torch.randint(len(plain), (1, num_tokens), generator=torch.Generator().manual_seed(0))]
    return {"input_ids": ids.to(base.device), "attention_mask": torch.ones_like(ids).to(base.device)}


def _record(base: nn.Module, run: Any) -> tuple[dict[str, _Attended], torch.Tensor]:
    """Return what every attention module attends to when `run` runs the base model, and what that puts out."""
    attended = {}

    def record(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        attended[name] = _Attended(query[0].detach(), key[0].detach(), value[0].detach())

    with recording(attention_modules(base), record), torch.no_grad():
        output = run()[0]
    return attended, output


def _run_with_cache(
    base: Any, source: PeftModel, inputs: Mapping[str, torch.Tensor], length: int, is_seen: bool
) -> Any:
    """Run the base model as PREFIX_TUNING does, on a cache that holds the prefix, which the text sees or not."""
    mask = inputs["attention_mask"]
    prefix_mask = mask.new_full((len(mask), length), int(is_seen))
    return base(
        input_ids=inputs["input_ids"],
        attention_mask=torch.cat([prefix_mask, mask], dim=1),
        past_key_values=source.get_prompt(batch_size=len(mask)),
    )


def _prefixed_by(
    recorded: Mapping[str, _Attended], num_tokens: int, length: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the prefixes in what was attended to, by the names of the modules that have one."""
    prefixed = {
        name: (attended.key[:, :length], attended.value[:, :length])
        for name, attended in recorded.items()
        if attended.key.shape[1] == num_tokens + length
    }
    if not prefixed:
        raise ValueError(
            "PREFIX_TUNING's prefix does not reach any attention module of this model, so there is nothing to convert."
        )
    return prefixed


def _rotations(
    base: Any,
    source: PeftModel,
    names: Mapping[str, Any],
    inputs: Mapping[str, torch.Tensor],
    length: int,
) -> tuple[dict[str, Rotation], float]:
    """
    Measure by which rotation each module's keys and queries follow their positions.

    The same text is run at its own positions and, after a prefix that it does not see, `length` positions further on.

    Returns:
        `tuple[dict[str, Rotation], float]`: The rotations by module, and how far the move alone has changed the output.
    """
    here, output = _record(base, lambda: base(**inputs))
    moved, moved_output = _record(base, lambda: _run_with_cache(base, source, inputs, length, is_seen=False))
    rotations = {}
    for name in names:
        candidates = candidate_rotations(base, here[name].key.shape[-1])
        rotation, key_error = closest_rotation(candidates, here[name].key, moved[name].key[:, length:], length)
        _, query_error = closest_rotation([rotation], here[name].query, moved[name].query, length)
        error = max(key_error, query_error)
        if error > TOLERANCE[base.dtype]:
            raise ValueError(
                f"The conversion is not exact for {type(base).__name__}: PREFIX_TUNING moves the real tokens' positions by "
                f"{length}, and the keys and queries of {name} do not follow by one rotation (the closest leaves "
                f"{error:.2%} of them). This is so for instance where positions are learned, as in GPT-2: the tokens themselves change. "
                "Train a new adapter."
            )
        rotations[name] = rotation
    return rotations, (moved_output - output).abs().max().item()


def _check_equal(base: Any, found: torch.Tensor, expected: torch.Tensor, rounding: float, length: int) -> None:
    """Raise if outputs differ by more than rounding, which is what moving the text alone has changed them by."""
    difference = (found - expected).abs().max().item()
    limit = max(OUTPUT_TOLERANCE * max(1.0, expected.abs().max().item()), ROUNDING * rounding)
    if not difference <= limit:
        raise ValueError(
            f"The conversion is not exact for {type(base).__name__}: on a random text the outputs of PREFIX_TUNING and "
            f"PREFIX_PLUS differ by {difference:.2g}, more than rounding ({limit:.2g}). PREFIX_TUNING moves the real tokens' "
            f"positions by {length}. That can be undone for rotary positions, but not for instance where positions are "
            "learned (GPT-2, OPT, BERT), or are a bias on the scores that the prefix has too (ALiBi in Bloom and MPT). Train "
            "a new adapter."
        )


# ------------------------------------------------------------------------------------------------------ how far it holds


def _check_length(base: Any, length: int) -> tuple[int, str] | None:
    """
    Return the number of real tokens up to which both methods give the same output, with the reason; `None` for any number.

    Raises:
        ValueError: If there is not even one.
    """
    bounds = [(bound - length, reason) for bound, reason in _bounds(base.config.get_text_config())]
    if not bounds:
        return None
    num_tokens, reason = min(bounds)
    if num_tokens < 1:
        raise ValueError(
            f"The conversion is not exact for {type(base).__name__}, not even for one token: the prefix has {length} "
            f"virtual tokens, and {reason}."
        )
    return num_tokens, reason


def _bounds(config: Any) -> Iterator[tuple[int, str]]:
    """Yield the last position, counted from 1, up to which a model attends the same wherever a text begins, and why."""
    kinds = getattr(config, "layer_types", None) or ()
    for field, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked")):
        bound = getattr(config, field, None)
        if bound is not None and (not kinds or any(kind in each for each in kinds)):
            yield bound, f"PREFIX_TUNING's prefix is not seen beyond `{field}` = {bound}, and PREFIX_PLUS's is"
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4, which counts positions from 1 here
        yield (
            config.floor_scale - 1,
            f"queries change their scale with their position, at `floor_scale` = {config.floor_scale}",
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in parameters.values() if all(isinstance(value, dict) for value in parameters.values()) else [parameters]:
        rope_type = rope.get("rope_type", "default")
        original: Any = rope.get("original_max_position_embeddings") or getattr(
            config, "max_position_embeddings", None
        )
        if "dynamic" in rope_type or rope_type == "longrope":
            yield original, f"rotary frequencies of type {rope_type!r} change at position {original}"
        if "llama_4_scaling_beta" in rope:  # Ministral 3
            yield original, f"queries change their scale with their position, at {original}"


def _warn_of_length(exact: tuple[int, str] | None) -> None:
    if exact is not None:
        num_tokens, reason = exact
        warnings.warn(
            f"Both methods give the same output for up to {num_tokens} tokens of text. Beyond, {reason}.", stacklevel=3
        )


# ------------------------------------------------------------------------------------------------------ what is put back


@contextmanager
def _undone_on_error(base: nn.Module) -> Iterator[Callable[[], None]]:
    """
    Leave a base model as it was if an error occurs: its flags, and which of its modules PEFT has wrapped to save them.

    Yields a function that takes these wrappers off, so that another adapter can put on its own.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    wrappers = {name for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    taken_off: dict[str, nn.Module] = {}

    def take_off_wrappers() -> None:
        for name, module in list(base.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                taken_off[name] = module
                base.set_submodule(name, module.original_module)

    try:
        yield take_off_wrappers
    except BaseException:
        take_off_wrappers()
        for name in wrappers:
            base.set_submodule(name, taken_off[name])
        for parameter, requires_grad in flags:
            parameter.requires_grad = requires_grad
        raise


@contextmanager
def _training_flags_kept(base: nn.Module) -> Iterator[None]:
    """Leave every module of a base model in the mode it was in: PEFT puts a loaded one in evaluation mode."""
    training = [(module, module.training) for module in base.modules()]
    try:
        yield
    finally:
        for module, is_training in training:
            module.training = is_training


@contextmanager
def _only_active(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Let one adapter be the only active one for a while."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = list(model.active_adapters)
    tuner: Any = model.base_model
    try:
        tuner.set_adapter(adapter_name)
        yield
    finally:
        tuner.set_adapter(active)
        for parameter, requires_grad in flags:
            parameter.requires_grad = requires_grad
