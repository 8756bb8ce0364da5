"""Attention with a prefix, without a mask for it and without copying keys and values.

Attention over [P ; X] is the mix of attention over P and over X, weighted by their log-sum-exps:

    lse = logaddexp(lse_P, lse_X)        out = exp(lse_P - lse) · out_P + exp(lse_X - lse) · out_X

The X part is the stock kernel on the keys and values as they are. The P part is two small matrix products. Backward calls
the kernel's own backward with the merged out and lse, which is exact: with p = exp(s - lse) the softmax over all of [P ; X],
the gradient of the scores is p · (dp - rowsum(dout · out)), and this is what the kernel computes for its part of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .kernels import AttentionKernel, KernelState
from .prefix import Prefix


class _Call(NamedTuple):
    """How the kernel is called: everything that is not differentiated."""

    kernel: AttentionKernel
    mask: torch.Tensor | None
    is_causal: bool
    scale: float


def fused_attention(
    kernel: AttentionKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    prefix: Prefix,
) -> torch.Tensor:
    """
    softmax(s · Q [P_K ; K]ᵀ + mask) [P_V ; V], by merging the kernel's attention over K, V with that over the prefix.

    Args:
        kernel: The attention kernel for the real keys and values.
        query: Shape (batch, query_heads, tokens, key_dim).
        key: Shape (batch, kv_heads, kv_tokens, key_dim).
        value: Shape (batch, kv_heads, kv_tokens, value_dim), value_dim ≤ key_dim.
        mask: Additive and finite, (1 or batch, 1 or query_heads, tokens, kv_tokens), or `None`.
        is_causal: Whether a query sees the key of its own index and those before it; only without a mask.
        scale: s.
        prefix: The prefix, without a gate, in the dtype of the keys and values.

    Returns:
        Shape (batch, tokens, query_heads, value_dim), contiguous.
    """
    value_dim, missing = value.shape[-1], key.shape[-1] - value.shape[-1]
    prefix_value = prefix.value
    if missing:
        # the kernels want values as wide as keys (latent attention has narrower ones)
        value, prefix_value = F.pad(value, (0, missing)), F.pad(prefix_value, (0, missing))
    call = _Call(kernel, mask, is_causal, scale)
    inputs = (query, key, value, prefix.key, prefix_value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        output = _FusedAttention.apply(*inputs, prefix.mask, call)
    else:
        output, *_ = _forward(*inputs, prefix.mask, call)
    return output[..., :value_dim].transpose(1, 2).contiguous()


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    prefix_mask: torch.Tensor | None,
    call: _Call,
) -> tuple[torch.Tensor, torch.Tensor, KernelState]:
    """Return the merged output, the logits of the merge, (batch, query_heads, tokens, prefix_tokens + 1), and the kernel's state."""
    with torch.autocast(query.device.type, enabled=False):
        output, lse, state = call.kernel.forward(query, key, value, call.mask, call.is_causal, call.scale)
        # the attention over X takes part in the softmax over P as one more position, whose score is its log-sum-exp
        logits = torch.cat([_prefix_scores(query, prefix_key, prefix_mask, call.scale), lse.unsqueeze(-1)], dim=-1)
        weights = logits.softmax(dim=-1)
        output = output * weights[..., -1:].to(output.dtype) + _attend(weights[..., :-1], prefix_value)
    return output, logits, state


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prefix_key: torch.Tensor,
        prefix_value: torch.Tensor,
        prefix_mask: torch.Tensor | None,
        call: _Call,
    ) -> torch.Tensor:
        output, logits, state = _forward(query, key, value, prefix_key, prefix_value, prefix_mask, call)
        lse = logits.logsumexp(dim=-1)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, prefix_mask, call.mask, output, lse, *state)
        ctx.call = call._replace(mask=None)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, prefix_key, prefix_value, prefix_mask, mask, output, lse, *state = ctx.saved_tensors
        kernel, _, is_causal, scale = ctx.call
        needs_query, needs_key, needs_value, needs_prefix_key, needs_prefix_value, *_ = ctx.needs_input_grad
        grad_query: Any = None
        grad_key = grad_value = grad_prefix_key = grad_prefix_value = None
        with torch.autocast(query.device.type, enabled=False):
            if needs_query or needs_key or needs_value:
                grad_query, grad_key, grad_value = kernel.backward(
                    grad_output, query, key, value, mask, output, lse, state, is_causal, scale
                )
            weights = _prefix_scores(query, prefix_key, prefix_mask, scale).sub_(lse.unsqueeze(-1)).exp_()
            if needs_prefix_value:
                grad_prefix_value = _reduce(weights, grad_output, prefix_value)
            if needs_query or needs_prefix_key:
                delta = (grad_output.to(lse.dtype) * output.to(lse.dtype)).sum(dim=-1, keepdim=True)
                grad_scores = _scores(grad_output, prefix_value).sub_(delta).mul_(weights)
                if needs_query:
                    grad_query = grad_query + _attend(grad_scores, prefix_key * scale)
                if needs_prefix_key:
                    grad_prefix_key = _reduce(grad_scores, query, prefix_key) * scale
        return grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, None, None


def _per_query_head(prefix: torch.Tensor, num_query_heads: int) -> torch.Tensor:
    """Repeat a prefix (1 or batch, kv_heads, prefix_tokens, dim) for each query head. It is small; the queries are not."""
    return prefix.repeat_interleave(num_query_heads // prefix.shape[1], dim=1)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scores(rows: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """rows · prefixᵀ: (batch, query_heads, tokens, prefix_tokens), in float32 at least."""
    dtype = _accumulation_dtype(rows.dtype)
    prefix = _per_query_head(prefix, rows.shape[1]).to(dtype)
    equation = "bhtd,hpd->bhtp" if prefix.shape[0] == 1 else "bhtd,bhpd->bhtp"
    return torch.einsum(equation, rows.to(dtype), prefix.squeeze(0) if prefix.shape[0] == 1 else prefix)


def _prefix_scores(
    query: torch.Tensor, prefix_key: torch.Tensor, prefix_mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    scores = _scores(query, prefix_key * scale)
    if prefix_mask is not None:
        scores.masked_fill_(~prefix_mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return scores


def _attend(weights: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """weights · prefix: (batch, query_heads, tokens, dim), in the prefix's dtype."""
    repeated = _per_query_head(prefix, weights.shape[1]).to(weights.dtype)
    if prefix.shape[0] == 1:
        return torch.einsum("bhtp,hpd->bhtd", weights, repeated.squeeze(0)).to(prefix.dtype)
    return torch.einsum("bhtp,bhpd->bhtd", weights, repeated).to(prefix.dtype)


def _reduce(weights: torch.Tensor, rows: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """weightsᵀ · rows, summed over tokens, over the query heads of a group and, for a shared prefix, over the batch."""
    equation = "bhtp,bhtd->hpd" if prefix.shape[0] == 1 else "bhtp,bhtd->bhpd"
    summed = torch.einsum(equation, weights, rows.to(weights.dtype))
    summed = summed.unsqueeze(0) if prefix.shape[0] == 1 else summed
    return summed.unflatten(1, (prefix.shape[1], -1)).sum(dim=2).to(prefix.dtype)
