"""The prefixes of one attention module."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .adapters.memo import Memo, Source
from .adapters.running import RUNNING
from .adapters.shared import PrefixPlusModule
from .attention import (
    POSITIONS,
    ActivePrefixes,
    ConfigView,
    PositionEmbeddings,
    Prefix,
    QueryRotation,
    TurnedPrefixes,
    concatenated,
    eager_attention_function,
    follow,
    gathered,
    model_config,
    position_embeddings_of,
    reads_implementation,
    set_config,
    unfollow,
)
from .encoders import PrefixEncoder, Scaling, make_encoder
from .probing.geometry import AttentionGeometry
from .probing.modules import calls_attention_interface, execution_device
from .registration import METHOD_NAME
from .starting.scaling import scale_and_start


if TYPE_CHECKING:
    from .config import PrefixPlusConfig


GATE_SCALE = 25.0
"""What a gate's parameter of 1 stands for: a gate goes from 0 to about 1 while keys and values move by far less. Measured: docs/quality.md."""


class Gates(nn.ParameterDict):
    """
    The gates of one attention module by adapter, (query_heads,) each, divided by [`GATE_SCALE`].

    Read a gate through a call, like all parameters of adapters: ZeRO-3 gathers a module's parameters when it is
    called.
    """

    __call__ = nn.Module.__call__  # which `nn.ParameterDict` forbids

    def forward(self, adapter_name: str) -> torch.Tensor | None:
        """Return an adapter's gate, or `None` if it has none."""
        return self[adapter_name] * GATE_SCALE if adapter_name in self else None


