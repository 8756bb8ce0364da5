"""The planes that rotary position embeddings turn, and the two layouts of a vector's dims in them."""

from __future__ import annotations

import torch


def turn_back(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    """
    Turn every plane of some vectors back by its angle.

    Args:
        states (`torch.Tensor`): The vectors, (…, dims), two dims per plane.
        cos (`torch.Tensor`): The factor on each dim, as [`factors_of_dims`] returns it, broadcast against the vectors.
        sin (`torch.Tensor`): The factor on its partner in the plane, likewise.
        is_interleaved (`bool`): Whether the two dims of a plane are neighbours (GPT-J), or half the dims apart (GPT-NeoX).
    """
    half = states.shape[-1] // 2
    turned = states * cos
    if states.shape[-2] > 1 and not torch.is_grad_enabled():
        # in place and without a copy of the partners, which takes half as long for the queries of a text
        dims = (slice(0, None, 2), slice(1, None, 2)) if is_interleaved else (slice(half), slice(half, None))
        for own, other in (dims, dims[::-1]):
            turned[..., own].addcmul_(states[..., other], sin[..., own])
        return turned
    if is_interleaved:
        partners = states.reshape(*states.shape[:-1], -1, 2).flip(-1).flatten(-2)
    else:
        partners = states.roll(half, -1)
    return torch.addcmul(turned, partners, sin)


def factors_of_dims(cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Expand cosines and sines of planes, (…, planes) each, to the factors that [`turn_back`] takes, (…, dims) each.
    """
    if is_interleaved:
        return cos.repeat_interleave(2, dim=-1), torch.stack((sin, -sin), dim=-1).flatten(-2)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)
