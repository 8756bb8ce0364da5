"""A look inside a trained prefix: how much attention it draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapters.lookup import base_of, prefix_layers
from ..attention import attend_inline, observed_attention, watching
from ..layer import PrefixPlusLayer
from ..probing.modules import calls_attention_interface
from ..probing.recording import evaluating


def prefix_attention_mass(model: nn.Module, adapter_name: str | None = None, **inputs: Any) -> dict[str, torch.Tensor]:
    """
    Measure how much attention the prefix draws, in one forward of the model without gradients and dropout.

    Per head, the mass is the mean over the real queries of what the softmax gives to the prefix's positions,

        mean_q exp(lse_P - lse)

    with lse_P the log-sum-exp of a query's scores over the prefix, and lse that over all. It is computed from the scores
    of a chunk of queries at a time, in float32 at least; where the attention returns its weights (eager), from those. A
    prefix with a gate has a softmax of its own, and all of that is on the prefix: its mass is `|tanh(gate)|`, the factor that
    its attention is added with.

    Real are the queries that `attention_mask` does not mark as padding; in the decoder of an encoder-decoder model, those
    that `decoder_attention_mask` does not. Without a mask all are, and so are those of modules that read no text (of a
    vision tower).

    Args:
        model (`nn.Module`): A model with an adapter.
        adapter_name (`str`, *optional*): One of the active adapters; `None` means all of them together.
        inputs: The model's inputs. A cache among them is added to, as in any forward.

    Returns:
        `dict[str, torch.Tensor]`: By the attention module's name in the base model, the mass of each query head, shape
        (query_heads,), on the CPU. It has the modules with an active prefix that the forward reaches.

    Raises:
        ValueError: If there is no active prefix, the adapter is not active or decoupled, a mask does not tell which queries are real, or
            `adapter_names` gives the rows adapters of their own.

    Example:

    ```py
    >>> import torch
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, prefix_attention_mass

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig(num_virtual_tokens=10, decoupled=False))
    >>> masses = prefix_attention_mass(model, input_ids=torch.tensor([[5, 6, 7]]))
    >>> {name: tuple(mass.shape) for name, mass in masses.items()}
    {'model.layers.0.self_attn': (4,), 'model.layers.1.self_attn': (4,)}

    ```
    """
    if inputs.get("adapter_names") is not None:
        raise ValueError(
            "`adapter_names` gives the rows adapters of their own, and a mean over such rows means nothing. Measure the "
            "rows of each adapter in a call of their own, with that adapter active."
        )
    base = base_of(model)
    layers = {name: layer for name, layer in prefix_layers(base) if _active(layer, adapter_name)}
    if not layers or any(layer.disable_adapters for layer in layers.values()):
        wanted = "PREFIX_PLUS adapter" if adapter_name is None else f"PREFIX_PLUS adapter named {adapter_name!r}"
        raise ValueError(
            f"The model has no active {wanted}. Load one, or activate it by `set_adapter`, and call again."
        )
    for name, layer in layers.items():
        decoupled = [each for each in _active(layer, adapter_name) if layer.is_decoupled[each]]
        if decoupled:
            raise ValueError(
                f"Adapter {decoupled[0]!r} is decoupled: its prefix in {name} has no part in a softmax, and so no share of the "
                "attention. Name another adapter."
            )
    real_queries = RealQueries(base, inputs)
    measures = {name: _Measure(name, layer, adapter_name, real_queries) for name, layer in layers.items()}
    interface: dict[nn.Module, Callable[..., Any]] = {}
    inline: dict[nn.Module, Callable[..., Any]] = {}
    for name, layer in layers.items():
        observe = measures[name].observe
        if calls_attention_interface(layer.attention):
            interface[layer.attention] = partial(observed_attention, observe)
        else:
            inline[layer.attention] = partial(attend_inline, observe=observe)
    with evaluating(model), watching(interface, inline):
        model(**inputs)
    return {name: measure.mean() for name, measure in measures.items() if measure.was_reached}


def _active(layer: PrefixPlusLayer, adapter_name: str | None) -> list[str]:
    """The adapters that take part in a layer's forward, in order; only the named one, if one is named."""
    active = [name for name in dict.fromkeys(layer.active_adapters) if name in layer.prefix_plus_encoder]
    return [name for name in active if adapter_name in (None, name)]


