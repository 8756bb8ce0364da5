"""The prefixes of one attention module."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .attention import (
    ConfigView,
    InlineHooks,
    PositionEmbeddings,
    Prefix,
    QueryRotation,
    concatenated,
    eager_attention_function,
    model_config,
    position_embeddings_of,
    reads_implementation,
    require_complete,
    set_config,
)
from .encoders import PrefixEncoder, Scaling, make_encoder
from .geometry import AttentionGeometry, calls_attention_interface, execution_device
from .memo import Memo, Source
from .registration import METHOD_NAME
from .scaling import scale_and_start
from .shared import PrefixPlusModule


if TYPE_CHECKING:
    from typing_extensions import Self

    from .config import PrefixPlusConfig


ActivePrefixes = tuple[Prefix | None, tuple[Prefix, ...]]
"""The prefix that shares a softmax with the real tokens, or `None`, and the prefixes that are added to its attention."""


class Gates(nn.ParameterDict):
    """
    The gates of one attention module, (query_heads,) each, by adapter.

    They are read by a call, as all parameters of adapters are: ZeRO-3 gathers a module's parameters when it is called.
    """

    __call__ = nn.Module.__call__  # which `nn.ParameterDict` forbids

    def forward(self, adapter_name: str) -> torch.Tensor | None:
        """Return a copy of an adapter's gate, or `None` if it has none."""
        return self[adapter_name].clone() if adapter_name in self else None


