"""The CUDA kernels against the same formula as the CPU's; run where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from test_attention import LENGTH, Attention, causal, formula, padded, tensors
from test_position_free import attention_over, drawn, free_formula

from peft_prefix_plus.attention import Prefix, dispatch, kernels


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = [
    (kernels.CudaFlashKernel, torch.bfloat16, False),
    (kernels.CudaFlashKernel, torch.float16, False),
    (kernels.CudaEfficientKernel, torch.bfloat16, False),
    (kernels.CudaEfficientKernel, torch.bfloat16, True),
    (kernels.CudaEfficientKernel, torch.float32, False),
    (kernels.CudaEfficientKernel, torch.float32, True),
]
# TF32 is off by default, so that float32 products keep float32's digits
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.fixture
def only(monkeypatch):
    def choose(kernel):
        monkeypatch.setattr(kernels, "KERNELS", {"cuda": (kernel(),)})

        def refuse(*args, **kwargs):
            raise AssertionError("the concatenating way was taken")

        monkeypatch.setattr(dispatch, "concatenated_attention", refuse)

    return choose


def assert_agree(output, leaves, expected, high, dtype):
    """An output on CUDA, and its gradients by the leaves if they want some, are what is expected, which comes from `high`."""
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=3 * TOLERANCE[dtype])
    if not leaves[0].requires_grad:
        return
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((output * weights.to(output)).sum(), leaves)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * weights).sum(), high), strict=True):
        error = (gradient.cpu().double() - reference).abs().max()
        assert error <= 3 * TOLERANCE[dtype] * reference.abs().max().clamp(min=1)


@pytest.mark.parametrize("kernel, dtype, masked", CASES)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_cuda_kernel_with_a_prefix_is_the_formula(only, kernel, dtype, masked, by_row, training):
    if by_row and kernel is kernels.CudaFlashKernel:
        pytest.skip("rows with prefixes of their own need a mask, which flash attention does not take")
    only(kernel)
    query, key, value, (prefix,) = tensors(tokens=64, dtype=dtype)
    prefix_mask = torch.tensor([[True] * LENGTH, [True, False] * 2 + [False]]) if by_row else None
    visible = padded(64, 64) if masked else causal(64, 64)
    leaves = [tensor.cuda().requires_grad_(training) for tensor in (query, key, value, prefix.key, prefix.value)]
    module = Attention("sdpa", [Prefix(*leaves[3:], None if prefix_mask is None else prefix_mask.cuda())])
    mask = visible[:, None].cuda() if masked else None
    output, _ = module.attend(*leaves[:3], mask, scaling=0.3)

    high = [tensor.detach().cpu().double().requires_grad_() for tensor in leaves]
    expected = formula(*high[:3], [Prefix(*high[3:], prefix_mask)], 0.3, visible)
    assert_agree(output, leaves, expected, high, dtype)


@pytest.mark.parametrize("kernel, dtype, masked", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_on_cuda_a_position_free_prefix_is_the_formula(only, kernel, dtype, masked, training):
    only(kernel)
    query, unrotated, key, value, (prefix,) = drawn(64, dtype=dtype)
    visible = padded(64, 64) if masked else causal(64, 64)
    tensors = (query, unrotated, key, value, prefix.key, prefix.value)
    leaves = [tensor.cuda().requires_grad_(training) for tensor in tensors]
    module = attention_over([Prefix(*leaves[4:], reads="unrotated")], leaves[1])
    mask = visible[:, None].cuda() if masked else None
    output, _ = module.attend(leaves[0], *leaves[2:4], mask, scaling=0.3)

    high = [tensor.detach().cpu().double().requires_grad_() for tensor in leaves]
    expected = free_formula(*high[:4], [Prefix(*high[4:], reads="unrotated")], 0.3, visible)
    assert_agree(output, leaves, expected, high, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_tokens", [1, 9, 300])
def test_decoding_on_cuda_is_the_formula(dtype, kv_tokens):
    query, key, value, (prefix,) = tensors(1, kv_tokens, dtype=dtype)
    module = Attention("sdpa", [Prefix(prefix.key.cuda(), prefix.value.cuda())])
    output, _ = module.attend(query.cuda(), key.cuda(), value.cuda(), None, scaling=0.3)
    expected = formula(query, key, value, [prefix], 0.3, causal(1, kv_tokens))
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=3 * TOLERANCE[dtype])
