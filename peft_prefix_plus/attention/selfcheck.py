"""
No kernel is used before it has been checked.

The kernels are private operators, and each is a different program for every kind of device, dtype, head width and
version of PyTorch. So before a kernel is first used for one of these in a process, attention with a prefix, forward
and backward, is computed in the fused way on small inputs and compared with the concatenated way in float64. A kernel
that gives a different result, or raises, is not used there, and a warning says so.

The environment variable PREFIX_PLUS_KERNEL_CHECK=0 switches this off; all kernels are then used unchecked.

The check runs in its own thread, without the caller's modes (gradients, inference, autocast, intercepted functions and
dispatches, a trace of torch.compile). It draws none of the caller's random numbers. torch.compile calls [`is_proven`]
while it traces, and the graph holds the result. While a CUDA graph is being captured nothing can be checked, so the
graph uses the concatenated way in place of an unchecked kernel.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn

from . import kernels
from .call import AttentionCall
from .concatenated import concatenated_attention
from .fused import fused_attention
from .kernels import AttentionKernel
from .masks import finite_additive
from .prefix import Prefix


SWITCH = "PREFIX_PLUS_KERNEL_CHECK"

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a result may be off, in terms of its largest number or 1. In float32, products may be allowed to be TF32's."""

BATCH, HEADS, KV_HEADS, PREFIX_TOKENS, SCALE = 2, 4, 2, 3, 0.3


def find_kernel(
    device: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
) -> AttentionKernel | None:
    """
    Return the first kernel that supports these inputs on a type of device and gives the right results there, or
    `None`.
    """
    if value.shape[-1] > key.shape[-1] or not query.dtype == key.dtype == value.dtype:
        return None
    for kernel in kernels.KERNELS.get(device, ()):
        if kernel.supports(query, key, mask, is_causal):
            head_dim = query.shape[-1]
            if torch.compiler.is_compiling():
                head_dim = range(head_dim).stop  # a number, where Dynamo has a symbol
            if is_proven(type(kernel), query.device, query.dtype, head_dim):
                return kernel
    return None


class _Kind(NamedTuple):
    """What one trial is good for."""

    kernel: type[AttentionKernel]
    device: torch.device
    dtype: torch.dtype
    head_dim: int


