"""Attention with a prefix, without a mask for it and without copying keys and values.

Attention over [P ; X] is the mix of attention over P and over X, weighted by their log-sum-exps:

    lse = logaddexp(lse_P, lse_X)        out = exp(lse_P - lse) · out_P + exp(lse_X - lse) · out_X

The X part is the stock kernel on the keys and values as they are. The P part is two small matrix products in training,
and a second call of the kernel in inference, where single queries matter most. Backward calls the kernel's own
backward with the merged out and lse. That is exact: with p = exp(s - lse), the softmax over all of [P ; X], the
gradient of the scores is p · (dp - rowsum(dout · out)), and the kernel computes exactly this for its own scores.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .call import AttentionCall
from .kernels import AttentionKernel
from .masks import finite_additive


class _KernelCall(NamedTuple):
    """The arguments of the kernel that are not differentiated."""

    kernel: AttentionKernel
    mask: torch.Tensor | None
    is_causal: bool
    scale: float
    prefix_mask: torch.Tensor | None


def fused_attention(kernel: AttentionKernel, call: AttentionCall) -> torch.Tensor:
    """
    softmax(s · Q [P_K ; K]ᵀ + mask) [P_V ; V], by merging the kernel's attention over K, V with that over the prefix.

    Args:
        kernel: The attention kernel for the real keys and values.
        call: The call, all of one dtype, value_dim ≤ key_dim. Its mask is additive and finite, (1 or batch, 1 or query_heads,
            tokens, kv_tokens), or `None`; its prefix reads one kind of queries.

    Returns:
        Shape (batch, tokens, query_heads, value_dim), contiguous.
    """
    _, _, _, query, key, value, mask, prefix, prefix_query, _ = call
    inputs = (query, key, value, prefix.key, prefix.value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, prefix_query)):
        own_query = None if prefix_query is query else prefix_query
        how = _KernelCall(kernel, mask, call.is_causal, call.scale, prefix.mask)
        output = _FusedAttention.apply(*inputs, own_query, how)  # type: ignore[no-untyped-call]
    else:
        output = _infer(kernel, call)
    return output.transpose(1, 2).contiguous()


def _infer(kernel: AttentionKernel, call: AttentionCall) -> torch.Tensor:
    """Merge two calls of the kernel: for a single query, that is faster than matrix products."""
    _, _, _, query, key, value, mask, prefix, prefix_query, _ = call
    prefix_key, prefix_value, prefix_mask = prefix.for_rows(query.shape[0])
    width = value.shape[-1]
    is_narrow = width != key.shape[-1]
    if is_narrow:
        value, prefix_value = _widened(value, key), _widened(prefix_value, prefix_key)
    if prefix_mask is not None:
        prefix_mask = finite_additive(prefix_mask.expand(-1, -1, query.shape[2], -1), query.dtype)
    scale = call.scale
    # the kernels are no operations that autocast knows of
    output, lse, _ = kernel.forward(query, key, value, mask, call.is_causal, scale)
    attended, prefix_lse, _ = kernel.forward(prefix_query, prefix_key, prefix_value, prefix_mask, False, scale)
    weight = prefix_lse.sub_(lse).sigmoid_().unsqueeze(-1)
    output = output.lerp_(attended, _cast(weight, output.dtype))
    return output[..., :width] if is_narrow else output


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prefix_key: torch.Tensor,
        prefix_value: torch.Tensor,
        own_query: torch.Tensor | None,
        call: _KernelCall,
    ) -> torch.Tensor:
        prefix_query = query if own_query is None else own_query
        of_rows = prefix_key.dim() == 4
        head_key, head_value = _per_query_head(prefix_key, query), _per_query_head(prefix_value, query)
        with _without_autocast(query.device.type):
            output, lse, state = call.kernel.forward(*_real_inputs(query, key, value, call))
            output = _narrowed(output, value)
            # the attention over X takes part in the softmax over P as one more position, with its log-sum-exp for a score
            scores = torch.cat(
                [_prefix_scores(prefix_query, head_key, call, of_rows), _fold(lse.unsqueeze(-1), of_rows)], dim=-1
            )
            lse = scores.logsumexp(dim=-1, keepdim=True)
            weights = scores.softmax(dim=-1)
            attended = _unfold(torch.bmm(weights[..., :-1], head_value), query, of_rows)
            own = _unfold(weights[..., -1:], query, of_rows)
            output.mul_(_cast(own, output.dtype)).add_(_cast(attended, output.dtype))
        ctx.save_for_backward(
            query, key, value, prefix_key, prefix_value, own_query, call.mask, call.prefix_mask, output, lse, *state
        )
        ctx.call = call._replace(mask=None, prefix_mask=None)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, prefix_key, prefix_value, own_query, mask, prefix_mask, output, lse, *state = (
            ctx.saved_tensors
        )
        prefix_query = query if own_query is None else own_query
        call = ctx.call._replace(mask=mask, prefix_mask=prefix_mask)
        needs_query, needs_key, needs_value, needs_prefix_key, needs_prefix_value, needs_own_query, _ = (
            ctx.needs_input_grad
        )
        grad_query: Any = None
        grad_own_query: Any = None
        grad_key = grad_value = grad_prefix_key = grad_prefix_value = None
        of_rows = prefix_key.dim() == 4
        head_key, head_value = _per_query_head(prefix_key, query), _per_query_head(prefix_value, query)
        with _without_autocast(query.device.type):
            if needs_query or needs_key or needs_value:
                grad_query, grad_key, grad_value = call.kernel.backward(
                    _widened(grad_output, key),
                    *_real_inputs(query, key, value, call),
                    _widened(output, key),
                    _unfold(lse, query, of_rows).squeeze(-1),
                    tuple(state),
                )
                grad_value = _narrowed(grad_value, value)
            weights = _prefix_scores(prefix_query, head_key, call, of_rows).sub_(lse).exp_()
            grad_rows = _cast(_fold(grad_output, of_rows), weights.dtype)
            if needs_prefix_value:
                grad_prefix_value = _reduce(weights, grad_rows, prefix_value)
            if needs_query or needs_own_query or needs_prefix_key:
                delta = (grad_rows * _cast(_fold(output, of_rows), weights.dtype)).sum(dim=-1, keepdim=True)
                grad_scores = (
                    torch.bmm(grad_rows, head_value.transpose(1, 2)).sub_(delta).mul_(weights).mul_(call.scale)
                )
                if needs_own_query or (needs_query and own_query is None):
                    added = _unfold(torch.bmm(grad_scores, head_key), query, of_rows)
                    if own_query is None:
                        grad_query = grad_query + _cast(added, grad_query.dtype)
                    else:
                        grad_own_query = _cast(added, own_query.dtype)
                if needs_prefix_key:
                    grad_prefix_key = _reduce(
                        grad_scores, _cast(_fold(prefix_query, of_rows), weights.dtype), prefix_key
                    )
        return grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, grad_own_query, None


def _per_query_head(prefix: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """
    Repeat keys or values ((batch,) kv_heads, prefix_tokens, dim) for each query head of a group, in float32 at least:
    (query_heads, prefix_tokens, dim) or, if rows have their own, (batch · query_heads, prefix_tokens, dim).

    They are small. The queries are not, so they are not copied.
    """
    groups = query.shape[1] // prefix.shape[-3]
    own = prefix.flatten(0, -3)
    repeated = own.unsqueeze(1).expand(-1, groups, -1, -1).flatten(0, 1)
    return _cast(repeated, torch.promote_types(prefix.dtype, torch.float32))


def _prefix_scores(query: torch.Tensor, head_key: torch.Tensor, call: _KernelCall, of_rows: bool) -> torch.Tensor:
    """s · Q P_Kᵀ, folded as in [`_fold`]."""
    scores = torch.bmm(_cast(_fold(query, of_rows), head_key.dtype), (head_key * call.scale).transpose(1, 2))
    if call.prefix_mask is not None:
        hidden = ~call.prefix_mask[:, None, None, :]
        _unfold(scores, query, of_rows).masked_fill_(hidden, torch.finfo(scores.dtype).min)
    return scores


def _reduce(weights: torch.Tensor, rows: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """weightsᵀ · rows, summed over the rows that read a prefix and the query heads of a group, shaped as the prefix."""
    summed = torch.bmm(weights.transpose(1, 2), rows)
    return summed.view(*prefix.shape[:-2], -1, *summed.shape[1:]).sum(dim=-3).to(prefix.dtype)


def _fold(tensor: torch.Tensor, of_rows: bool) -> torch.Tensor:
    """
    (batch, query_heads, tokens, dim) → (query_heads, batch · tokens, dim): all rows of a head read the same prefix. If each
    row of the batch has its own: → (batch · query_heads, tokens, dim).
    """
    if of_rows:
        return tensor.flatten(0, 1)
    return tensor.squeeze(0) if tensor.shape[0] == 1 else tensor.transpose(0, 1).flatten(1, 2)


def _unfold(tensor: torch.Tensor, query: torch.Tensor, of_rows: bool) -> torch.Tensor:
    """Undo [`_fold`]."""
    batch, heads, tokens, _ = query.shape
    if of_rows:
        return tensor.view(batch, heads, *tensor.shape[1:])
    return tensor.unsqueeze(0) if batch == 1 else tensor.reshape(heads, batch, tokens, -1).transpose(0, 1)


def _real_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _KernelCall) -> tuple[Any, ...]:
    """The kernel's inputs for the real tokens."""
    return query, key, _widened(value, key), call.mask, call.is_causal, call.scale


def _widened(value: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """
    Pad a tensor of the values' width with zeros to the keys' width: the kernels need both equal, and in latent
    attention they differ.
    """
    missing = key.shape[-1] - value.shape[-1]
    return F.pad(value, (0, missing)) if missing else value


def _narrowed(output: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Undo [`_widened`]."""
    return output[..., : value.shape[-1]] if output.shape[-1] > value.shape[-1] else output


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Compute in the dtypes that the tensors have."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