class PrefixPlusLayer(nn.Module, PrefixPlusModule):
    """
    The prefixes of one attention module, by adapter; a child of that module.

    Per adapter, with the encoder of its reparameterization:

        (P_K, P_V) = dropout(encoder())

    The encoder's scaling is kept here: in a parameter, because what shards a model, or fills it from the meta device, looks
    after parameters; and apart from those that are trained, because PEFT makes all of those require a gradient.

    Several active adapters' prefixes stand one after the other.

    Args:
        attention (`nn.Module`): The attention module.
        adapters (`Collection[str]`): The names of the model's adapters, which other layers may have and this one not;
            kept up to date by PEFT.
    """

    adapter_layer_names: tuple[str, ...] = ("prefix_plus_encoder", "prefix_plus_gate")
    other_param_names: tuple[str, ...] = ("prefix_plus_scaling", "dropout", "is_decoupled", "is_position_free")

    # Torch sets it on the copies that `nn.DataParallel` makes for a forward, which share the memo and have no parameters.
    _is_replica = False

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
        # Set by `attach` where the attention module does not call the attention interface.
        self.inline_hooks: InlineHooks | None = None
        # How the module rotates its queries, and by what in the forward that runs: kept while an adapter is position-free.
        self.rotation: QueryRotation | None = None
        self.position_embeddings: PositionEmbeddings | None = None
        self._position_hook: RemovableHandle | None = None
        self._attention = (attention,)  # in a tuple: the attention module must not become a child of its child
        self._adapters = adapters
        self._active_adapter = []
        self._produced: Memo[ActivePrefixes] = Memo()
        # Set while the rows of a batch have adapters of their own: a name for each row of the model's input.
        self.row_adapters: list[str] | None = None

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
            is_open = config.init_weights in (False, "random")
            self.prefix_plus_gate[adapter_name] = nn.Parameter(torch.full((geometry.num_query_heads,), float(is_open)))
        self.dropout[adapter_name] = float(config.encoder_dropout)
        self.is_decoupled[adapter_name] = config.decoupled
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
        self._produced.clear()
        self.is_position_free[adapter_name] = is_position_free
        self._watch_positions(rotation)

    def stop_watching_positions(self) -> None:
        """Leave the attention module's forward as it was."""
        if self._position_hook is not None:
            self._position_hook.remove()
        self._position_hook = self.rotation = None

    def _watch_positions(self, rotation: QueryRotation | None) -> None:
        """Remember the position embeddings of each forward, if an adapter needs them."""
        self.stop_watching_positions()
        if rotation is not None and any(self.is_position_free.values()):
            self.rotation = rotation
            self._position_hook = self.attention.register_forward_pre_hook(_remember_positions, with_kwargs=True)

    def reads_unrotated(self, adapter_name: str) -> bool:
        """Whether an adapter's prefix meets other queries than those that enter attention."""
        return self.is_position_free[adapter_name] and self.rotation is not None

    def queries(self, query: torch.Tensor, reads: str) -> torch.Tensor:
        """
        Return the queries that a prefix reads.

        Args:
            query (`torch.Tensor`): The queries as they enter attention, (batch, query_heads, tokens, key_dim).
            reads (`str`): See [`Prefix`].

        Returns:
            `torch.Tensor`: Of the same shape, or twice as wide for `"both"`.
        """
        if reads == "rotated":
            return query
        if self.rotation is None or self.position_embeddings is None:
            raise RuntimeError(
                f"{type(self.attention).__name__} was called without its `position_embeddings`, which its position-free "
                "prefix needs. Call it as its model does."
            )
        unrotated = self.rotation.undo(query, self.position_embeddings)
        return torch.cat([query, unrotated], dim=-1) if reads == "both" else unrotated

    def encoder(self, adapter_name: str) -> PrefixEncoder:
        """Return what produces an adapter's prefix here."""
        encoder: Any = self.prefix_plus_encoder[adapter_name]
        return encoder

    def replace_encoder(self, adapter_name: str, encoder: PrefixEncoder) -> None:
        """Let another encoder, whose prefix has its final scale, produce an adapter's prefix here."""
        self._produced.clear()
        self.encoder(adapter_name).scaling.fill_(1.0)
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
        Return the prefixes of the active adapters. In inference they are produced once, until a parameter changes.

        Args:
            key (`torch.Tensor`): The real keys, (batch, kv_heads, kv_tokens, key_dim): their dtype and device count.
            value (`torch.Tensor`): The real values, (batch, kv_heads, kv_tokens, value_dim).

        Returns:
            `tuple`: The one that shares a softmax with the real tokens, or `None`; and those that are added to its attention.
        """
        if self._disable_adapters:
            return None, ()
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self._is_replica:
            self._produced.clear()
            return self._produce(self._adapters_in_use(), key, value)
        # the active adapters are no part of it: setting them clears what was produced
        rows = None if self.row_adapters is None else (key.shape[0], *self.row_adapters)
        context = (rows, key.dtype, value.dtype, key.is_cpu, key.get_device())
        produced = self._produced.recall(context)
        if produced is None:
            names = self._adapters_in_use()
            produced = self._produced.keep(context, self._sources(names), self._produce(names, key, value))
        return produced

    def has_prefix(self) -> bool:
        """Whether a prefix takes part in the next forward."""
        return not self._disable_adapters and bool(self._present(self._adapters_in_use()))

    def is_joint(self, adapter_name: str) -> bool:
        """Whether an adapter's prefix shares the softmax of the real tokens."""
        return adapter_name not in self.prefix_plus_gate and not self.is_decoupled[adapter_name]

    @contextmanager
    def hiding(self, adapter_name: str) -> Iterator[None]:
        """Leave an adapter out of those that are active here, and change nothing else (`set_adapter` would)."""
        active = self._active_adapter
        try:
            self._active_adapter = [name for name in self.active_adapters if name != adapter_name]
            self._produced.clear()
            yield
        finally:
            self._active_adapter = active
            self._produced.clear()

    def _adapters_in_use(self) -> list[str]:
        """The names that count for the next forward: the rows' own, or else the active ones."""
        return self.active_adapters if self.row_adapters is None else self.row_adapters

    def _present(self, adapter_names: list[str]) -> list[str]:
        """Those of the adapters that this layer has, each once."""
        return list(dict.fromkeys(name for name in adapter_names if name in self.prefix_plus_encoder))

    def _sources(self, adapter_names: list[str]) -> Iterator[Source]:
        """The parameters and buffers that the adapters' prefixes here depend on, shared ones included."""
        for adapter_name in self._present(adapter_names):
            encoder = self.encoder(adapter_name)
            for part in encoder.parts():
                yield from ((part._parameters, name) for name, _ in part.named_parameters(recurse=False))
            yield self.prefix_plus_scaling[adapter_name]._parameters, "factors"
            if adapter_name in self.prefix_plus_gate:
                yield self.prefix_plus_gate._parameters, adapter_name

    def _produce(self, adapter_names: list[str], key: torch.Tensor, value: torch.Tensor) -> ActivePrefixes:
        prefixes = [self._prefix(name, key.shape[0]).to(key, value) for name in self._present(adapter_names)]
        joint = [prefix for prefix in prefixes if prefix.is_joint]
        added = tuple(prefix for prefix in prefixes if not prefix.is_joint)
        return concatenated(joint) if joint else None, added

    def _prefix(self, adapter_name: str, batch: int) -> Prefix:
        """Return an adapter's prefix, masked for the rows of a batch that have another adapter."""
        key, value = self.prefix_key_value(adapter_name)
        if self.training and self.dropout[adapter_name] > 0.0:
            key = nn.functional.dropout(key, self.dropout[adapter_name])
            value = nn.functional.dropout(value, self.dropout[adapter_name])
        mask = None
        if self.row_adapters is not None:
            if batch % len(self.row_adapters):
                raise ValueError(
                    f"`adapter_names` has {len(self.row_adapters)} names, but the batch has {batch} rows: it must have "
                    "one name for each row of the input."
                )
            # generation repeats each row of the input for its beams and returned sequences
            rows = [name == adapter_name for name in self.row_adapters for _ in range(batch // len(self.row_adapters))]
            mask = torch.tensor(rows, device=key.device)[:, None].expand(-1, key.shape[1])
        reads = "unrotated" if self.reads_unrotated(adapter_name) else "rotated"
        return Prefix(key, value, mask, self.prefix_plus_gate(adapter_name), self.is_decoupled[adapter_name], reads)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, as in PEFT."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._produced.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._produced.clear()  # the parameters move
        return super()._apply(fn, recurse)

    def remove_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of this layer, whether or not it is active."""
        self._produced.clear()
        for attribute in self.adapter_layer_names + self.other_param_names:
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]
        self._watch_positions(self.rotation)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        Delete an adapter from this layer. If it was the only active one, the first of the model's remaining ones becomes
        active: on every layer the same.

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
        scaling = self.encoder(adapter_name).scaling
        if any(parameter.is_meta for parameter in (scaling, *self.adapter_parameters(adapter_name))):
            return  # built empty, to be filled by a checkpoint
        device = execution_device(self.attention) if device is None else device
        self._adapter_to(adapter_name, device=device)
        self.prefix_plus_scaling[adapter_name].to(device)

    def _adapter_to(self, adapter_name: str, **destination: Any) -> None:
        for part in self._own_parts(adapter_name):
            part.to(**destination)
        if adapter_name in self.prefix_plus_gate:
            self.prefix_plus_gate[adapter_name] = self.prefix_plus_gate[adapter_name].to(**destination)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "position_embeddings": None}  # of a forward that a copy has not run

    def __repr__(self) -> str:
        return f"{METHOD_NAME}.{super().__repr__()}"


def _remember_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the forward of an attention module."""
    module._modules[METHOD_NAME].position_embeddings = position_embeddings_of(module, args, kwargs)


def attach(attention: nn.Module, adapters: Collection[str]) -> PrefixPlusLayer:
    """Return the attention module's [`PrefixPlusLayer`], made if it has none; `adapters` is the model's."""
    layer = getattr(attention, METHOD_NAME, None)
    if layer is None:
        layer = PrefixPlusLayer(attention, adapters)
        attention.add_module(METHOD_NAME, layer)
        if calls_attention_interface(attention):
            set_config(attention, ConfigView(attention.config, METHOD_NAME, reads_implementation(type(attention))))
        else:
            layer.inline_hooks = InlineHooks(attention, layer, layer.has_prefix, require_complete)
    return layer


def detach(attention: nn.Module) -> None:
    """Leave the attention module as it was before [`attach`]."""
    layer: Any = getattr(attention, METHOD_NAME)
    layer.stop_watching_positions()
    if layer.inline_hooks is None:
        set_config(attention, model_config(attention))
    else:
        layer.inline_hooks.remove()
    delattr(attention, METHOD_NAME)