_verdicts: dict[tuple[Any, ...], bool] = {}
_trying = threading.Lock()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_proven(kernel: type[AttentionKernel], device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """
    Whether a kernel may be used on a device for heads of a dtype and width. Checked at the first call, then
    remembered.
    """
    verdict = _verdicts.get((kernel, device, dtype, head_dim))
    return _try_once(_Kind(kernel, device, dtype, head_dim)) if verdict is None else verdict


def _try_once(kind: _Kind) -> bool:
    if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    with _trying:
        if kind in _verdicts:
            return _verdicts[kind]
        outcome = _run_in_thread(kind)
        if isinstance(outcome, torch.OutOfMemoryError):
            return False  # which says nothing of the kernel: it is tried again at the next use
        _verdicts[kind] = outcome is True
    if not isinstance(outcome, bool):
        warnings.warn(_warning(kind, outcome), stacklevel=2)
    return outcome is True


def _run_in_thread(kind: _Kind) -> bool | str | Exception:
    """Return whether the kernel is there and right, or else how it is wrong, or what it raised."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefix-plus-kernel-check") as executor:
        trial = executor.submit(_outcome, kind)
    error = trial.exception()
    return error if isinstance(error, Exception) else trial.result()


def _warning(kind: _Kind, problem: str | Exception) -> str:
    from .. import __version__

    found = f"raises {type(problem).__name__}: {problem}" if isinstance(problem, Exception) else problem
    runtime = [f"{name} {number}" for name in ("cuda", "hip", "xpu") if (number := getattr(torch.version, name, None))]
    return (
        f"PREFIX_PLUS does not use {kind.kernel.__name__} for heads of {kind.head_dim} numbers of {kind.dtype} on {_name(kind.device)}: "
        f"tried against the reference, it {found}. The reference is used instead, which is right, but slower. Please report this, "
        f"with the versions: {', '.join(['peft-prefix-plus ' + __version__, 'torch ' + torch.__version__, *runtime])}. "
        f"The environment variable {SWITCH}=0 switches the trial off."
    )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} ({torch.cuda.get_device_name(device)}, capability {major}.{minor})"
    return f"{device} ({torch.xpu.get_device_name(device)})" if device.type == "xpu" else str(device)


# ---------------------------------------------------------------------------------------------------------- the trial


class _Case(NamedTuple):
    """One computation to try."""

    inputs: dict[str, torch.Tensor]
    """On the CPU, in float64: the differentiable inputs by name, in the order in which they are called below."""
    mask: torch.Tensor | None
    prefix_mask: torch.Tensor | None
    is_causal: bool


def _cases(kind: _Kind) -> Iterator[_Case]:
    """Training over a text, padded rows of which one sees a part of the prefix, and decoding with and without padding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        # rounded, so that both ways compute with the same numbers
        return torch.randn(*shape, kind.head_dim, generator=generator, dtype=torch.float64).to(kind.dtype).double()

    def case(tokens: int, kv_tokens: int, is_causal: bool, is_padded: bool, has_own_query: bool) -> _Case:
        inputs = {
            "queries": normal(BATCH, tokens, HEADS).transpose(1, 2),  # as they lie in memory in most modules
            "keys": normal(BATCH, KV_HEADS, kv_tokens),
            "values": normal(BATCH, KV_HEADS, kv_tokens),
            "prefix's keys": normal(KV_HEADS, PREFIX_TOKENS),
            "prefix's values": normal(KV_HEADS, PREFIX_TOKENS),
        }
        if has_own_query:
            inputs["prefix's queries"] = normal(BATCH, tokens, HEADS).transpose(1, 2)
        if not is_padded:
            return _Case(inputs, None, None, is_causal)
        mask = torch.ones(BATCH, 1, tokens, kv_tokens, dtype=torch.bool).tril(kv_tokens - tokens)
        mask[0, :, :, : kv_tokens - tokens + 1] = False  # the first query sees no token at all
        prefix_mask = torch.ones(BATCH, PREFIX_TOKENS, dtype=torch.bool)
        prefix_mask[1, 1:] = False
        return _Case(inputs, mask, prefix_mask, is_causal)

    yield case(35, 35, is_causal=True, is_padded=False, has_own_query=True)
    yield case(5, 19, is_causal=False, is_padded=True, has_own_query=False)
    yield case(1, 19, is_causal=False, is_padded=False, has_own_query=False)
    yield case(1, 19, is_causal=False, is_padded=True, has_own_query=True)


def _outcome(kind: _Kind) -> bool | str:
    """Return whether the kernel is there and right, or else how it is wrong."""
    kernel = kind.kernel()
    is_switched_off = os.environ.get(SWITCH) == "0"
    for case in _cases(kind):
        inputs = [tensor.to(kind.device, kind.dtype).requires_grad_() for tensor in case.inputs.values()]
        query, key, value = inputs[:3]
        if not kernel.is_offered(query, key, value):
            return False
        if is_switched_off or not kernel.supports(query, key, case.mask, case.is_causal):
            continue
        expected = _reference(case)
        for is_training in (False, True):
            for name, tensor in _fused(kernel, case, inputs, is_training).items():
                tensor, reference = tensor.cpu().double(), expected[name]
                error = float((tensor - reference).abs().max() / reference.abs().max().clamp(min=1))
                if not error <= TOLERANCE[kind.dtype]:  # nor is it if it is not a number
                    shape = "x".join(map(str, case.inputs["queries"].shape))
                    return f"gives another {name} for queries of {shape}: off by {error:.2g}"
    return True


def _fused(
    kernel: AttentionKernel, case: _Case, inputs: list[torch.Tensor], is_training: bool
) -> dict[str, torch.Tensor]:
    """The results of the fused way, by name."""
    mask = None if case.mask is None else finite_additive(case.mask.to(inputs[0].device), inputs[0].dtype)
    with torch.set_grad_enabled(is_training):
        output = fused_attention(kernel, _call(case, inputs, mask))
    return _results(case, output, inputs) if is_training else {"output": output}


def _reference(case: _Case) -> dict[str, torch.Tensor]:
    """The results of the concatenating way, by name."""
    inputs = [tensor.requires_grad_() for tensor in case.inputs.values()]
    output, _ = concatenated_attention(_attention, _call(case, inputs, case.mask))
    return _results(case, output, inputs)


def _call(case: _Case, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> AttentionCall:
    """The call of an attention function for one computation."""
    query, key, value, prefix_key, prefix_value, *own = inputs
    prefix_mask = None if case.prefix_mask is None else case.prefix_mask.to(query.device)
    prefix = Prefix(prefix_key, prefix_value, prefix_mask, reads="unrotated" if own else "rotated")
    options = {"scaling": SCALE, "is_causal": case.is_causal}
    return AttentionCall(
        "sdpa", _attention, nn.Module(), query, key, value, mask, prefix, own[0] if own else query, options
    )


def _results(case: _Case, output: torch.Tensor, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """An output and its gradients with respect to the inputs, weighted alike for both ways."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    gradients = torch.autograd.grad(output, inputs, weights.to(output))
    return {"output": output.detach()} | {
        f"gradient of the {name}": gradient for name, gradient in zip(case.inputs, gradients, strict=True)
    }


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
) -> tuple[torch.Tensor, None]:
    """softmax(s · Q Kᵀ + mask) V with a dense causal mask, without any kernel."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ value.repeat_interleave(groups, dim=1)).transpose(1, 2), None
