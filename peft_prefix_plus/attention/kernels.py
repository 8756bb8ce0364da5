"""The stock attention kernels that also return their log-sum-exp, and when each can be used."""

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
    """

    def supports(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
        """Whether the kernel takes inputs like these, on its device."""
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
        """Return the gradients of queries, keys and values, given output and log-sum-exp of the whole softmax."""
        ...


class CpuFlashKernel:
    """PyTorch's flash attention for the CPU. It takes grouped-query heads and masks as they are."""

    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

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
    """PyTorch's flash attention for CUDA: half precision, no mask. It takes grouped-query heads as they are."""

    dtypes = (torch.bfloat16, torch.float16)
    max_head_dim = 256

    def supports(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
        return (
            torch.version.cuda is not None
            and torch.backends.cuda.flash_sdp_enabled()
            and query.dtype in self.dtypes
            and mask is None
            and query.shape[-1] % 8 == 0
            and query.shape[-1] <= self.max_head_dim
            and (not is_causal or query.shape[2] == key.shape[2])
            and torch.cuda.get_device_capability(query.device) >= (8, 0)
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


class CudaEfficientKernel:
    """PyTorch's memory-efficient attention for CUDA: also float32, and with a mask. Grouped-query heads are repeated."""

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    lse_alignment = 32

    def supports(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
        return (
            torch.version.cuda is not None
            and torch.backends.cuda.mem_efficient_sdp_enabled()
            and query.dtype in self.dtypes
            and query.shape[-1] % 8 == 0
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
        key, value, bias = self._repeated(query, key, value, mask)
        output, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, is_causal, scale=scale
        )
        return output, lse[..., : query.shape[2]], (seed, offset)

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
        key, value, bias = self._repeated(query, key, value, mask)
        lse = F.pad(lse, (0, -lse.shape[-1] % self.lse_alignment), value=float("inf")).contiguous()
        wanted = [True, True, True, False]
        grad_query, grad_key, grad_value, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_output,
            query,
            key,
            value,
            bias,
            output,
            lse,
            *state,
            0.0,
            wanted,
            is_causal,
            scale=scale,
        )
        return grad_query, *(grad.unflatten(1, (kv_heads, -1)).sum(dim=2) for grad in (grad_key, grad_value))

    @staticmethod
    def _repeated(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Repeat keys and values for all query heads, and the mask for all rows and heads, aligned to 16 bytes."""
        groups = query.shape[1] // key.shape[1]
        if mask is not None:
            tokens = mask.shape[-1]
            mask = F.pad(mask, (0, -tokens % 16))[..., :tokens]
            mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], tokens)
        return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), mask


KERNELS: dict[str, tuple[AttentionKernel, ...]] = {
    "cpu": (CpuFlashKernel(),),
    "cuda": (CudaFlashKernel(), CudaEfficientKernel()),
}
"""By device, in order of preference."""


def find_kernel(
    device: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
) -> AttentionKernel | None:
    """Return the first kernel that takes these inputs on a type of device, or `None`."""
    if value.shape[-1] > key.shape[-1] or not query.dtype == key.dtype == value.dtype:
        return None
    for kernel in KERNELS.get(device, ()):
        if kernel.supports(query, key, mask, is_causal):
            return kernel
    return None
