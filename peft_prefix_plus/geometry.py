"""Finding a model's attention modules, their kind, and the shape that their keys and values really have."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from .inputs import TEXT_INPUTS, given_inputs, lone_inputs, probe_inputs
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
    Determine the geometry of a model's attention modules, by one tiny forward: those that its main input reaches, or the
    inputs that the user gives by [`example_inputs`].

    Of several models in a wrapper, each is run. A model that cannot be run is probed by its parts: the models in it on their
    own main inputs, and then its attention modules alone, on noise.

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
        ValueError: If nothing is reached, or a wanted module is not, or one of a model that cannot be run.
    """
    search = _Search(model, {} if rejected is None else rejected, num_tokens, are_before)
    given = given_inputs(model, execution_device(model))
    if given is not None:
        search.run_given(model, given)
    else:
        for prefix, submodel in _outermost(model):
            search.reach(prefix, submodel)
    for prefix, submodel in _outermost_first(model):
        if any(name.startswith(prefix) and name not in search.found for name in wanted):
            search.reach(prefix, submodel)
    search.reach_alone(wanted or search.missing())
    if not wanted and search.missing():
        raise ValueError(_why_not_found(model, search.missing(), search))

    found = {name: geometry for name, geometry in search.found.items() if name not in search.rejected}
    unreached = [name for name in wanted if name not in found]
    if unreached or not found:
        raise ValueError(_why_not_found(model, unreached, search))
    return {name: found[name] for name in search.modules if name in found}


class _Search:
    """
    A search for the geometry of a model's attention modules.

    Args:
        model (`nn.Module`): The model.
        rejected (`dict[str, str]`): As in [`probe`].
        num_tokens (`int`): As in [`probe`].
        are_before (`bool`): As in [`probe`].

    Attributes:
        found (`dict[str, AttentionGeometry]`): What was found so far, by module name.
        failures (`dict[str, str]`): The models and modules that could not be run, by name, and why.
    """

    def __init__(self, model: nn.Module, rejected: dict[str, str], num_tokens: int, are_before: bool) -> None:
        self.model = model
        self.modules = attention_modules(model)
        self.rejected = rejected
        self.num_tokens = num_tokens
        self.are_before = are_before
        self.found: dict[str, AttentionGeometry] = {}
        self.failures: dict[str, str] = {}
        # Prefixes of the models that were run, and of those that could be: what their main input does not reach has no prefix.
        self._tried: set[str] = set()
        self._settled: set[str] = set()
        self._rotations: _Rotations
        self._kind_of: Callable[[str, int, int], str]

    def record(self, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: Any) -> None:
        """Note what one computation of attention tells."""
        shape = KVShape(key.shape[1], key.shape[3], value.shape[3])
        rotation, embeddings = self._rotations.of_query(name, query)
        if name in self.found:
            return
        kind = self._kind_of(name, query.shape[2], key.shape[2])
        query, key, value = query[:1].detach(), key[:1].detach(), value[0].detach()
        unrotated_query, unrotated_key = query, key  # (1, heads, tokens, key_dim)
        if rotation is not None and embeddings is not None:
            unrotated_query = rotation.undo(query, embeddings).detach()
            if key.shape[2] == query.shape[2]:
                unrotated_key = rotation.undo(key, embeddings).detach()
        self.found[name] = AttentionGeometry(
            kind=kind,
            shape=shape,
            num_query_heads=query.shape[1],
            scale=1.0 if isinstance(scale, torch.Tensor) and scale.is_meta else float(scale),
            query=query[0],
            key=key[0],
            value=value,
            rotation=rotation,
            obstacle=self._rotations.obstacles.get(name),
            unrotated_query=unrotated_query[0],
            unrotated_key=unrotated_key[0],
        )

    def run(self, runnable: nn.Module, watched: dict[str, nn.Module], inputs: dict[str, Any]) -> None:
        """Run a model, or a module alone, while some modules are watched."""
        with (
            recording(watched, self.record, self.rejected.__setitem__),
            evaluating(runnable),
            gathering(runnable),
            _observing_rotations(watched) as self._rotations,
        ):
            runnable(**inputs)

    def run_given(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """
        Run the model on the user's own inputs.

        Raises:
            ValueError: If it does not take them.
        """
        self._settled.add("")
        is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._kind_of = _kinds_by_place(model, self.modules) if is_encoder_decoder else _always_self
        try:
            self.run(model, self.modules, inputs)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be run on the example inputs {sorted(inputs)} ({type(error).__name__}: "
                f"{error}). Give the arguments that its forward takes to `example_inputs`."
            ) from error

    def reach(self, prefix: str, model: PreTrainedModel) -> None:
        """Run a model, whose modules' names have a prefix, in one way after another until it works; if none does, its parts."""
        if prefix in self._tried:
            return
        self._tried.add(prefix)
        for inputs in probe_inputs(model, self.num_tokens, execution_device(model)):
            if not getattr(model.config, "is_encoder_decoder", False):
                self._kind_of = _always_self
            elif set(inputs) == set(TEXT_INPUTS):
                self._kind_of = partial(_kind_by_length, self.num_tokens)
            else:
                self._kind_of = _kinds_by_place(model, self.modules)
            if self.are_before and "input_ids" in inputs:
                inputs.update(positions_before(model, inputs))
            try:
                self.run(model, self.modules, inputs)
            except Exception as error:  # noqa: BLE001 - a model's forward raises anything
                reason = f"a forward with {sorted(inputs)} failed ({type(error).__name__}: {error})"
                self.failures.setdefault(prefix.removesuffix("."), reason)
                # A head may want more than its backbone (BART's classifier an end token): what counts is the record.
                if any(name.startswith(prefix) for name in self.missing()):
                    continue
            self._settled.add(prefix)
            return
        for inner_prefix, inner in _outermost(model, prefix):
            if any(name.startswith(inner_prefix) for name in self.missing()):
                self.reach(inner_prefix, inner)

    def reach_alone(self, names: Iterable[str]) -> None:
        """Run those of the modules alone that no forward of a model has reached."""
        for name in names:
            if name in self.found or name in self.rejected:
                continue
            module = self.modules[name]
            parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
            dtype = parameters[0].dtype if parameters else torch.float32
            self._kind_of = _always_self
            try:
                ways = list(lone_inputs(module, self.num_tokens, dtype, execution_device(module)))
            except ValueError as error:
                self.failures[name] = f"alone, {type(module).__name__} cannot be run: {error}"
                continue
            for inputs in ways:
                try:
                    self.run(module, {name: module}, inputs)
                    break
                except Exception as error:  # noqa: BLE001
                    self.failures[name] = f"alone, it cannot be run ({type(error).__name__}: {error})"

    def missing(self) -> list[str]:
        """The attention modules of which nothing is known yet, but for those that a model which could be run does not reach."""
        return [
            name
            for name, module in self.modules.items()
            if name not in self.found
            and name not in self.rejected
            and not any(name.startswith(prefix) for prefix in self._settled)
            and (calls_attention_interface(module) or "att" in type(module).__name__.lower())  # not a router
        ]


def _always_self(name: str, query_tokens: int, key_tokens: int) -> str:
    return "self"


def _kind_by_length(num_decoder_tokens: int, name: str, query_tokens: int, key_tokens: int) -> str:
    """The kind of attention in an encoder-decoder model whose encoder got more tokens than its decoder."""
    if query_tokens != num_decoder_tokens:
        return "encoder"
    return "self" if key_tokens == num_decoder_tokens else "cross"


def _kinds_by_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> Callable[[str, int, int], str]:
    """How to tell the kinds of attention in an encoder-decoder model whose encoder got anything."""
    encoder = model.get_encoder() if isinstance(model, PreTrainedModel) else model
    encoder_modules = set() if encoder is model else set(encoder.modules())

    def kind(name: str, query_tokens: int, key_tokens: int) -> str:
        if modules[name] in encoder_modules:
            return "encoder"
        return "cross" if key_tokens != query_tokens or CROSS_NAME.search(name) else "self"

    return kind


CROSS_NAME = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)
"""What in its name tells cross-attention, where an encoder's and a decoder's tokens happen to be as many."""


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


