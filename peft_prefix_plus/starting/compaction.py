"""
Fewer keys and values in place of a text's, in closed form: attention matching (arXiv 2602.16284), for a prefix without log-weights.

For one key head, with queries q that have the text before them, the text's keys k_j and values v_j, and the
log-sum-exp z and the output o of the real tokens after it:

1. Keep the keys that the queries attend to most: those with the greatest mean square of their share of the attention.
2. Log-weights β_i ≥ −∞, by non-negative least squares, give the kept keys the mass that all have: Σ_i e^{β_i + s q·k_i} = Σ_j e^{s q·k_j}.
3. A prefix has no log-weights, so they are folded into the keys: p_i = k_i + β_i u, where s q·u = 1 in the
   least-squares sense. A pretrained model's queries share a direction, so such a vector exists up to a few hundredths.
4. Fit the values by least squares, so that attention over the prefix and the real tokens matches attention over the
   text and the real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


FOLDING_RIDGE = 1e-3
"""How much shortness counts against exactness in the vector that stands for a log-weight, relative to the queries' squared norm."""

VALUE_RIDGE = 1e-2
"""How much nearness to the text's own values counts against the output, relative to the mean squared share of a key."""

WEIGHT_STEPS = 100
"""Steps of the multiplicative updates that find the log-weights."""

GREATEST_SCORE = 30.0
"""The most that a kept key may score above all of the text's, in nats: its exponential and the square of that stay finite."""

SMALLEST_WEIGHT = 1e-6
"""The least weight of a kept key."""


class AttentionResidual(NamedTuple):
    """
    How far attention with a prefix is from attention with the text that it replaces, in one attention module, over
    queries that the fit did not use.

    Attributes:
        output: The norm of the difference of the outputs, relative to the norm of the output with the text.
        mass: The root mean square of the difference between the shares of the attention that fall on the prefix and on the text.
    """

    output: float
    mass: float


@dataclass(frozen=True)
class Reading:
    """
    How the queries of one key head attend to a text, and to the real tokens after it.

    Attributes:
        query (`torch.Tensor`): s · Q as a prefix meets it, (queries, key_dim).
        shares (`torch.Tensor`): The share of the attention that falls on each token of the text, (queries, text_tokens).
        real_lse (`torch.Tensor`): The log-sum-exp of the scores of the real tokens, (queries,).
        text_lse (`torch.Tensor`): The log-sum-exp of the scores of the text, (queries,).
        real_output (`torch.Tensor`): The attention over the real tokens alone, (queries, value_dim).
        output (`torch.Tensor`): The attention over the text and the real tokens, (queries, value_dim).
    """

    query: torch.Tensor
    shares: torch.Tensor
    real_lse: torch.Tensor
    text_lse: torch.Tensor
    real_output: torch.Tensor
    output: torch.Tensor

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        text_query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        real_lse: torch.Tensor,
        real_output: torch.Tensor,
    ) -> Reading:
        """
        Attend to a text.

        Args:
            query: s · Q as a prefix meets it, (queries, key_dim).
            text_query: s · Q as the text's keys meet it, (queries, key_dim).
            key: The text's keys, (text_tokens, key_dim).
            value: The text's values, (text_tokens, value_dim).
            real_lse: As the attribute.
            real_output: As the attribute.
        """
        scores = text_query @ key.T
        text_lse = scores.logsumexp(dim=-1)
        total = torch.logaddexp(text_lse, real_lse)
        shares = (scores - total[:, None]).exp()
        output = shares @ value + (real_lse - total).exp()[:, None] * real_output
        return cls(query, shares, real_lse, text_lse, real_output, output)

    def rows(self, index: torch.Tensor) -> Reading:
        """Return some of the queries."""
        parts = (self.query, self.shares, self.real_lse, self.text_lse, self.real_output, self.output)
        return Reading(*(part[index] for part in parts))

    def without_shares(self) -> Reading:
        """Return everything except the part that grows with the text."""
        return Reading(self.query, self.shares[:, :0], self.real_lse, self.text_lse, self.real_output, self.output)


