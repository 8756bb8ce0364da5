"""The stock attention kernels that also return their log-sum-exp, and when each can be used."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F


aten = torch.ops.aten

KernelState = tuple[torch.Tensor, ...]
"""Further tensors that a kernel's backward wants of its forward."""

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class KernelInputs(NamedTuple):
    """
    What an attention kernel is called with.

    Attributes:
        query (`torch.Tensor`): Shape (batch, query_heads, tokens, dim).
        key (`torch.Tensor`): Shape (batch, kv_heads, kv_tokens, dim).
        value (`torch.Tensor`): Shape (batch, kv_heads, kv_tokens, dim): as wide as the keys.
        mask (`torch.Tensor`, *optional*): Additive and finite, (1 or batch, 1 or query_heads, tokens, kv_tokens).
        is_causal (`bool`): Whether a query sees the key of its own index and those before it; only without a mask.
        scale (`float`): The factor on the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool
    scale: float


class AttentionKernel(Protocol):
    """Attention over the real keys and values, forward and backward."""

    def supports(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
        """Whether the kernel takes inputs like these, on its device."""
        ...

    def forward(self, inputs: KernelInputs) -> tuple[torch.Tensor, torch.Tensor, KernelState]:
        """Return the output, shaped as the queries, its log-sum-exp, (batch, query_heads, tokens), and the state."""
        ...

    def backward(
        self,
        inputs: KernelInputs,
        grad_output: torch.Tensor,
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

    def forward(self, inputs: KernelInputs) -> tuple[torch.Tensor, torch.Tensor, KernelState]:
        query, key, value, mask, is_causal, scale = inputs
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return output, lse, ()

    def backward(
        self,
        inputs: KernelInputs,
        grad_output: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
    ) -> Gradients:
        query, key, value, mask, is_causal, scale = inputs
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

    def forward(self, inputs: KernelInputs) -> tuple[torch.Tensor, torch.Tensor, KernelState]:
        query, key, value, _, is_causal, scale = inputs
        output, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )
        return output, lse, (seed, offset)

    def backward(
        self,
        inputs: KernelInputs,
        grad_output: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
    ) -> Gradients:
        query, key, value, _, is_causal, scale = inputs
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

    def forward(self, inputs: KernelInputs) -> tuple[torch.Tensor, torch.Tensor, KernelState]:
        query, key, value, bias = self._repeated(inputs)
        output, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, inputs.is_causal, scale=inputs.scale
        )
        return output, lse[..., : query.shape[2]], (seed, offset)

    def backward(
        self,
        inputs: KernelInputs,
        grad_output: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        state: KernelState,
    ) -> Gradients:
        query, key, value, bias = self._repeated(inputs)
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
            inputs.is_causal,
            scale=inputs.scale,
        )
        kv_heads = inputs.key.shape[1]
        return grad_query, *(grad.unflatten(1, (kv_heads, -1)).sum(dim=2) for grad in (grad_key, grad_value))

    @staticmethod
    def _repeated(inputs: KernelInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Repeat keys and values for all query heads, and the mask for all rows and heads, aligned to 16 bytes."""
        query, key, value, mask, _, _ = inputs
        groups = query.shape[1] // key.shape[1]
        if mask is not None:
            tokens = mask.shape[-1]
            mask = F.pad(mask, (0, -tokens % 16))[..., :tokens]
            mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], tokens)
        return query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), mask


KERNELS: dict[str, tuple[AttentionKernel, ...]] = {
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
