"""The attention function that a module with a prefix calls: which way of computing it is taken, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .config_view import model_config
from .fused import fused_attention
from .kernels import find_kernel
from .prefix import Prefix
from .reference import (
    AttentionFunction,
    AttentionOutput,
    concatenated_attention,
    finite_additive,
    gated_attention,
    is_causal_call,
)


class MaskConvention(NamedTuple):
    """How an attention implementation reads its mask."""

    none_is_causal: bool
    """A missing mask means causal attention where the module is causal; otherwise it means that all is seen."""


MASK_CONVENTIONS = {
    "eager": MaskConvention(none_is_causal=False),
    "sdpa": MaskConvention(none_is_causal=True),
}
"""The implementations to whose keys and mask a prefix can be added."""


def check_implementation(name: str | None) -> None:
    """
    Raise unless a prefix can be added to this attention implementation.

    Raises:
        ValueError: If the implementation is not one of `MASK_CONVENTIONS`.
    """
    if name not in MASK_CONVENTIONS:
        raise ValueError(
            f"PREFIX_PLUS cannot add a prefix to the attention implementation {name!r}: how it reads its mask is not "
            f"known. Use one of {', '.join(map(repr, MASK_CONVENTIONS))}, for instance "
            "model.set_attn_implementation('sdpa')."
        )


def base_attention_function(module: nn.Module, eager: AttentionFunction) -> AttentionFunction:
    """Return the attention function that the module would call without a prefix; `eager` is its own file's."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(model_config(module)._attn_implementation, eager)


def eager_attention_function(module_class: type[nn.Module]) -> AttentionFunction:
    """Return the eager attention function that a class of attention modules falls back on: one of its own file."""
    forward = inspect.unwrap(module_class.forward)
    for name in forward.__code__.co_names:
        if name.endswith("eager_attention_forward"):
            return forward.__globals__[name]
    raise ValueError(f"{module_class.__name__}.forward names no eager attention function of its own module.")


class Call(NamedTuple):
    """One call of an attention function."""

    implementation: str
    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    kwargs: dict[str, Any]


FUSED_EXCLUSIONS: dict[str, Callable[[Call], bool]] = {
    "another implementation than sdpa": lambda call: call.implementation != "sdpa",
    "attention weights are asked for": lambda call: bool(call.kwargs.get("output_attentions")),
    "attention dropout": lambda call: call.kwargs.get("dropout", 0.0) > 0.0,
    "a relative position bias": lambda call: call.kwargs.get("position_bias") is not None,
    "soft-capped scores": lambda call: call.kwargs.get("softcap") is not None,
    "attention sinks": lambda call: call.kwargs.get("s_aux") is not None,
    "a paged cache": lambda call: call.kwargs.get("cache") is not None,
    "a learned mask": lambda call: call.mask is not None and call.mask.requires_grad,
    "a mask that is not (batch, heads, tokens, kv_tokens)": lambda call: (
        call.mask is not None
        and (call.mask.dim() != 4 or call.mask.shape[2:] != (call.query.shape[2], call.key.shape[2]))
    ),
    "queries broadcast over the keys' batch": lambda call: call.query.shape[0] != call.key.shape[0],
    "tracing with torch.jit": lambda call: torch.jit.is_tracing(),
}
"""When the fused way does not compute the same, by the reason: the concatenating one is taken then."""


def prefix_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """
    The attention function registered with transformers: attention with the prefixes of the module's active adapters.

    Without an active prefix it hands on to the implementation that the model's own config names, and that is all it
    does. With one, the fused way is taken wherever it computes the same (see `FUSED_EXCLUSIONS`), and the concatenating
    way, through that implementation, otherwise.

    Args:
        module: An attention module that carries a [`PrefixPlusLayer`].
        query: Shape (batch, query_heads, tokens, key_dim).
        key: Shape (batch, kv_heads, kv_tokens, key_dim).
        value: Shape (batch, kv_heads, kv_tokens, value_dim).
        attention_mask: As the implementation expects it.
        kwargs: As the implementation expects them.

    Returns:
        The output, (batch, tokens, query_heads, value_dim), and the attention weights, (batch, query_heads, tokens,
        prefix_tokens + kv_tokens), where the implementation returns them.
    """
    attend = base_attention_function(module, module.prefix_plus.eager_attention)
    prefix, gated_prefixes = module.prefix_plus(key, value)
    if prefix is None:
        output, weights = attend(module, query, key, value, attention_mask, **kwargs)
    else:
        implementation = model_config(module)._attn_implementation
        check_implementation(implementation)
        call = Call(implementation, query, key, attention_mask, kwargs)
        fused = None
        if not any(excludes(call) for excludes in FUSED_EXCLUSIONS.values()):
            fused = _fused_sdpa(module, query, key, value, attention_mask, prefix, kwargs)
        if fused is not None:
            output, weights = fused, None
        else:
            none_is_causal = MASK_CONVENTIONS[implementation].none_is_causal
            output, weights = concatenated_attention(
                attend, none_is_causal, module, query, key, value, attention_mask, prefix, **kwargs
            )
    for gated in gated_prefixes:
        output = output + gated_attention(query, gated, kwargs.get("scaling")).reshape(output.shape)
    return output, weights


def _fused_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    prefix: Prefix,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """Compute what transformers' sdpa computes on the concatenated keys and values, or return `None` without a kernel."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    is_causal = mask is None and query.shape[2] > 1 and is_causal_call(module, kwargs.get("is_causal"))
    if is_causal and key.shape[2] > query.shape[2]:
        # the first pass over an empty static cache: its unused rest comes after the last query
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    kernel = find_kernel(query, key, value, mask, is_causal)
    if kernel is None:
        return None
    scale = kwargs.get("scaling")
    return fused_attention(
        kernel,
        query,
        key,
        value,
        None if mask is None else finite_additive(mask, query.dtype),
        is_causal,
        query.shape[-1] ** -0.5 if scale is None else scale,
        prefix.to(key, value),
    )
