"""
The stock attention kernels that also return their log-sum-exp, and when each can be used.

They are private operators of PyTorch, because none of the public ones works here (docs/method.md says why). So
selfcheck.py checks each before it is used.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F


aten = torch.ops.aten

KernelState = tuple[torch.Tensor, ...]
"""Further tensors that a kernel's backward wants of its forward."""

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AttentionKernel(Protocol):
    """
    Attention over the real keys and values, forward and backward.

    Queries are (batch, query_heads, tokens, dim), keys and values (batch, kv_heads, kv_tokens, dim), the values as wide as the
    keys. The mask is additive and finite, (1 or batch, 1 or query_heads, tokens, kv_tokens), or `None`. `is_causal` says
    whether a query sees the key of its own index and those before it; only without a mask. `scale` is the factor on the scores.

    Kernels have no state; all instances of a class are alike.
    """

    def is_offered(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether PyTorch has the kernel, forward and backward, for these heads on this device. Asked once for each kind."""
        ...

    def supports(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
        """Whether the kernel supports these inputs, if PyTorch has it. Asked at every call."""
        ...

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, KernelState]:
        """Return the output, shaped as the queries, its log-sum-exp, (batch, query_heads, tokens), and the state."""
        ...

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
    ) -> Gradients:
        """
        Return the gradients of queries, keys and values, given the output and the log-sum-exp of the whole softmax.
        """
        ...


class CpuFlashKernel:
    """PyTorch's flash attention for the CPU. It supports grouped-query heads and masks directly."""

    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    def is_offered(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        return True

    def supports(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
        return query.dtype in self.dtypes

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, KernelState]:
        # The binding in `torch` is cheaper to call than that in `torch.ops`, which decoding notices; backward has only the latter.
        output, lse = torch._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return output, lse, ()

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
    ) -> Gradients:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, lse, 0.0, is_causal, attn_mask=mask, scale=scale
        )


class CudaFlashKernel:
    """
    PyTorch's flash attention for CUDA and ROCm: half precision, no mask. It supports grouped-query heads directly.
    """

    dtypes = (torch.bfloat16, torch.float16)

    def is_offered(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, True)
        return torch.backends.cuda.can_use_flash_attention(params)

    def supports(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
        return (
            torch.backends.cuda.flash_sdp_enabled()
            and query.dtype in self.dtypes
            and mask is None
            and query.shape[-1] % 8 == 0
            and (not is_causal or query.shape[2] == key.shape[2])
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, KernelState]:
        output, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )
        return output, lse, (seed, offset)

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
    ) -> Gradients:
        sequences = (None, None, query.shape[2], key.shape[2])  # a dense batch has no cumulative lengths
        return aten._scaled_dot_product_flash_attention_backward(
            grad_output, query, key, value, output, lse.contiguous(), *sequences, 0.0, is_causal, *state, scale=scale
        )


class XpuFlashKernel(CudaFlashKernel):
    """PyTorch's flash attention for Intel's GPUs: the same operators, compiled for some widths of heads."""

    head_dims = (64, 96, 128, 192)

    def is_offered(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        names = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return query.shape[-1] in self.head_dims and all(has_kernel(f"aten::{name}", "XPU") for name in names)


class CudaEfficientKernel:
    """
    PyTorch's memory-efficient attention for CUDA and ROCm: also float32, and with a mask.

    It needs as many key heads as query heads, so grouped-query heads are repeated. For a single query, as in decoding,
    where keys and values are almost all of the data, the queries of a group take the place of tokens instead.
    """

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    lse_alignment = 1 if torch.version.hip else 32

    def is_offered(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        query, key, value, _ = self._per_head(query, key, value, None)
        params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
        return torch.backends.cuda.can_use_efficient_attention(params)

    def supports(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
        return (
            torch.backends.cuda.mem_efficient_sdp_enabled() and query.dtype in self.dtypes and query.shape[-1] % 8 == 0
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, KernelState]:
        rows, key, value, bias = self._per_head(query, key, value, mask)
        output, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            rows, key, value, bias, True, 0.0, is_causal, scale=scale
        )
        return output.reshape(query.shape), lse[..., : rows.shape[2]].reshape(query.shape[:3]), (seed, offset)

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
    ) -> Gradients:
        kv_heads = key.shape[1]
        rows, key, value, bias = self._per_head(query, key, value, mask)
        lse = lse.reshape(rows.shape[:3])
        lse = F.pad(lse, (0, -lse.shape[-1] % self.lse_alignment), value=float("inf")).contiguous()
        wanted = [True, True, True, False]
        grad_query, grad_key, grad_value, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_output.reshape(rows.shape),
            rows,
            key,
            value,
            bias,
            output.reshape(rows.shape),
            lse,
            *state,
            0.0,
            wanted,
            is_causal,
            scale=scale,
        )
        grad_key, grad_value = (grad.unflatten(1, (kv_heads, -1)).sum(dim=2) for grad in (grad_key, grad_value))
        return grad_query.reshape(query.shape), grad_key, grad_value

    @staticmethod
    def _per_head(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Bring the inputs to the same number of heads: that of the queries or, for a single query, that of the keys,
        (batch, kv_heads, groups, dim). The mask is repeated for all rows and heads, aligned to 16 bytes.
        """
        batch, heads, tokens, dim = query.shape
        kv_heads = key.shape[1]
        groups = heads // kv_heads
        if mask is not None:
            kv_tokens = mask.shape[-1]
            mask = F.pad(mask, (0, -kv_tokens % 16))[..., :kv_tokens].expand(batch, heads, tokens, kv_tokens)
        if groups == 1:
            return query, key, value, mask
        if tokens == 1:
            rows = query.reshape(batch, kv_heads, groups, dim)
            return rows, key, value, None if mask is None else mask.unflatten(1, (kv_heads, groups)).squeeze(3)
        return query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), mask


KERNELS: dict[str, tuple[AttentionKernel, ...]] = {
    "cpu": (CpuFlashKernel(),),
    "cuda": (CudaFlashKernel(), CudaEfficientKernel()),
    "xpu": (XpuFlashKernel(),),
}
"""By device, in order of preference. ROCm's devices are called cuda."""
