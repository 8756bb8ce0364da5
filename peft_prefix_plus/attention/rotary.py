"""
Undoing the rotary position embeddings (RoPE, arXiv 2104.09864) of queries. A key of a prefix has no position in the
text. At a fixed position, its score with a query would depend on the query's position. With the rotation of the
queries undone, all queries see it alike, as they see a token at their own position.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn

from .planes import factors_of_dims, turn_back


PositionEmbeddings = tuple[torch.Tensor, torch.Tensor] | torch.Tensor
"""
What transformers gives attention modules to rotate by: cosines and sines, (batch, tokens, width) each, or both in one complex
tensor.
"""

ARGUMENT = "position_embeddings"
"""The argument of a module's forward in which they come."""

POSITIONS = "prefix_plus_position_embeddings"
"""The argument in which they go on to the attention function, with all that a module's forward has no name for."""

SCALED_AFTERWARDS = {"HunYuanDenseV1Attention", "HunYuanMoEV1Attention"}
"""Modules whose queries go through a norm with learned weights after their rotation, which does not commute with it."""

ARRANGEMENTS = ("halves", "neighbours", "once")


@dataclass(frozen=True)
class QueryRotation:
    """
    How RoPE has turned the queries of an attention module.

    Attributes:
        is_interleaved (`bool`): Whether the two dims of a plane are neighbours (GPT-J), or half the rotated dims apart (GPT-NeoX).
        arrangement (`str`): The layout of the cosines: `"halves"`, one for each dim of a plane, half the width apart;
            `"neighbours"`, one for each dim, next to each other; `"once"`, a single one per plane.
        is_clockwise (`bool`): Whether the planes turn the other way.
        is_last (`bool`): If only some dims of a query are rotated: whether these are the last ones (latent attention)
            or the first.
    """

    is_interleaved: bool = False
    arrangement: str = "halves"
    is_clockwise: bool = False
    is_last: bool = False

    def undo(self, states: torch.Tensor, position_embeddings: PositionEmbeddings) -> torch.Tensor:
        """
        Turn queries, or keys, back by their positions.

        Args:
            states (`torch.Tensor`): Shape (batch, heads, tokens, dim), rotated.
            position_embeddings (`PositionEmbeddings`): What they were rotated by; of more positions than tokens, the
                last count.

        Returns:
            `torch.Tensor`: The same shape. If the embeddings include a factor on the scores (YaRN, arXiv 2309.00071),
            the result has that factor squared, like the product of a query and a key at the same position.
        """
        return self.undo_by(states, *self.factors(states, position_embeddings, states.shape[2]))

    def undo_by(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Like [`QueryRotation.undo`], with the factors that [`QueryRotation.factors`] made from the embeddings."""
        width = cos.shape[-1]
        rest = states.shape[-1] - width
        if rest:
            sizes = (rest, width) if self.is_last else (width, rest)
            parts = list(states.split(sizes, dim=-1))
            parts[self.is_last] = turn_back(parts[self.is_last], cos, sin, self.is_interleaved)
            return torch.cat(parts, dim=-1)
        return turn_back(states, cos, sin, self.is_interleaved)

    def follow(self, keys: torch.Tensor, position_embeddings: PositionEmbeddings) -> torch.Tensor:
        """
        Turn keys (…, tokens, dim) to the last position, so that queries rotated by it meet them as [`QueryRotation.undo`] lets
        unrotated queries meet the keys as they are.

        Args:
            keys (`torch.Tensor`): The keys.
            position_embeddings (`PositionEmbeddings`): What the queries were rotated by, of one row.
        """
        cos, sin = self.factors(keys, position_embeddings, 1)
        return self.undo_by(keys, cos, -sin)

    def factors(
        self, states: torch.Tensor, position_embeddings: PositionEmbeddings, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The factors on each rotated dim, and on its partner in the plane, at the last positions, (batch, 1, tokens,
        rotated dims) each, in the dtype of the states.
        """
        if isinstance(position_embeddings, torch.Tensor):
            position_embeddings = position_embeddings.real, position_embeddings.imag
        cos, sin = (self._of_planes(each[:, -tokens:]).to(states.device, states.dtype) for each in position_embeddings)
        return factors_of_dims(cos, -sin if self.is_clockwise else sin, self.is_interleaved)

    def _of_planes(self, embedding: torch.Tensor) -> torch.Tensor:
        """One number per plane, (batch, 1, tokens, planes)."""
        if self.arrangement == "halves":
            embedding = embedding[..., : embedding.shape[-1] // 2]
        elif self.arrangement == "neighbours":
            embedding = embedding[..., ::2]
        return embedding.unsqueeze(1)


def find_rotation(module: nn.Module) -> QueryRotation | None:
    """
    Find out from an attention module's class how it rotates queries. This reads no weights, so all processes of a
    sharded model, of which only one may have weights, get the same result.

    Args:
        module (`nn.Module`): The attention module.

    Returns:
        `QueryRotation`: `None` if the module does not use RoPE.

    Raises:
        ValueError: If its rotation cannot be undone here; the message says why.
    """
    forward = inspect.unwrap(type(module).forward)
    names = [name for name in forward.__code__.co_names if "apply_rot" in name or "apply_multi" in name]
    if not names:
        return None
    parameters = inspect.signature(forward).parameters
    if ARGUMENT not in parameters:
        raise ValueError("it computes the angles of its rotation itself")
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise ValueError("its forward hands no further arguments on to its attention function")
    if type(module).__name__ in SCALED_AFTERWARDS:
        raise ValueError("a norm with learned weights comes after it")
    rotations = set()
    for name in names:
        function = forward.__globals__.get(name)
        rotation = _rotation_of(function) if callable(function) else None
        if rotation is None:
            raise ValueError(f"its rotation, {name}, is of a form that is not known")
        rotations.add(rotation)
    if len(rotations) > 1:
        raise ValueError(f"it has several rotations, {', '.join(names)}")
    is_latent = hasattr(module, "qk_rope_head_dim")
    return _placed(rotations.pop(), is_last=is_latent)


_placed = cache(replace)  # modules that rotate alike have the same object


@cache
def _rotation_of(function: Callable[..., Any]) -> QueryRotation | None:
    """Find out by trial what a function that rotates queries, and perhaps keys, does to queries."""
    planes, tokens = 4, 3
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    states = torch.linspace(-1.0, 1.0, 2 * planes * tokens, **options).view(1, 1, tokens, -1).sin()
    angles = torch.arange(1.0, tokens + 1, **options)[:, None] * torch.tensor([1.1, 0.7, 0.4, 0.2], **options)
    for arrangement, is_interleaved, is_clockwise in product(ARRANGEMENTS, (False, True), (False, True)):
        rotation = QueryRotation(is_interleaved, arrangement, is_clockwise)
        found = []
        for each in (angles[None], torch.zeros_like(angles)[None]):
            embeddings = _arranged(each.cos(), arrangement), _arranged(each.sin(), arrangement)
            rotated = _rotated(function, states, *embeddings)
            if rotated is not None:
                found.append(rotation.undo(rotated, embeddings))
        if len(found) == 2 and bool((found[0] - found[1]).abs().max() < 1e-6):  # some rotate in float32
            return rotation
    return None


def _rotated(
    function: Callable[..., Any], states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor | None:
    """
    The queries (batch, heads, tokens, dim) that a function returns if it is called as modules call it, or `None`.
    """
    parameters = list(inspect.signature(function).parameters)
    try:
        if "freqs_cis" in parameters:
            for axis in (1, 2):  # that of the heads
                turned = states.transpose(1, axis)
                result = function(turned, turned, torch.complex(cos, sin))[0].transpose(1, axis)
                if result.shape == states.shape:
                    return result
        elif {"cos", "sin", "unsqueeze_dim"}.issubset(parameters):
            num_states = parameters.index("cos")
            result = function(*[states] * num_states, cos=cos, sin=sin, unsqueeze_dim=1)
            return result if num_states == 1 else result[0]
    except (RuntimeError, TypeError):  # the widths do not fit, or it wants other arguments
        pass
    return None


def _arranged(of_planes: torch.Tensor, arrangement: str) -> torch.Tensor:
    if arrangement == "halves":
        return torch.cat([of_planes, of_planes], dim=-1)
    return of_planes.repeat_interleave(2, dim=-1) if arrangement == "neighbours" else of_planes


def position_embeddings_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> PositionEmbeddings | None:
    """Return the position embeddings among the arguments of a module's forward."""
    if ARGUMENT in kwargs:
        return kwargs[ARGUMENT]
    module_class: type = type(module)
    index = _argument_index(module_class)
    return args[index] if index < len(args) else None


def has_known_form(position_embeddings: Any) -> bool:
    """Whether a module's position embeddings have a known format (DeepSeek V4's are a dict)."""
    if isinstance(position_embeddings, torch.Tensor):
        return position_embeddings.is_complex() and position_embeddings.dim() == 3
    return (
        isinstance(position_embeddings, (tuple, list))
        and len(position_embeddings) == 2
        and all(isinstance(each, torch.Tensor) and each.dim() == 3 for each in position_embeddings)
    )


@cache
def _argument_index(module_class: type[nn.Module]) -> int:
    parameters = list(inspect.signature(inspect.unwrap(module_class.forward)).parameters)
    return parameters.index(ARGUMENT) - 1  # without `self`
