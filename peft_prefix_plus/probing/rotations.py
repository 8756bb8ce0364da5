"""Observing the attention modules' rotations in a probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..attention import (
    THREAD,
    PositionEmbeddings,
    QueryRotation,
    find_rotation,
    has_known_form,
    position_embeddings_of,
)
from .modules import calls_attention_interface


class ObservedRotations:
    """
    The observed rotations of the attention modules in a probe. A module has rotated its queries (in some models some
    layers do not) if they depend on the position embeddings that it was given. This is known without the weights.
    """

    def __init__(self) -> None:
        self.obstacles: dict[str, str] = {}
        self._rotations: dict[str, QueryRotation] = {}
        self._embeddings: dict[str, PositionEmbeddings] = {}

    def follow(self, modules: dict[str, nn.Module], stack: ExitStack) -> None:
        """Observe these modules until the stack is left."""
        for name, module in modules.items():
            try:
                rotation = find_rotation(module)
                if rotation is not None and not calls_attention_interface(module):
                    raise ValueError("it computes attention itself")
            except ValueError as error:
                self.obstacles[name] = str(error)
                continue
            if rotation is not None:
                self._rotations[name] = rotation
                hook = partial(self._watch, name)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _watch(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a module's forward in the probe: have autograd follow its position embeddings."""
        if module not in (THREAD.interface or {}):
            return None  # another thread's
        embeddings = position_embeddings_of(module, args, kwargs)
        if embeddings is None:
            return None
        if not has_known_form(embeddings):
            self.obstacles[name] = (
                f"its position embeddings, a {type(embeddings).__name__}, are of a form that is not known"
            )
            return None
        torch.set_grad_enabled(True)
        watched: PositionEmbeddings
        if isinstance(embeddings, torch.Tensor):
            watched = embeddings.detach().requires_grad_()
        else:
            cos, sin = embeddings
            watched = cos.detach().requires_grad_(), sin.detach()
        self._embeddings[name] = watched
        return tuple(watched if each is embeddings else each for each in args), {
            key: watched if each is embeddings else each for key, each in kwargs.items()
        }

    def of_query(self, name: str, query: torch.Tensor) -> tuple[QueryRotation | None, PositionEmbeddings | None]:
        """Return how a module has rotated its queries, if it has, and by what."""
        embeddings = self._embeddings.pop(name, None)
        torch.set_grad_enabled(False)
        if embeddings is None or not query.requires_grad:
            return None, None
        watched = embeddings if isinstance(embeddings, torch.Tensor) else embeddings[0]
        gradient = torch.autograd.grad(query, watched, torch.zeros_like(query), allow_unused=True)[0]
        return (None, None) if gradient is None else (self._rotations[name], embeddings)


@contextmanager
def observing_rotations(modules: dict[str, nn.Module]) -> Iterator[ObservedRotations]:
    """Observe the rotations of these modules' queries, under [`recording`]."""
    rotations = ObservedRotations()
    with ExitStack() as stack:
        rotations.follow(modules, stack)
        yield rotations
