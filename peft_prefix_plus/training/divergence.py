"""The Kullback-Leibler divergence of a student's next tokens from a teacher's, computed without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


Head = Callable[[torch.Tensor], torch.Tensor]
"""From hidden states (tokens, hidden) to logits (tokens, vocabulary)."""

LOGITS_AT_ONCE = 2**24
"""How many logits are held at a time: 64 MB in float32, and a few times that for what is computed from them."""


def divergence(student: torch.Tensor, teacher: torch.Tensor, k: int | None) -> torch.Tensor:
    """
    Return KL(teacher ‖ student) for each token.

    With `k`, the teacher's `k` likeliest tokens count one by one and all others together as one more outcome:

        Σ_{i ∈ top} p_i (log p_i − log q_i) + p_rest (log p_rest − log q_rest)

    which is at most the full divergence, and 0 where the student agrees on these tokens.

    Args:
        student (`torch.Tensor`): Logits, (tokens, vocabulary).
        teacher (`torch.Tensor`): Logits, of the same shape.
        k (`int`, *optional*): How many tokens count one by one; `None` means all.

    Returns:
        `torch.Tensor`: (tokens,), in float32 at least.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q = torch.log_softmax(student.to(dtype), dim=-1)
    log_p = torch.log_softmax(teacher.to(dtype), dim=-1)
    if k is not None and k < log_p.shape[-1]:
        top, indices = log_p.topk(k, dim=-1)
        log_p = torch.cat([top, _log_rest(log_p, indices)], dim=-1)
        log_q = torch.cat([log_q.gather(-1, indices), _log_rest(log_q, indices)], dim=-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)  # a token that is ruled out has log p = -inf


def _log_rest(log_probabilities: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The logarithm of the probability of all tokens but these, (tokens, 1)."""
    others = log_probabilities.scatter(-1, indices, float("-inf"))
    # where all others are ruled out, -inf has no gradient
    return others.clamp(min=torch.finfo(others.dtype).min).logsumexp(dim=-1, keepdim=True)


def summed_divergence(student: torch.Tensor, teacher: torch.Tensor, head: Head, k: int | None) -> torch.Tensor:
    """
    Return the sum of [`divergence`] over tokens, given hidden states instead of logits.

    The logits of a few tokens are computed at a time, and with them the gradient of the student's hidden states, in forward:
    memory grows with the hidden states, whatever the vocabulary's size. The head's own parameters get no gradient.

    Args:
        student (`torch.Tensor`): The student's hidden states, (tokens, hidden).
        teacher (`torch.Tensor`): The teacher's, of the same shape.
        head (`Head`): What makes logits of both.
        k (`int`, *optional*): See [`divergence`].

    Returns:
        `torch.Tensor`: The sum, a scalar.
    """
    apply: Callable[..., torch.Tensor] = _SummedDivergence.apply
    return apply(student, teacher, head, k)


class _SummedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, head: Head, k: int | None) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.promote_types(student.dtype, torch.float32), device=student.device)
        gradient = torch.zeros_like(student) if needs_gradient else None
        start, size = 0, 1  # the first token tells how large the vocabulary is
        while start < len(student):
            rows = slice(start, start + size)
            states = student[rows].detach().requires_grad_(needs_gradient)
            with torch.no_grad():
                reference = head(teacher[rows])
            with torch.set_grad_enabled(needs_gradient):
                loss = divergence(head(states), reference, k).sum()
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(loss, states)
            total += loss.detach()
            start, size = start + size, max(1, LOGITS_AT_ONCE // reference.shape[-1])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0].to(gradient.dtype) * gradient, None, None, None
