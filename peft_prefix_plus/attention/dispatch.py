"""The attention function that a module with a prefix calls: which way of computing it is taken, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .added import added_attention
from .call import AttentionFunction, AttentionOutput
from .concatenated import concatenated_attention, concatenated_flash_attention
from .config_view import model_config
from .fused import fused_attention
from .masks import FlashMask, dense_flex_mask, finite_additive, is_causal_call
from .prefix import Prefix
from .rotary import POSITIONS
from .selfcheck import find_kernel
from .watching import THREAD


def attention_family(name: str | None) -> str:
    """
    Return which of the families of attention implementations a name belongs to: their masks differ.

    - `"eager"`: an additive mask; without one, all is seen.
    - `"sdpa"`: a bool or additive mask; without one, a causal module's queries see the keys up to their own.
    - `"flash"`: a 2-D mask of padding; the rest is derived from lengths (see [`FlashMask`]).
    - `"flex"`: a block mask.

    Raises:
        ValueError: If the name belongs to none: a prefix cannot be added to a mask that cannot be read.
    """
    name = (name or "").removeprefix("paged|")
    if name in ("eager", "sdpa"):
        return name
    if name == "flex_attention":
        return "flex"
    if is_flash_attention_requested(requested_attention_implementation=name):
        return "flash"
    raise ValueError(
        f"PREFIX_PLUS cannot add a prefix to the attention implementation {name!r}: how it reads its mask is not known. "
        "Use 'sdpa', 'eager', 'flex_attention' or a flash attention, for instance model.set_attn_implementation('sdpa')."
    )


class _WithModelConfig:
    """An attention module as the base model has it: with the model's own config."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.config = model_config(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def attend_as_base(
    module: Any, *args: Any, implementation: str | None, eager: AttentionFunction, **kwargs: Any
) -> AttentionOutput:
    """Call an attention implementation as the base model would; `eager` is the one of the module's own file."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)  # type: ignore[arg-type]
    if implementation is not None and is_flash_attention_requested(requested_attention_implementation=implementation):
        module = _WithModelConfig(module)  # flash attention looks its kernel up by the name in the config
    return function(module, *args, **kwargs)


def eager_attention_function(module_class: type[nn.Module]) -> AttentionFunction:
    """
    Return the eager attention function that a class of attention modules falls back on: one of its own file.

    A few have none, and run by the functions that transformers registers only; theirs raises a `ValueError`.
    """
    forward = inspect.unwrap(module_class.forward)
    for name in forward.__code__.co_names:
        if name.endswith("eager_attention_forward"):
            return forward.__globals__[name]
    return partial(_no_eager_attention, module_class.__name__)


def _no_eager_attention(name: str, *args: Any, **kwargs: Any) -> AttentionOutput:
    raise ValueError(f'{name} has no eager attention. Load the model with attn_implementation="sdpa".')


is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
"""Whether `torch.export` runs, and with it `torch.onnx.export`; torch 2.6 cannot tell."""

EXCLUDING_ARGUMENTS = {
    "output_attentions": "attention weights are asked for",
    "dropout": "attention dropout",
    "position_bias": "a relative position bias",
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
}
"""Arguments of a call which, unless they are None, False or 0, change what the fused way does not compute."""


def why_concatenate(
    implementation: str,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    prefix: Prefix,
    kwargs: dict[str, Any],
) -> str | None:
    """Return why the fused way would not compute the same, so that the concatenating one is taken, or `None`."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func, which kernels called by hand know nothing of"
    if implementation != "sdpa":
        return "another implementation than sdpa"
    if is_exporting():
        return "export to where torch's private kernels may not be"
    if prefix.reads == "both":
        return "prefixes for rotated and for unrotated queries"
    for name, value in kwargs.items():
        if name in EXCLUDING_ARGUMENTS and not (value is None or (isinstance(value, (int, float)) and value == 0)):
            return EXCLUDING_ARGUMENTS[name]
    if mask is not None and mask.requires_grad:
        return "a learned mask"
    if mask is not None and (mask.dim() != 4 or mask.shape[2:] != (query.shape[2], key.shape[2])):
        return "a mask that is not (batch, heads, tokens, kv_tokens)"
    if isinstance(query.shape[0], torch.Tensor):
        return "tracing with torch.jit"
    return "queries broadcast over the keys' batch" if query.shape[0] != key.shape[0] else None


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

    Where this thread watches the module, the watcher's function runs instead (see [`watching`]).

    Without an active prefix it hands on to the implementation that the model's own config names, and that is all it
    does. With one, the fused way is taken wherever it computes the same (see [`why_concatenate`]), and the concatenating
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
    # In decoding this runs for every token and layer. `module.prefix_plus` is a search in Python that ends in `_modules`, and
    # `layer(key, value)` looks for hooks first: both take as long as one of the operations below.
    watchers = THREAD.interface
    if watchers is not None and module in watchers:
        return watchers[module](module, query, key, value, attention_mask, **kwargs)
    layer = module._modules["prefix_plus"]
    positions = kwargs.pop(POSITIONS, None)
    implementation, eager = model_config(module)._attn_implementation, layer.eager_attention
    prefix, added_prefixes = layer.forward(key, value)
    prefix_query = (
        query if prefix is None or prefix.reads == "rotated" else layer.queries(query, prefix.reads, positions)
    )
    if prefix is None:
        output, weights = attend_as_base(
            module, query, key, value, attention_mask, implementation=implementation, eager=eager, **kwargs
        )
    elif implementation == "sdpa" and "cache" not in kwargs:
        output, weights = _merge_or_concatenate(
            implementation, eager, module, query, key, value, attention_mask, prefix, prefix_query, kwargs
        )
    else:
        output, weights = _attend_with_prefix(
            implementation, eager, module, query, key, value, attention_mask, prefix, prefix_query, kwargs
        )
    for added in added_prefixes:
        added_query = layer.queries(query, added.reads, positions)
        output = output + added_attention(added_query, added, kwargs.get("scaling")).reshape(output.shape)
    return output, weights