def compact(
    reading: Reading, key: torch.Tensor, value: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Find the keys and values that replace a text's in one key head.

    Args:
        reading (`Reading`): The queries to serve.
        key (`torch.Tensor`): The text's keys, (text_tokens, key_dim).
        value (`torch.Tensor`): The text's values, (text_tokens, value_dim).
        num_tokens (`int`): How many to find, at most as many as the text has.

    Returns:
        `tuple`: Keys (num_tokens, key_dim) and values (num_tokens, value_dim).
    """
    kept = reading.shares.square().mean(dim=0).topk(num_tokens).indices.sort().values
    key, value = key[kept], value[kept]
    key = key + log_weights(reading, key)[:, None] * folding_direction(reading.query)
    return key, fitted_values(reading, key, value)


def log_weights(reading: Reading, key: torch.Tensor) -> torch.Tensor:
    """
    Find the log-weights with which the kept keys have the mass of all keys of a text, (num_tokens,). The error of a
    query counts in proportion to the text's share of its attention. The non-negative least squares uses multiplicative
    updates, which start from positive numbers.
    """
    text_share = torch.sigmoid(reading.text_lse - reading.real_lse)
    scores = (
        reading.query @ key.T - reading.text_lse[:, None]
    )  # above 0 where a prefix meets other queries than the text does
    masses = scores.clamp(max=GREATEST_SCORE).exp() * text_share[:, None]
    products, wanted = _gram(masses, masses), _gram(masses, text_share[:, None])[:, 0]
    weights = torch.ones_like(wanted)
    for _ in range(WEIGHT_STEPS):
        weights = weights * wanted / (products @ weights).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights.clamp(min=SMALLEST_WEIGHT).log().to(key)


def folding_direction(query: torch.Tensor) -> torch.Tensor:
    """
    Find the vector, (key_dim,), that all queries (queries, key_dim) score as close to 1 as possible, by least squares.
    """
    products = _gram(query, query)
    direction = torch.linalg.solve(_with_ridge(products, FOLDING_RIDGE), query.sum(dim=0).to(products))
    return direction.to(query)


def fitted_values(reading: Reading, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """
    Find the values with which keys of a prefix, (num_tokens, key_dim), give the text's output. Of nearly equal
    solutions, take the closest to `value`, (num_tokens, value_dim).
    """
    shares, real_share = _shares(reading, key)
    wanted = reading.output - real_share[:, None] * reading.real_output - shares @ value
    products = _gram(shares, shares)
    change = torch.linalg.solve(_with_ridge(products, VALUE_RIDGE), _gram(shares, wanted))
    return value + change.to(value)


def matching_error(readings: list[Reading], keys: torch.Tensor, values: torch.Tensor) -> AttentionResidual:
    """
    Measure a prefix of one attention module.

    Args:
        readings (`list[Reading]`): For each head of keys, the queries to measure it by.
        keys (`torch.Tensor`): The prefix's keys, (heads, num_tokens, key_dim).
        values (`torch.Tensor`): The prefix's values, (heads, num_tokens, value_dim).
    """
    wrong, whole, masses = [], [], []
    for reading, key, value in zip(readings, keys, values, strict=True):
        shares, real_share = _shares(reading, key.to(reading.query))
        output = shares @ value.to(reading.query) + real_share[:, None] * reading.real_output
        wrong.append((output - reading.output).norm())
        whole.append(reading.output.norm())
        masses.append(real_share - torch.sigmoid(reading.real_lse - reading.text_lse))
    relative = torch.stack(wrong).norm().item() / (torch.stack(whole).norm().item() or 1.0)
    return AttentionResidual(relative, torch.cat(masses).square().mean().sqrt().item())


def _shares(reading: Reading, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The shares of the attention on a prefix's keys, (queries, num_tokens), and on all real tokens, (queries,)."""
    scores = reading.query @ key.T
    total = torch.logaddexp(scores.logsumexp(dim=-1), reading.real_lse)
    return (scores - total[:, None]).exp(), (reading.real_lse - total).exp()


def _gram(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ · right, in float64 on the CPU: not every device has float64."""
    return left.cpu().double().T @ right.cpu().double()


def _with_ridge(products: torch.Tensor, ridge: float) -> torch.Tensor:
    size = products.diagonal().mean().clamp(min=torch.finfo(products.dtype).tiny)
    return products + ridge * size * torch.eye(len(products), dtype=products.dtype)
