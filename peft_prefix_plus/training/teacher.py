"""The base model with a document in its context, whose keys and values are computed once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapters.lookup import base_of, prefix_layers
from ..adapters.running import naming_rows
from ..probing.modules import execution_device
from ..probing.recording import evaluating


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """
    Let a model compute what its base model computes, in this thread.

    Prefixes are left out of the calls, without a change of the model. Adapters of other methods are disabled as PEFT does it, and
    what is trainable is so afterwards.
    """
    layers = [layer for _, layer in prefix_layers(model)]
    if layers:
        with naming_rows({layer: ["__base__"] for layer in layers}):
            yield
        return
    disable = getattr(model, "disable_adapter", None)
    if disable is None:  # a base model
        yield
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with disable():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class Contexts:
    """
    The caches of token sequences that many conversations begin with, one for each sequence, computed at the first use.

    A cache that is handed out is a copy: those that are kept are never changed.

    Args:
        token_ids (`Sequence[Sequence[int]]`): The sequences.
    """

    def __init__(self, token_ids: Sequence[Sequence[int]]) -> None:
        self.token_ids = [list(each) for each in token_ids]
        self._caches: list[Any] = []

    def read(self, model: nn.Module, unwrapped: nn.Module) -> None:
        """
        Compute what is not there yet. Every process of a sharded model must call this at the same time.

        Args:
            model (`nn.Module`): What to call: the model, or what a launcher has wrapped it in.
            unwrapped (`nn.Module`): The model itself.
        """
        call: Any = model
        for token_ids in self.token_ids[len(self._caches) :]:
            input_ids = torch.tensor([token_ids], device=execution_device(unwrapped))
            with evaluating(unwrapped), adapters_off(unwrapped):
                # all logits of a long text would be its largest tensor by far
                output = call(input_ids=input_ids, use_cache=True, **keeping_logits(unwrapped, 1))
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise ValueError(
                    f"{type(base_of(unwrapped)).__name__} keeps no keys and values of what it has read, so a document cannot be read once "
                    "for many conversations."
                )
            self._caches.append(cache)

    def cache(self, window: int, rows: int) -> Any:
        """Return a copy of a sequence's cache for a batch."""
        copied = copy.deepcopy(self._caches[window])
        copied.batch_repeat_interleave(rows)
        return copied

    def mask(self, window: int, mask: torch.Tensor) -> torch.Tensor:
        """Return the attention mask (batch, tokens) of what follows a sequence, with the sequence before it."""
        return torch.cat([mask.new_ones(len(mask), len(self.token_ids[window])), mask], dim=1)


def keeping_logits(model: nn.Module, count: int) -> dict[str, int]:
    """Return the argument that makes a model compute its last logits only, if it knows it."""
    knows = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters
    return {"logits_to_keep": count} if knows else {}


def check_trains_prefix_alone(model: nn.Module) -> None:
    """
    Raise if a model's adapters replace whole modules, which the teacher would see too.

    Raises:
        ValueError: If they do.
    """
    replaced = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if replaced:
        raise ValueError(
            f"The adapters replace {', '.join(replaced)} (`modules_to_save`), and distillation trains a prefix alone. Leave "
            "`modules_to_save` out."
        )
