"""The loss of distillation, against the formula in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from peft_prefix_plus.training import divergence as module
from peft_prefix_plus.training.divergence import divergence, summed_divergence


TOKENS, HIDDEN, VOCABULARY = 7, 5, 11


def reference(student: torch.Tensor, teacher: torch.Tensor, k: int | None) -> torch.Tensor:
    """The sum over tokens, from probabilities, one token at a time."""
    total = student.new_zeros(())
    for q, p in zip(student.softmax(-1), teacher.softmax(-1), strict=True):
        order = p.argsort(descending=True)
        top, rest = (order, order[:0]) if k is None else (order[:k], order[k:])
        total = total + sum(p[i] * (p[i].log() - q[i].log()) for i in top)
        if len(rest):
            total = total + p[rest].sum() * (p[rest].sum().log() - q[rest].sum().log())
    return total


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1, VOCABULARY, 2 * VOCABULARY, None])
def test_the_divergence_and_its_gradient_are_those_of_the_formula(k):
    student, teacher = 3 * drawn(TOKENS, VOCABULARY, seed=0), 3 * drawn(TOKENS, VOCABULARY, seed=1)
    student.requires_grad_()
    found, expected = divergence(student, teacher, k).sum(), reference(student, teacher, k)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(each, student)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)
    # in half precision the logits are rounded, but what is computed from them is not
    half = divergence(student.detach().bfloat16(), teacher.bfloat16(), k).sum()
    rounded = reference(student.detach().bfloat16().double(), teacher.bfloat16().double(), k)
    torch.testing.assert_close(half.double(), rounded, rtol=1e-5, atol=1e-6)


def test_fewer_tokens_one_by_one_never_see_more_divergence():
    student, teacher = 3 * drawn(TOKENS, VOCABULARY, seed=0), 3 * drawn(TOKENS, VOCABULARY, seed=1)
    values = [divergence(student, teacher, k) for k in (1, 3, 6, None)]
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-12).all() and (fewer >= 0).all()


def test_a_token_that_both_rule_out_counts_nothing():
    student, teacher = drawn(TOKENS, VOCABULARY, seed=0), drawn(TOKENS, VOCABULARY, seed=1)
    expected = reference(student[:, 2:], teacher[:, 2:], None)
    student[:, :2] = teacher[:, :2] = float("-inf")
    student.requires_grad_()
    for k in (None, VOCABULARY - 1):
        found = divergence(student, teacher, k).sum()
        assert torch.isfinite(found) and torch.autograd.grad(found, student)[0].isfinite().all()
    torch.testing.assert_close(divergence(student, teacher, None).sum(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("k", [4, None])
def test_the_sum_in_chunks_has_the_same_gradient_and_never_more_logits_than_allowed(monkeypatch, rows, k):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", rows * VOCABULARY)
    student, teacher, weight = (
        drawn(*shape, seed=seed)
        for seed, shape in enumerate([(TOKENS, HIDDEN), (TOKENS, HIDDEN), (VOCABULARY, HIDDEN)])
    )
    student.requires_grad_()
    seen = []

    def head(states):
        seen.append(len(states))
        return states @ weight.T

    found = summed_divergence(student, teacher, head, k)
    assert max(seen) == min(rows, TOKENS - 1) and sum(seen) == 2 * TOKENS
    expected = reference(student @ weight.T, teacher @ weight.T, k)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(3 * each, student)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_no_token_gives_nothing():
    student = torch.zeros(0, HIDDEN, requires_grad=True)
    total = summed_divergence(student, torch.zeros(0, HIDDEN), lambda states: states, 3)
    total.backward()
    assert total == 0 and student.grad.shape == student.shape
