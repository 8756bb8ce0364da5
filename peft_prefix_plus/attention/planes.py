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
    if is_interleaved:
        partners = states.reshape(*states.shape[:-1], -1, 2).flip(-1).flatten(-2)
    else:
        partners = states.roll(states.shape[-1] // 2, -1)
    return torch.addcmul(states * cos, partners, sin)


def factors_of_dims(cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Expand cosines and sines of planes, (…, planes) each, to the factors that [`turn_back`] takes, (…, dims) each.
    """
    if is_interleaved:
        return cos.repeat_interleave(2, dim=-1), torch.stack((sin, -sin), dim=-1).flatten(-2)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)
