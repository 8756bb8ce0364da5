"""The attention function that a module with a prefix calls: it chooses the way to compute attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .added import add_attention
from .base import attend_as_base, attention_family
from .call import AttentionCall, AttentionOutput
from .concatenated import concatenated_attention, concatenated_flash_attention
from .config_view import model_config
from .fused import fused_attention
from .holder import PrefixHolder, holder_of
from .masks import FlashMask, dense_flex_mask, finite_additive, is_causal_call
from .prefix import Prefix
from .rotary import POSITIONS, PositionEmbeddings
from .selfcheck import find_kernel
from .watching import THREAD


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


def why_concatenate(call: AttentionCall) -> str | None:
    """Return why the fused way would give a different result, so that concatenation is needed, or `None`."""
    implementation, _, _, query, key, _, mask, prefix, _, kwargs = call
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

    Without an active prefix it only calls the implementation that the model's own config names. With one, it takes the
    fused way wherever that gives the same result (see [`why_concatenate`]), and otherwise concatenates and calls that
    implementation.

    Args:
        module: An attention module with a [`PrefixHolder`].
        query: Shape (batch, query_heads, tokens, key_dim).
        key: Shape (batch, kv_heads, kv_tokens, key_dim).
        value: Shape (batch, kv_heads, kv_tokens, value_dim).
        attention_mask: As the implementation expects it.
        kwargs: As the implementation expects them.

    Returns:
        The output, (batch, tokens, query_heads, value_dim), and the attention weights, (batch, query_heads, tokens,
        prefix_tokens + kv_tokens), where the implementation returns them.
    """
    watchers = THREAD.interface
    if watchers is not None and module in watchers:
        return watchers[module](module, query, key, value, attention_mask, **kwargs)
    # In decoding this runs for every token and layer; `holder(key, value)` would look for hooks first.
    holder = holder_of(module)
    positions = kwargs.pop(POSITIONS, None)
    implementation, eager = model_config(module)._attn_implementation, holder.eager_attention
    prefix, added_prefixes = holder.forward(key, value)
    if prefix is None:
        output, weights = attend_as_base(
            module, query, key, value, attention_mask, implementation=implementation, eager=eager, **kwargs
        )
    else:
        prefix, prefix_query = _met(holder, prefix, query, positions)
        call = AttentionCall(
            implementation, eager, module, query, key, value, attention_mask, prefix, prefix_query, kwargs
        )
        is_plain = implementation == "sdpa" and "cache" not in kwargs
        output, weights = _merge_or_concatenate(call) if is_plain else _attend_with_prefix(call)
    for added in added_prefixes:
        added, added_query = _met(holder, added, query, positions)
        output = add_attention(output, added_query, added, kwargs.get("scaling"))
    return output, weights


def _met(
    holder: PrefixHolder, prefix: Prefix, query: torch.Tensor, positions: PositionEmbeddings | None
) -> tuple[Prefix, torch.Tensor]:
    """Return a prefix, or the prefix turned to the queries' position, and the queries that it reads."""
    if prefix.reads == "rotated":
        return prefix, query
    if prefix.turned is not None and positions is not None and query.shape[2] == 1:
        turned = prefix.turned(positions, query.shape[0])
        if turned is not None:
            return turned, query
    return prefix, holder.queries(query, prefix.reads, positions)


def _attend_with_prefix(call: AttentionCall) -> AttentionOutput:
    """Attend with an implementation other than sdpa, or with a paged cache."""
    implementation, eager, module, query, key, value, mask, prefix, _, kwargs = call
    family = attention_family(implementation)
    cache = kwargs.pop("cache", None)
    if cache is not None:
        # a paged cache (continuous batching) is updated in here; the mask is already that of all its keys
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        implementation = implementation.removeprefix("paged|")
    if family == "flash":
        if mask is not None and mask.shape[-1] < key.shape[2]:
            # the unused rest of a static cache
            key, value = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
        flash_mask = FlashMask(query, key, is_causal_call(module, kwargs.get("is_causal")), mask, kwargs)
        if prefix.reads == "rotated" and flash_mask.allows_concatenation(prefix.length):
            attend = partial(attend_as_base, implementation=implementation, eager=eager)
            return concatenated_flash_attention(attend, call._replace(key=key, value=value))
        mask = None if flash_mask.is_implied() and not _is_special(kwargs) else flash_mask.dense()
    elif family == "flex":
        mask = dense_flex_mask(mask, query, key)
    if family in ("flash", "flex"):
        # written out, the mask is one that sdpa reads; soft-capping and sinks are what only eager attention has besides
        implementation = "eager" if _is_special(kwargs) else "sdpa"
        if implementation == "eager" and mask is not None:
            mask = finite_additive(mask, query.dtype)
    return _merge_or_concatenate(call._replace(implementation=implementation, key=key, value=value, mask=mask))


def _is_special(kwargs: dict[str, Any]) -> bool:
    """Whether a call has soft-capping or sinks, which eager attention supports and sdpa does not."""
    return kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None


def _merge_or_concatenate(call: AttentionCall) -> AttentionOutput:
    """Attend in the fused or the concatenated way, for eager attention or sdpa."""
    if why_concatenate(call) is None:
        # `query.device.type` makes its string anew each time, which takes longer than an operation on a token's tensors
        device = "cpu" if call.query.is_cpu else call.query.device.type
        read = _as_sdpa_reads(call, device)
        # one kernel serves both parts, and so must take the masks of both
        mask = read.prefix.mask if read.mask is None else read.mask
        kernel = find_kernel(device, read.query, read.key, read.value, mask, read.is_causal)
        if kernel is not None:
            return fused_attention(kernel, read), None
    return concatenated_attention(partial(attend_as_base, implementation=call.implementation, eager=call.eager), call)


def _as_sdpa_reads(call: AttentionCall, device: str) -> AttentionCall:
    """Bring a call to what transformers' sdpa attention makes of it: one dtype, a finite mask, and no keys beyond a causal one's end."""
    _, _, _, query, key, value, mask, prefix, prefix_query, _ = call
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        own_query = query.to(dtype)
        prefix_query = own_query if prefix_query is query else prefix_query.to(dtype)
        call = call._replace(query=own_query, key=key.to(dtype), value=value.to(dtype), prefix_query=prefix_query)
    if key.shape[2] > query.shape[2] and call.is_causal:
        # the first pass over an empty static cache: its unused rest comes after the last query
        tokens = query.shape[2]
        call = call._replace(key=call.key[:, :, :tokens], value=call.value[:, :, :tokens])
    if mask is not None:
        call = call._replace(mask=finite_additive(mask, call.query.dtype))
    if prefix.key.dtype != call.key.dtype or prefix.value.dtype != call.value.dtype:
        call = call._replace(prefix=prefix.to(call.key, call.value))
    return call
