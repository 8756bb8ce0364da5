"""Determining the geometry of a model's attention modules, by one tiny forward."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..encoders import KVShape
from .examples import given_inputs
from .geometry import AttentionGeometry
from .inputs import TEXT_INPUTS, positions_before, probe_inputs
from .lone import lone_inputs
from .modules import attention_modules, calls_attention_interface, execution_device, models_in, outermost_models
from .recording import evaluating, gathering, recording
from .rotations import ObservedRotations, observing_rotations
from .tensors import LACK_OF_MEMORY


PROBE_TOKENS = 8
"""How many tokens a probe's forward has, if nothing asks for more: enough to tell a standard deviation."""


def probe(
    model: nn.Module,
    wanted: Collection[str] = (),
    rejected: dict[str, str] | None = None,
    num_tokens: int = PROBE_TOKENS,
    are_before: bool = False,
) -> dict[str, AttentionGeometry]:
    """
    Determine the geometry of a model's attention modules, by one tiny forward. It covers the modules that the main
    input reaches, or that the inputs of [`example_inputs`] reach. If a wrapper has several models, each is run. If a
    model cannot run, its parts are: the models in it on their own main inputs, and then its attention modules alone,
    on noise. Shapes are read where the keys and values enter attention, not from the config, which works for grouped
    heads, latent attention, layers of different shape and hybrid models. On a model on the meta device it computes
    nothing.

    Args:
        model (`nn.Module`): The model.
        wanted (`Collection[str]`): Names of further attention modules, reached through the main input of the submodel
            that they belong to (a vision tower).
        rejected (`dict[str, str]`, *optional*): Filled with the modules that were reached and compute a softmax that a
            prefix cannot take part in, and why not.
        num_tokens (`int`): How many tokens the forward has at least.
        are_before (`bool`): Whether the tokens stand before a text (see [`positions_before`]).

    Returns:
        `dict[str, AttentionGeometry]`: By module name, in the model's order.

    Raises:
        ValueError: If no module is reached, or a wanted module is not, or if it belongs to a model that cannot run.
    """
    search = _Search(model, {} if rejected is None else rejected, num_tokens, are_before)
    given = given_inputs(model, execution_device(model))
    if given is not None:
        search.run_given(model, given)
    else:
        for prefix, submodel in outermost_models(model):
            search.reach(prefix, submodel)
    for prefix, submodel in models_in(model):
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
        self._rotations: ObservedRotations
        self._kind_of: Callable[[str, int, int], str]

    def record(self, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: Any) -> None:
        """Record one computation of attention."""
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
            observing_rotations(watched) as self._rotations,
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
        except LACK_OF_MEMORY:
            raise
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be run on the example inputs {sorted(inputs)} ({type(error).__name__}: "
                f"{error}). Give the arguments that its forward takes to `example_inputs`."
            ) from error

    def reach(self, prefix: str, model: PreTrainedModel) -> None:
        """
        Run a model, whose modules' names have a prefix, on one candidate input after another until it works, or else
        run its parts.
        """
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
            except LACK_OF_MEMORY:
                raise
            except Exception as error:  # noqa: BLE001 - a model's forward raises anything
                reason = f"a forward with {sorted(inputs)} failed ({type(error).__name__}: {error})"
                self.failures.setdefault(prefix.removesuffix("."), reason)
                # A head may want more than its backbone (BART's classifier an end token): what counts is the record.
                if any(name.startswith(prefix) for name in self.missing()):
                    continue
            self._settled.add(prefix)
            return
        for inner_prefix, inner in outermost_models(model, prefix):
            if any(name.startswith(inner_prefix) for name in self.missing()):
                self.reach(inner_prefix, inner)

    def reach_alone(self, names: Iterable[str]) -> None:
        """Run, alone, the modules that no forward of a model has reached."""
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
                except LACK_OF_MEMORY:
                    raise
                except Exception as error:  # noqa: BLE001
                    self.failures[name] = f"alone, it cannot be run ({type(error).__name__}: {error})"

    def missing(self) -> list[str]:
        """
        The attention modules of which nothing is known yet, except those that a successful run of their model does not
        reach.
        """
        return [
            name
            for name, module in self.modules.items()
            if name not in self.found
            and name not in self.rejected
            and not any(name.startswith(prefix) for prefix in self._settled)
            and (calls_attention_interface(module) or ATTENTION_NAME.search(type(module).__name__))
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


ATTENTION_NAME = re.compile("attention|attn", re.IGNORECASE)
"""What in its class's name tells attention from what else takes a softmax: a router, a pooling."""

CROSS_NAME = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)
"""What in its name tells cross-attention, where an encoder's and a decoder's tokens happen to be as many."""


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