class _Measure:
    """
    The mass of one attention module, over all the times that a forward calls it.

    Args:
        name (`str`): The module's name.
        layer (`PrefixPlusLayer`): Its layer.
        adapter_name (`str`, *optional*): The adapter, or all the active ones.
        real_queries (`RealQueries`): Which queries count.
    """

    @torch.no_grad()
    def __init__(self, name: str, layer: PrefixPlusLayer, adapter_name: str | None, real_queries: RealQueries) -> None:
        self.name = name
        self.real_queries = real_queries
        self.was_reached = False
        joined = [each for each in _active(layer, None) if layer.is_joint(each)]
        wanted = _active(layer, adapter_name)
        self._lengths = [layer.prefix_key_value(each)[0].shape[1] for each in joined]
        self._is_wanted = [each in wanted for each in joined]
        gates = [gate.tanh().abs().cpu() for each in wanted if (gate := layer.prefix_plus_gate(each)) is not None]
        self._of_gated: Any = sum(gates)
        self._sum: Any = 0.0
        self._count: Any = 0

    def observe(self, probabilities: torch.Tensor | None) -> None:
        """Take in the prefix's probabilities, (batch, query_heads, tokens, prefix_tokens), of one call."""
        self.was_reached = True
        if probabilities is None or not any(self._is_wanted):
            return
        parts = probabilities.double().split(self._lengths, dim=-1)
        wanted = [part.sum(dim=-1) for part, is_wanted in zip(parts, self._is_wanted, strict=True) if is_wanted]
        mass = torch.stack(wanted).sum(dim=0)
        is_real = self.real_queries.of_module(self.name, *mass.shape[::2]).to(mass.device)
        self._sum = self._sum + mass.masked_fill(~is_real[:, None], 0.0).sum(dim=(0, 2)).cpu()
        self._count += int(is_real.sum())
        self._dtype = torch.promote_types(probabilities.dtype, torch.float32)

    def mean(self) -> torch.Tensor:
        """The mass of each query head, (query_heads,)."""
        if not any(self._is_wanted):
            return self._of_gated
        return (self._sum / self._count + self._of_gated).to(self._dtype)


class RealQueries:
    """
    Which queries of each attention module are not padding.

    Args:
        base (`nn.Module`): The base model.
        inputs (`dict`): Its inputs; read are `attention_mask` and `decoder_attention_mask`.

    Raises:
        ValueError: If a mask is not of two dimensions, or marks everything as padding.
    """

    def __init__(self, base: nn.Module, inputs: dict[str, Any]) -> None:
        self._base = base
        self._masks: dict[str, torch.Tensor] = {}
        for name in ("attention_mask", "decoder_attention_mask"):
            mask = inputs.get(name)
            if mask is None:
                continue
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
                raise ValueError(
                    f"`{name}` must be of shape (batch, tokens), 1 for real tokens and 0 for padding, got {shape}: no other "
                    "form tells which queries are real."
                )
            if not mask.any():
                raise ValueError(f"`{name}`, of shape {shape}, marks every token as padding.")
            self._masks[name] = mask.bool()
        config: Any = getattr(base, "config", None)
        self._has_past = inputs.get("past_key_values") is not None
        self._encoder: set[nn.Module] | None = None
        if getattr(config, "is_encoder_decoder", False):
            self._encoder = set(base.get_encoder().modules())  # type: ignore[operator]

    def of_module(self, name: str, batch: int, tokens: int) -> torch.Tensor:
        """
        Return which queries of a module are real, (batch, tokens), bool. After a cache they are the last of the mask's
        positions.

        Raises:
            ValueError: If the mask does not fit them.
        """
        is_in_encoder = self._encoder is None or self._base.get_submodule(name) in self._encoder
        mask_name = "attention_mask" if is_in_encoder else "decoder_attention_mask"
        mask = self._masks.get(mask_name)
        if mask is None or mask.all() or not self._reads_text(name):
            return torch.ones(batch, tokens, dtype=torch.bool)
        is_longer = mask.shape[1] > tokens and self._has_past and (self._encoder is None or not is_in_encoder)
        if mask.shape[0] != batch or not (mask.shape[1] == tokens or is_longer):
            raise ValueError(
                f"`{mask_name}` has shape {tuple(mask.shape)}, but {name} has {batch} rows of {tokens} queries, so which of "
                "them are padding cannot be told. Measure on rows without padding."
            )
        is_real = mask[:, mask.shape[1] - tokens :]
        if not is_real.any():
            raise ValueError(f"`{mask_name}` marks all {tokens} queries of {name} as padding.")
        return is_real

    def _reads_text(self, name: str) -> bool:
        """Whether the innermost transformers model around a module takes tokens."""
        parents = [".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 1)]
        models = [module for module in map(self._base.get_submodule, parents) if isinstance(module, PreTrainedModel)]
        return not models or models[-1].main_input_name == "input_ids"
