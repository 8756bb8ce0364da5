"""The stock attention kernels that also return their log-sum-exp, and when each can be used."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional as F


aten = torch.ops.aten

KernelState = tuple[torch.Tensor, ...]


class AttentionKernel(Protocol):
    """
    Attention over the real keys and values, forward and backward.

    Queries are (batch, query_heads, tokens, dim), keys and values (batch, kv_heads, kv_tokens, dim), log-sum-exps (batch,
    query_heads, tokens). Masks are additive and finite, (1 or batch, 1 or query_heads, tokens, kv_tokens).
    """

    def supports(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
        """Whether the kernel takes these inputs."""
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
        """Return the output, the log-sum-exp, and further tensors that backward wants."""
        ...

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of queries, keys and values, given the output and log-sum-exp of the whole softmax."""
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
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
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
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seed, offset = state
        return aten._scaled_dot_product_flash_attention_backward(
            grad_output,
            query,
            key,
            value,
            output,
            lse.contiguous(),
            None,  # the batch is dense: no cumulative sequence lengths
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            is_causal,
            seed,
            offset,
            scale=scale,
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
        groups = query.shape[1] // key.shape[1]
        output, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            self._aligned_bias(mask, query, key),
            True,
            0.0,
            is_causal,
            scale=scale,
        )
        return output, lse[..., : query.shape[2]], (seed, offset)

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seed, offset = state
        groups = query.shape[1] // key.shape[1]
        grad_query, grad_key, grad_value, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_output,
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            self._aligned_bias(mask, query, key),
            output,
            F.pad(lse, (0, -lse.shape[-1] % self.lse_alignment), value=float("inf")).contiguous(),
            seed,
            offset,
            0.0,
            [True, True, True, False],
            is_causal,
            scale=scale,
        )
        grad_key, grad_value = (
            grad.unflatten(1, (key.shape[1], groups)).sum(dim=2) for grad in (grad_key, grad_value)
        )
        return grad_query, grad_key, grad_value

    @staticmethod
    def _aligned_bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """Expand a mask to all rows and heads, its rows aligned in memory to 16 bytes, as the kernel wants them."""
        if mask is None:
            return None
        tokens = mask.shape[-1]
        padded = F.pad(mask, (0, -tokens % 16))[..., :tokens]
        return padded.expand(query.shape[0], query.shape[1], query.shape[2], tokens)


KERNELS: dict[str, tuple[Any, ...]] = {
    "cpu": (CpuFlashKernel(),),
    "cuda": (CudaFlashKernel(), CudaEfficientKernel()),
}
"""By device, in order of preference."""


def find_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
) -> AttentionKernel | None:
    """Return the first kernel that takes these inputs, or `None`."""
    if value.shape[-1] > key.shape[-1] or not query.dtype == key.dtype == value.dtype:
        return None
    for kernel in KERNELS.get(query.device.type, ()):
        if kernel.supports(query, key, mask, is_causal):
            return kernel
    return None