class PrefixPlusLayer(nn.Module, PrefixPlusModule):
    """
    The prefixes of one attention module, by adapter; a child of that module.

    Per adapter, with the encoder of its reparameterization:

        (P_K, P_V) = dropout(encoder())

    The encoder's scaling is kept here, apart from the parameters that [`PrefixPlusLayer.adapter_parameters`] yields,
    because it stays in float32. The prefixes of several active adapters are concatenated.

    Args:
        attention (`nn.Module`): The attention module.
        adapters (`Collection[str]`): The names of the model's adapters, some of which this layer may not have; PEFT
            keeps them up to date.
    """

    adapter_layer_names: tuple[str, ...] = ("prefix_plus_encoder", "prefix_plus_gate", "prefix_plus_scaling")
    other_param_names: tuple[str, ...] = ("dropout", "is_decoupled", "is_position_free")

    def __init__(self, attention: nn.Module, adapters: Collection[str]) -> None:
        super().__init__()
        self.prefix_plus_encoder = nn.ModuleDict({})
        self.prefix_plus_gate = Gates({})
        self.prefix_plus_scaling = nn.ModuleDict({})
        self.dropout: dict[str, float] = {}
        self.is_decoupled: dict[str, bool] = {}
        self.is_position_free: dict[str, bool] = {}
        is_interface = calls_attention_interface(attention)
        self.eager_attention = eager_attention_function(type(attention)) if is_interface else None
        # How the module rotates its queries: kept while an adapter is position-free.
        self.rotation: QueryRotation | None = None
        self._position_hook: RemovableHandle | None = None
        self._attention = (attention,)  # in a tuple: the attention module must not become a child of its child
        self._adapters = adapters
        self._active_adapter = []

    @property
    def attention(self) -> nn.Module:
        """The attention module that this layer is a child of."""
        return self._attention[0]

    def update_layer(
        self,
        adapter_name: str,
        config: PrefixPlusConfig,
        geometry: AttentionGeometry,
        shared_parts: nn.ModuleDict,
    ) -> None:
        """
        Add an adapter.

        Args:
            adapter_name (`str`): Its name.
            config (`PrefixPlusConfig`): Its configuration.
            geometry (`AttentionGeometry`): The attention module's geometry.
            shared_parts (`nn.ModuleDict`): Encoder parts that the adapter's layers share; added to.
        """
        encoder = make_encoder(config, geometry.shape, shared_parts)
        self.prefix_plus_scaling[adapter_name] = Scaling()  # in float32, whatever the others are: it stays exact
        encoder.take_scaling_from(self.prefix_plus_scaling, adapter_name)
        scale_and_start(encoder, config, geometry)
        self.prefix_plus_encoder[adapter_name] = encoder
        if config.gating:
            start = 1.0 / GATE_SCALE if config.init_weights in (False, "random") else 0.0
            self.prefix_plus_gate[adapter_name] = nn.Parameter(torch.full((geometry.num_query_heads,), start))
        self.dropout[adapter_name] = float(config.encoder_dropout)
        self.is_decoupled[adapter_name] = bool(config.decoupled)
        self.set_position_free(adapter_name, bool(config.position_free), geometry.rotation)
        dtypes = (parameter.dtype for parameter in self.attention.parameters() if parameter.is_floating_point())
        self._adapter_to(adapter_name, dtype=next(dtypes, None))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def set_position_free(self, adapter_name: str, is_position_free: bool, rotation: QueryRotation | None) -> None:
        """
        Say whether an adapter's keys meet unrotated queries.

        Args:
            adapter_name (`str`): The adapter.
            is_position_free (`bool`): Whether they do.
            rotation (`QueryRotation`, *optional*): How the attention module rotates its queries, if it does.
        """
        self.is_position_free[adapter_name] = is_position_free
        self._pass_positions(rotation)

    def stop_passing_positions(self) -> None:
        """Leave the attention module's forward as it was."""
        if self._position_hook is not None:
            self._position_hook.remove()
        self._position_hook = self.rotation = None

    def _pass_positions(self, rotation: QueryRotation | None) -> None:
        """Let the position embeddings of each forward reach the attention function, if an adapter needs them."""
        self.stop_passing_positions()
        if rotation is not None and any(self.is_position_free.values()):
            self.rotation = rotation
            self._position_hook = self.attention.register_forward_pre_hook(_pass_positions, with_kwargs=True)

    def reads_unrotated(self, adapter_name: str) -> bool:
        """Whether an adapter's prefix meets queries other than those that enter attention."""
        return self.is_position_free[adapter_name] and self.rotation is not None

    def queries(self, query: torch.Tensor, reads: str, positions: PositionEmbeddings | None) -> torch.Tensor:
        """
        Return the queries that a prefix reads.

        Args:
            query (`torch.Tensor`): The queries as they enter attention, (batch, query_heads, tokens, key_dim).
            reads (`str`): See [`Prefix`].
            positions (`PositionEmbeddings`, *optional*): What they were rotated by.

        Returns:
            `torch.Tensor`: Of the same shape, or twice as wide for `"both"`.
        """
        if reads == "rotated":
            return query
        if self.rotation is None or positions is None:
            raise RuntimeError(
                f"{type(self.attention).__name__} was called without its `position_embeddings`, which its position-free "
                "prefix needs. Call it as its model does."
            )
        unrotated = self.rotation.undo_by(query, *self._rotation_factors(query, positions))
        return torch.cat([query, unrotated], dim=-1) if reads == "both" else unrotated

    def _rotation_factors(
        self, query: torch.Tensor, positions: PositionEmbeddings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The factors that undo the rotation of queries: in `generate`, made once for all layers with the same positions.
        """
        assert self.rotation is not None
        memo = None if torch.compiler.is_compiling() else RUNNING.memo
        if memo is None:
            return self.rotation.factors(query, positions, query.shape[2])
        carrier = positions if isinstance(positions, torch.Tensor) else positions[0]
        version = 0 if carrier.is_inference() else carrier._version
        context = (id(carrier), version, query.shape[2], query.dtype, query.device)
        rotation = id(self.rotation)  # one for all layers, and quicker to look up than by its fields
        kept = memo.recall(rotation, context)
        if kept is None:
            kept = (
                self.rotation.factors(query, positions, query.shape[2]),
                carrier,
            )  # which keeps its id from being given to another
            memo.keep(rotation, context, (), kept)
        return kept[0]

    def encoder(self, adapter_name: str) -> PrefixEncoder:
        """Return the encoder that produces an adapter's prefix here."""
        encoder: Any = self.prefix_plus_encoder[adapter_name]
        return encoder

    def replace_encoder(self, adapter_name: str, encoder: PrefixEncoder) -> None:
        """Replace an adapter's encoder by another, whose prefix already has its final scale."""
        self.encoder(adapter_name).scaling.set(1.0, 1.0)
        encoder.take_scaling_from(self.prefix_plus_scaling, adapter_name)
        self.prefix_plus_encoder[adapter_name] = encoder

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that this layer made for an adapter (of those that share one, the first layer made it)."""
        for part in self._own_parts(adapter_name):
            yield from part.parameters()
        if adapter_name in self.prefix_plus_gate:
            yield self.prefix_plus_gate[adapter_name]

    def _own_parts(self, adapter_name: str) -> list[nn.Module]:
        if adapter_name not in self.prefix_plus_encoder:
            return []
        return self.encoder(adapter_name).own_parts()

    def prefix_key_value(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an adapter's keys (heads, tokens, key_dim) and values (heads, tokens, value_dim), before dropout."""
        return self.prefix_plus_encoder[adapter_name]()

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> ActivePrefixes:
        """
        Return the prefixes of the active adapters. While `generate` runs, they are produced only once unless a
        parameter changes.

        Args:
            key (`torch.Tensor`): The real keys, (batch, kv_heads, kv_tokens, key_dim): their dtype and device count.
            value (`torch.Tensor`): The real values, (batch, kv_heads, kv_tokens, value_dim).

        Returns:
            `tuple`: The joint prefix, or `None`, and the prefixes that are added to attention.
        """
        if self._disable_adapters:
            return None, ()
        memo = RUNNING.memo
        if memo is None or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._produce(self._adapters_in_use(), key, value)
        # the number of rows counts only where the rows have adapters of their own, but it seldom changes
        in_use = self._rows() or self._active_adapter
        context = (in_use, key.shape[0], key.dtype, value.dtype, key.is_cpu, key.get_device())
        produced = memo.recall(self, context)
        if produced is None:
            names = self._adapters_in_use()
            produced = self._produce(names, key, value)
            if memo.keep(self, context, self._sources(names), produced):
                produced = self._turned(memo, produced)
                memo.keep(self, context, self._sources(names), produced)
        return produced

    def _turned(self, memo: Memo, produced: ActivePrefixes) -> ActivePrefixes:
        """Let kept prefixes that read unrotated queries be turned to the position of a single query."""
        prefix, added = produced
        return (
            None if prefix is None else self._turned_with_others(memo, prefix, "joint"),
            tuple(self._turned_with_others(memo, each, str(index)) for index, each in enumerate(added)),
        )

    def _turned_with_others(self, memo: Memo, prefix: Prefix, name: str) -> Prefix:
        if prefix.reads != "unrotated" or prefix.is_of_rows or self.rotation is None:
            return prefix
        kind = (id(self.rotation), prefix.key.shape, prefix.key.dtype, prefix.key.device)
        return memo.turned.setdefault(kind, TurnedPrefixes(self.rotation)).add((self, name), prefix)

    def has_prefix(self) -> bool:
        """Whether a prefix takes part in the next forward."""
        return not self._disable_adapters and bool(self._present(self._adapters_in_use()))

    def is_joint(self, adapter_name: str) -> bool:
        """Whether an adapter's prefix shares the softmax of the real tokens."""
        return adapter_name not in self.prefix_plus_gate and not self.is_decoupled[adapter_name]

    @contextmanager
    def activating(self, adapter_names: list[str]) -> Iterator[None]:
        """Make these adapters the active ones here, and change nothing else, as `set_adapter` would."""
        active = self._active_adapter
        try:
            self._active_adapter = adapter_names
            yield
        finally:
            self._active_adapter = active

    def hiding(self, adapter_name: str) -> AbstractContextManager[None]:
        """Remove an adapter from the active ones here for a while, and change nothing else."""
        return self.activating([name for name in self.active_adapters if name != adapter_name])

    def _adapters_in_use(self) -> list[str]:
        """The names of the adapters that the next forward uses: the rows' own, or else the active ones."""
        rows = self._rows()
        return self.active_adapters if rows is None else rows

    def _rows(self) -> list[str] | None:
        """A name for each row of the model's input, while the rows of a batch have adapters of their own."""
        rows = RUNNING.rows
        return None if rows is None else rows.get(self)

    def _present(self, adapter_names: list[str]) -> list[str]:
        """The given adapters that this layer has, each once."""
        return list(dict.fromkeys(name for name in adapter_names if name in self.prefix_plus_encoder))

    def _sources(self, adapter_names: list[str]) -> Iterator[Source]:
        """The parameters that the adapters' prefixes here depend on, shared ones included, and the encoders."""
        for adapter_name in self._present(adapter_names):
            yield self.prefix_plus_encoder._modules, adapter_name
            for part in self.encoder(adapter_name).parts():
                yield from ((part._parameters, name) for name, _ in part.named_parameters(recurse=False))
            yield self.prefix_plus_scaling[adapter_name]._parameters, "factors"
            if adapter_name in self.prefix_plus_gate:
                yield self.prefix_plus_gate._parameters, adapter_name

    def _produce(self, adapter_names: list[str], key: torch.Tensor, value: torch.Tensor) -> ActivePrefixes:
        prefixes = {name: self._prefix(name).to(key, value) for name in self._present(adapter_names)}
        rows = self._rows()
        if rows is not None:
            return _of_rows(prefixes, _repeated(rows, key.shape[0]))
        joint = [prefix for prefix in prefixes.values() if prefix.is_joint]
        added = tuple(prefix for prefix in prefixes.values() if not prefix.is_joint)
        return concatenated(joint) if joint else None, added

    def _prefix(self, adapter_name: str) -> Prefix:
        """Return an adapter's prefix."""
        key, value = self.prefix_key_value(adapter_name)
        if self.training and self.dropout[adapter_name] > 0.0:
            key = nn.functional.dropout(key, self.dropout[adapter_name])
            value = nn.functional.dropout(value, self.dropout[adapter_name])
        reads = "unrotated" if self.reads_unrotated(adapter_name) else "rotated"
        return Prefix(
            key,
            value,
            gate=self.prefix_plus_gate(adapter_name),
            is_decoupled=self.is_decoupled[adapter_name],
            reads=reads,
        )

    def remove_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer, whether or not it is active."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]
        self._pass_positions(self.rotation)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Delete an adapter from this layer. If it was the only active one, the first of the model's remaining ones
        becomes active, the same one in every layer.

        Args:
            adapter_name (`str`): The name.
        """
        self.remove_adapter(adapter_name)
        if adapter_name not in self.active_adapters:
            return
        active = [name for name in self.active_adapters if name != adapter_name]
        if not active:
            active = [name for name in self._adapters if name != adapter_name][:1]
            if active:
                warnings.warn(
                    f"Adapter {adapter_name} was active and is now deleted. The active adapter is now {active[0]}.",
                    stacklevel=2,
                )
        self.set_adapter(active)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.prefix_plus_encoder:
            return
        factors = self.encoder(adapter_name).scaling.factors
        if any(parameter.is_meta for parameter in (factors, *self.adapter_parameters(adapter_name))):
            return  # built empty, to be filled by a checkpoint
        device = execution_device(self.attention) if device is None else device
        self._adapter_to(adapter_name, device=device)
        self.prefix_plus_scaling[adapter_name].to(device)

    def _adapter_to(self, adapter_name: str, **destination: Any) -> None:
        for part in self._own_parts(adapter_name):
            part.to(**destination)
        if adapter_name in self.prefix_plus_gate:
            self.prefix_plus_gate[adapter_name] = self.prefix_plus_gate[adapter_name].to(**destination)

    def __repr__(self) -> str:
        return f"{METHOD_NAME}.{super().__repr__()}"


def _repeated(rows: list[str], batch: int) -> list[str]:
    """The adapter of each row of a batch: generation repeats each row of the input for its beams and returned sequences."""
    if batch % len(rows):
        raise ValueError(
            f"`adapter_names` has {len(rows)} names, but the batch has {batch} rows: it must have one name for each row "
            "of the input."
        )
    return [name for name in rows for _ in range(batch // len(rows))]


def _of_rows(prefixes: dict[str, Prefix], rows: list[str]) -> ActivePrefixes:
    """Gather the prefixes of adapters for the rows that use them, those of each form together."""
    kinds: dict[tuple[bool, bool, str], dict[str, Prefix]] = {}
    for name, prefix in prefixes.items():
        # joint prefixes share one softmax, whichever queries they read
        kind = (prefix.is_joint, prefix.is_decoupled, "" if prefix.is_joint else prefix.reads)
        kinds.setdefault(kind, {})[name] = prefix
    joint, added = None, []
    for (is_joint, *_), alike in kinds.items():
        index = {name: number for number, name in enumerate(alike)}
        prefix = gathered(list(alike.values()), [index.get(name) for name in rows])
        if is_joint:
            joint = prefix
        else:
            added.append(prefix)
    return joint, tuple(added)


def _pass_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """
    Before an attention module's forward, pass the position embeddings a second time, among the arguments that it
    forwards to its attention function.
    """
    return args, {**kwargs, POSITIONS: position_embeddings_of(module, args, kwargs)}


def attach(attention: nn.Module, adapters: Collection[str]) -> PrefixPlusLayer:
    """Return the attention module's [`PrefixPlusLayer`], made if it has none; `adapters` is the model's."""
    layer = getattr(attention, METHOD_NAME, None)
    if layer is None:
        layer = PrefixPlusLayer(attention, adapters)
        attention.add_module(METHOD_NAME, layer)
        if calls_attention_interface(attention):
            set_config(attention, ConfigView(attention.config, METHOD_NAME, reads_implementation(type(attention))))
        else:
            follow(attention, METHOD_NAME)
    return layer


def detach(attention: nn.Module) -> None:
    """Restore the attention module to its state before [`attach`]."""
    layer: Any = getattr(attention, METHOD_NAME)
    layer.stop_passing_positions()
    if calls_attention_interface(attention):
        set_config(attention, model_config(attention))
    else:
        unfollow(attention)
    delattr(attention, METHOD_NAME)