def _attend_with_prefix(
    implementation: str,
    eager: AttentionFunction,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    prefix: Prefix,
    prefix_query: torch.Tensor,
    kwargs: dict[str, Any],
) -> AttentionOutput:
    family = attention_family(implementation)
    cache = kwargs.pop("cache", None)
    if cache is not None:
        # a paged cache (continuous batching) is updated in here; the mask is already that of all its keys
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        implementation = implementation.removeprefix("paged|")
    if family == "flash":
        if mask is not None and mask.shape[-1] < key.shape[2]:
            key, value = (
                key[:, :, : mask.shape[-1]],
                value[:, :, : mask.shape[-1]],
            )  # the unused rest of a static cache
        flash_mask = FlashMask(query, key, is_causal_call(module, kwargs.get("is_causal")), mask, kwargs)
        if prefix.reads == "rotated" and flash_mask.allows_concatenation(prefix.key.shape[1]):
            attend = partial(attend_as_base, implementation=implementation, eager=eager)
            return concatenated_flash_attention(attend, module, query, key, value, mask, prefix, **kwargs)
        mask = None if flash_mask.is_implied() and not _is_special(kwargs) else flash_mask.dense()
    elif family == "flex":
        mask = dense_flex_mask(mask, query, key)
    if family in ("flash", "flex"):
        # written out, the mask is one that sdpa reads; soft-capping and sinks are what only eager attention has besides
        implementation = family = "eager" if _is_special(kwargs) else "sdpa"
        if implementation == "eager" and mask is not None:
            mask = finite_additive(mask, query.dtype)
    return _merge_or_concatenate(implementation, eager, module, query, key, value, mask, prefix, prefix_query, kwargs)


def _is_special(kwargs: dict[str, Any]) -> bool:
    """Whether a call has soft-capping or sinks, which of the implementations without kernels of their own only eager has."""
    return kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None


def _merge_or_concatenate(
    implementation: str,
    eager: AttentionFunction,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    prefix: Prefix,
    prefix_query: torch.Tensor,
    kwargs: dict[str, Any],
) -> AttentionOutput:
    """Attend, the prefix being that of eager attention or sdpa, by whichever way computes it."""
    if why_concatenate(implementation, query, key, mask, prefix, kwargs) is None:
        output = _fused_sdpa(module, query, key, value, mask, prefix, prefix_query, kwargs)
        if output is not None:
            return output, None
    attend = partial(attend_as_base, implementation=implementation, eager=eager)
    none_is_causal = implementation == "sdpa"
    return concatenated_attention(
        attend, none_is_causal, module, query, key, value, mask, prefix, prefix_query, **kwargs
    )


def _fused_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    prefix: Prefix,
    prefix_query: torch.Tensor,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """Compute what transformers' sdpa computes on the concatenated keys and values, or return `None` without a kernel."""
    # `query.device.type` makes its string anew each time, which takes longer than an operation on a token's tensors
    device = "cpu" if query.is_cpu else query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        is_same = prefix_query is query
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        prefix_query = query if is_same else prefix_query.to(dtype)
    is_causal = mask is None and query.shape[2] > 1 and is_causal_call(module, kwargs.get("is_causal"))
    if is_causal and key.shape[2] > query.shape[2]:
        # the first pass over an empty static cache: its unused rest comes after the last query
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    # one kernel serves both parts, and so must take the masks of both
    kernel = find_kernel(device, query, key, value, prefix.mask if mask is None else mask, is_causal)
    if kernel is None:
        return None
    if mask is not None:
        mask = finite_additive(mask, query.dtype)
    if prefix.key.dtype != key.dtype or prefix.value.dtype != value.dtype:
        prefix = prefix.to(key, value)
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return fused_attention(kernel, query, key, value, mask, is_causal, scale, prefix, prefix_query)
