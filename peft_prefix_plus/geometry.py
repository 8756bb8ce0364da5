"""Finding a model's attention modules, their kind, and the shape that their keys and values really have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention import (
    POSITIONS,
    THREAD,
    AttentionOutput,
    ConfigView,
    InlineAttention,
    PositionEmbeddings,
    QueryRotation,
    attend_as_base,
    eager_attention_function,
    find_rotation,
    follow,
    has_known_form,
    may_compute_attention,
    model_config,
    position_embeddings_of,
    reads_implementation,
    run_under,
    set_config,
    unfollow,
    watching,
)
from .encoders import KVShape
from .registration import METHOD_NAME


PROBE_NAME = "prefix_plus_probe"
"""The name under which [`probe_attention`] is registered with transformers."""

PROBE_TOKENS = 8
"""How many tokens a probe's forward has, if nothing asks for more: enough to tell a standard deviation."""


@dataclass(frozen=True)
class AttentionGeometry:
    """
    What a prefix must know of an attention module.

    Attributes:
        kind (`str`): `"self"`, or in an encoder-decoder model `"encoder"` (its self-attention) or `"cross"`.
        shape (`KVShape`): Heads and dims of its keys and values.
        num_query_heads (`int`): Heads of its queries.
        scale (`float`): s, the factor on the products of queries and keys.
        query (`torch.Tensor`): The queries of some tokens of the vocabulary, (query_heads, tokens, key_dim).
        key (`torch.Tensor`): The keys of such tokens, (kv_heads, tokens, key_dim).
        value (`torch.Tensor`): Their values, (kv_heads, tokens, value_dim).
        rotation (`QueryRotation`, *optional*): How it rotates its queries by their positions (RoPE), if it does.
        obstacle (`str`, *optional*): Why the rotation of its queries cannot be undone, if it cannot.
        unrotated_query (`torch.Tensor`): `query` before its rotation.
        unrotated_key (`torch.Tensor`): `key` before its rotation, if it is of the tokens that the queries are of.
    """

    kind: str
    shape: KVShape
    num_query_heads: int
    scale: float
    query: torch.Tensor = field(repr=False, compare=False)
    key: torch.Tensor = field(repr=False, compare=False)
    value: torch.Tensor = field(repr=False, compare=False)
    rotation: QueryRotation | None
    obstacle: str | None
    unrotated_query: torch.Tensor = field(repr=False, compare=False)
    unrotated_key: torch.Tensor = field(repr=False, compare=False)


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether a module computes its attention through transformers' attention interface."""
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", _no_code).co_names and hasattr(module, "config")


_no_code = (lambda: None).__code__


def is_attention_module(module: nn.Module) -> bool:
    """
    Whether a module may be one of attention: through the interface, or by itself.

    What computes a softmax by itself may also be something else (the router of a mixture of experts): [`probe`] tells.
    """
    if isinstance(module, PreTrainedModel):
        return False
    module_class: type = type(module)
    return calls_attention_interface(module) or may_compute_attention(module_class)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that may be attention, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_attention_module(module)}


def probe_attention(module: Any, *args: Any, **kwargs: Any) -> AttentionOutput:
    """The attention function that is registered for modules without a prefix that a thread watches."""
    attend = (THREAD.interface or {}).get(module, _attend_as_ever)  # other threads run the module as ever meanwhile
    return attend(module, *args, **kwargs)


def _attend_as_ever(module: Any, *args: Any, **kwargs: Any) -> AttentionOutput:
    implementation = model_config(module)._attn_implementation
    eager = eager_attention_function(type(module))
    kwargs.pop(POSITIONS, None)
    return attend_as_base(module, *args, implementation=implementation, eager=eager, **kwargs)


@contextmanager
def recording(
    modules: dict[str, nn.Module], record: Callable[..., None], reject: Callable[[str, str], None] = lambda *_: None
) -> Iterator[None]:
    """
    Call `record(name, query, key, value, scale)` whenever one of the modules computes attention in this thread, and
    `reject(name, reason)` when one that does not call the attention interface has computed something else.

    Prefixes that the modules carry have no effect meanwhile, and everything is as before afterwards.
    """
    interface: dict[nn.Module, Callable[..., Any]] = {}
    inline: dict[nn.Module, Callable[..., Any]] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            if calls_attention_interface(module):
                interface[module] = partial(_record_interface, partial(record, name))
            else:
                inline[module] = partial(_record_inline, partial(record, name), partial(reject, name))
            if METHOD_NAME not in module._modules:
                stack.enter_context(_reaching(module))
        stack.enter_context(watching(interface, inline))
        yield