def _why_not_found(model: nn.Module, unreached: list[str], search: _Search) -> str:
    """The error for attention modules that the probe did not find: those wanted, or any."""
    rejected = search.rejected
    for name in unreached or rejected:
        if name in rejected:
            return (
                f"PREFIX_PLUS cannot prefix {name} of {type(model).__name__}: the forward of "
                f"{type(model.get_submodule(name)).__name__} computes no attention over keys and values in a form that can "
                f"be followed ({rejected[name]}). Choose other modules by `target_modules`, or another PEFT method."
            )
    names = f"{', '.join(unreached[:4])}{' …' if len(unreached) > 4 else ''}"
    reasons = [search.failures[name] for name in (*search.failures, *unreached) if name in search.failures]
    why = reasons[0] if reasons else "a forward of the model does not reach their attention"
    return (
        f"Could not determine the shapes of the keys and values of {type(model).__name__} "
        f"({names or 'none of its attention modules'}): {why}. Add or load the adapter inside "
        "`with peft_prefix_plus.example_inputs(…)`, given the arguments of a forward that reaches them, or name other "
        "modules in `target_modules`."
    )


def _outermost(model: nn.Module, prefix: str | None = None) -> list[tuple[str, PreTrainedModel]]:
    """
    The transformers models in a model that are in no other, each with the prefix that its modules' names have.

    Args:
        model (`nn.Module`): The model.
        prefix (`str`, *optional*): The prefix of its own modules' names. It then does not count itself.
    """
    found: list[tuple[str, PreTrainedModel]] = []
    for inner_prefix, inner in _outermost_first(model):
        is_itself = prefix is not None and inner is model
        if not is_itself and not any(inner_prefix.startswith(outer) for outer, _ in found):
            found.append((inner_prefix, inner))
    return [(f"{prefix or ''}{inner_prefix}", inner) for inner_prefix, inner in found]


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