@contextmanager
def _reaching(module: Any) -> Iterator[None]:
    """Let a module without a prefix come to its watchers, and leave it as it was afterwards."""
    is_interface = calls_attention_interface(module)
    config = module.config if is_interface else None
    try:
        if is_interface:
            set_config(module, ConfigView(config, PROBE_NAME, reads_implementation(type(module))))
        else:
            follow(module)
        yield
    finally:
        if is_interface:
            set_config(module, config)
        else:
            unfollow(module)


def _record_interface(
    record: Callable[..., None],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> AttentionOutput:
    scaling = kwargs.get("scaling")
    record(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    # what a record has autograd follow ends here: not every kernel has a backward
    return _attend_as_ever(module, query.detach(), key.detach(), value.detach(), *args, **kwargs)


def _record_inline(
    record: Callable[..., None],
    reject: Callable[..., None],
    module: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    mode = InlineAttention(module)
    output = run_under(mode, forward, args, kwargs)
    if mode.is_complete():
        record(*mode.attended[0])
    else:
        reject(mode.obstacle())
    return output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients and dropout, and leave every module's training flag as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """
    Bring a module's own parameters together around its forward where DeepSpeed's ZeRO-3 has partitioned them when the model
    was loaded: its engine, which does that in training, is made from the model only later.
    """
    contexts: dict[nn.Module, list[Any]] = {}

    def gather(module: nn.Module, args: Any) -> None:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))
        context.__enter__()
        contexts.setdefault(module, []).append(context)

    def release(module: nn.Module, args: Any, output: Any) -> None:
        contexts[module].pop().__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(gather))
            handles.append(module.register_forward_hook(release, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, unreleased in contexts.items():  # an interrupted forward has called no hook
            while unreleased:
                release(module, None, None)


def probe(
    model: nn.Module,
    wanted: Collection[str] = (),
    rejected: dict[str, str] | None = None,
    num_tokens: int = PROBE_TOKENS,
    are_before: bool = False,
) -> dict[str, AttentionGeometry]:
    """
    Determine the geometry of the attention modules that a model's main input reaches, by one tiny forward.

    Shapes are read where the keys and values enter attention, not from the config: that is right for grouped heads,
    latent attention, layers of different shape and hybrid models. On a model on the meta device it computes nothing.

    Args:
        model (`nn.Module`): The model.
        wanted (`Collection[str]`): Names of further attention modules, reached through the main input of the submodel
            that they belong to (a vision tower).
        rejected (`dict[str, str]`, *optional*): Filled with the modules that were reached and take a softmax in which a
            prefix cannot take part, and why not.
        num_tokens (`int`): How many tokens the forward has at least.
        are_before (`bool`): Whether the tokens stand before a text (see [`positions_before`]).

    Returns:
        `dict[str, AttentionGeometry]`: By module name, in the model's order.

    Raises:
        ValueError: If nothing is reached, or a wanted module is not.
    """
    modules = attention_modules(model)
    found: dict[str, AttentionGeometry] = {}
    rejected = {} if rejected is None else rejected
    is_encoder_decoder = False

    def record(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: Any) -> None:
        kind = "self"
        if is_encoder_decoder and query.shape[2] != num_tokens:
            kind = "encoder"
        elif is_encoder_decoder and key.shape[2] != num_tokens:
            kind = "cross"
        shape = KVShape(key.shape[1], key.shape[3], value.shape[3])
        rotation, embeddings = rotations.of_query(name, query)
        if name in found:
            return
        query, key, value = query[:1].detach(), key[:1].detach(), value[0].detach()
        unrotated_query, unrotated_key = query, key  # (1, heads, tokens, key_dim)
        if rotation is not None and embeddings is not None:
            unrotated_query = rotation.undo(query, embeddings).detach()
            if key.shape[2] == query.shape[2]:
                unrotated_key = rotation.undo(key, embeddings).detach()
        found[name] = AttentionGeometry(
            kind=kind,
            shape=shape,
            num_query_heads=query.shape[1],
            scale=1.0 if isinstance(scale, torch.Tensor) and scale.is_meta else float(scale),
            query=query[0],
            key=key[0],
            value=value,
            rotation=rotation,
            obstacle=rotations.obstacles.get(name),
            unrotated_query=unrotated_query[0],
            unrotated_key=unrotated_key[0],
        )

    for prefix, submodel in _outermost_first(model):
        members = [name for name in modules if name.startswith(prefix)]
        targets = [name for name in members if name in wanted] if found else members
        if all(name in found for name in targets):
            continue
        is_encoder_decoder = bool(getattr(submodel.config, "is_encoder_decoder", False))
        inputs = probe_inputs(submodel, num_tokens)
        if are_before and "input_ids" in inputs:
            inputs.update(positions_before(submodel, inputs))
        with (
            recording(modules, record, rejected.__setitem__),
            evaluating(submodel),
            gathering(submodel),
            _observing_rotations(modules) as rotations,
        ):
            try:
                submodel(**inputs)
            except Exception as error:
                # A head may want more than its backbone (BART's classifier an end token): what counts is the record.
                # A wanted module may be reached through a submodel (CLIP's text model, where CLIP wants an image too).
                if not wanted and not all(name in found or name in rejected for name in members):
                    raise ValueError(
                        f"Could not determine the shapes of the keys and values of {type(submodel).__name__}: a "
                        f"forward with {sorted(inputs)} failed ({type(error).__name__}: {error})."
                    ) from error

    found = {name: geometry for name, geometry in found.items() if name not in rejected}
    unreached = [name for name in wanted if name not in found]
    if unreached or not found:
        raise ValueError(_why_not_found(model, unreached, rejected))
    return {name: found[name] for name in modules if name in found}


class _Rotations:
    """
    What is seen of the attention modules' rotations in a probe.

    Whether a module has rotated its queries (some have layers that do not) is told by whether they depend on the position
    embeddings that it was given: that is known without the weights.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.obstacles: dict[str, str] = {}
        self.handles: list[Any] = []
        self._rotations: dict[str, QueryRotation] = {}
        self._embeddings: dict[str, PositionEmbeddings] = {}
        for name, module in modules.items():
            try:
                rotation = find_rotation(module)
                if rotation is not None and not calls_attention_interface(module):
                    raise ValueError("it computes attention itself")
            except ValueError as error:
                self.obstacles[name] = str(error)
                continue
            if rotation is not None:
                self._rotations[name] = rotation
                hook = partial(self._watch, name)
                self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _watch(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a module's forward in the probe: have autograd follow its position embeddings."""
        if module not in (THREAD.interface or {}):
            return None  # another thread's
        embeddings = position_embeddings_of(module, args, kwargs)
        if embeddings is None:
            return None
        if not has_known_form(embeddings):
            self.obstacles[name] = (
                f"its position embeddings, a {type(embeddings).__name__}, are of a form that is not known"
            )
            return None
        torch.set_grad_enabled(True)
        watched: PositionEmbeddings
        if isinstance(embeddings, torch.Tensor):
            watched = embeddings.detach().requires_grad_()
        else:
            cos, sin = embeddings
            watched = cos.detach().requires_grad_(), sin.detach()
        self._embeddings[name] = watched
        return tuple(watched if each is embeddings else each for each in args), {
            key: watched if each is embeddings else each for key, each in kwargs.items()
        }

    def of_query(self, name: str, query: torch.Tensor) -> tuple[QueryRotation | None, PositionEmbeddings | None]:
        """Return how a module has rotated its queries, if it has, and by what."""
        embeddings = self._embeddings.pop(name, None)
        torch.set_grad_enabled(False)
        if embeddings is None or not query.requires_grad:
            return None, None
        watched = embeddings if isinstance(embeddings, torch.Tensor) else embeddings[0]
        gradient = torch.autograd.grad(query, watched, torch.zeros_like(query), allow_unused=True)[0]
        return (None, None) if gradient is None else (self._rotations[name], embeddings)


@contextmanager
def _observing_rotations(modules: dict[str, nn.Module]) -> Iterator[_Rotations]:
    rotations = _Rotations(modules)
    try:
        yield rotations
    finally:
        for handle in rotations.handles:
            handle.remove()


def spread(states: torch.Tensor) -> float:
    """
    The standard deviation that the numbers of a token have, as its median over tokens.

    Not over all numbers: the first tokens of a text have values and keys of another order in many language models.

    Args:
        states (`torch.Tensor`): Keys or values, (kv_heads, tokens, dim).

    Returns:
        `float`: The spread; 1 for tensors on the meta device, and where there is none.
    """
    if states.is_meta:
        return 1.0
    std = states.transpose(0, 1).flatten(1).float().std(dim=-1).median().item()
    return std if 0.0 < std < float("inf") else 1.0


def _why_not_found(model: nn.Module, unreached: list[str], rejected: dict[str, str]) -> str:
    """The error for attention modules that the probe did not find: those wanted, or any."""
    for name in unreached or rejected:
        if name in rejected:
            return (
                f"PREFIX_PLUS cannot prefix {name} of {type(model).__name__}: the forward of "
                f"{type(model.get_submodule(name)).__name__} computes no attention over keys and values in a form that can "
                f"be followed ({rejected[name]}). Choose other modules by `target_modules`, or another PEFT method."
            )
    names = ", ".join(unreached) or f"any attention module of {type(model).__name__}"
    return (
        f"Could not determine the shape of the keys and values of {names}: a forward of the model does not reach "
        "their attention. Name only attention modules that its main input reaches, in `target_modules`."
    )


def _outermost_first(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The transformers models in a model, itself first, each with the prefix that its modules' names have."""
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    ]


def execution_device(module: nn.Module) -> torch.device | None:
    """Return where a module computes: where accelerate brings it, if it is offloaded, or else where its weights lie."""
    for submodule in module.modules():
        hook = getattr(submodule, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None and getattr(each, "offload", False):
                return torch.device(device)
    return next((parameter.device for parameter in module.parameters()), None)


def probe_inputs(model: PreTrainedModel, num_tokens: int) -> dict[str, torch.Tensor]:
    """
    Return inputs for a model's forward, by name: tokens from all over the vocabulary, or noise.

    Args:
        model (`PreTrainedModel`): The model.
        num_tokens (`int`): How many tokens a decoder gets. An encoder that it reads gets one more, so that lengths tell
            cross-attention and encoder from the decoder. Pictures and sounds have the size that the model's config names.
    """
    config, device = model.config, execution_device(model)
    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    inputs: dict[str, torch.Tensor] = {}
    if is_encoder_decoder:
        inputs["decoder_input_ids"] = _different_tokens(model, num_tokens, device)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs["pixel_values"] = _noise((1, config.num_channels, height, width), model.dtype, device)
    elif model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        inputs["input_features"] = _noise((1, config.num_mel_bins, frames), model.dtype, device)
    else:
        inputs["input_ids"] = _different_tokens(model, num_tokens + is_encoder_decoder, device)
    return inputs


def _different_tokens(model: PreTrainedModel, num_tokens: int, device: torch.device | None) -> torch.Tensor:
    """Return token ids (1, num_tokens) spread evenly over the vocabulary."""
    # a model of characters has no vocabulary, and takes any small numbers
    size = getattr(model.config.get_text_config(), "vocab_size", num_tokens + 1)
    return (torch.arange(1, num_tokens + 1, device=device) * size // (num_tokens + 1))[None]


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    if device is not None and device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def positions_before(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return the arguments that put tokens at the positions from which a prefix acts: those before the first real one.

    Keys that rotate by their position can have any: …, -2, -1. Positions that are learned, or looked up in a table, begin at 0,
    and there is nothing to give; as where queries are scaled by the logarithm of their position (Llama 4, Ministral 3).

    Args:
        model (`PreTrainedModel`): The model.
        inputs (`Mapping[str, torch.Tensor]`): The tokens, `input_ids` and perhaps `decoder_input_ids`, (1, tokens) each.
    """
    config = model.config.get_text_config()
    rotations = getattr(config, "rope_parameters", None) or {}
    scales_queries = "llama_4_scaling_beta" in rotations or getattr(config, "attn_temperature_tuning", False)
    has_rotary = any("RotaryEmbedding" in type(module).__name__ for module in model.modules())
    if scales_queries or not has_rotary:
        return {}
    taken = inspect.signature(model.forward).parameters
    names = {"input_ids": "position_ids", "decoder_input_ids": "decoder_position_ids"}
    return {
        position_name: torch.arange(-tokens.shape[1], 0, device=tokens.device)[None]
        for name, position_name in names.items()
        if position_name in taken and (tokens := inputs.get(name)) is not None
    }
