"""Taking the hidden states before a language model's output layer in place of the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..probing.modules import execution_device
from ..probing.recording import evaluating


Take = Callable[[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor | None]
"""Called with hidden states (batch, tokens, hidden) and the output layer; a number that it returns becomes every logit."""


@contextmanager
def taking_hidden_states(head: nn.Module, take: Take) -> Iterator[None]:
    """
    Hand over the hidden states that reach a model's output layer, in the model's own forward, and spare the logits.

    What is done with them so happens where a sharded model has the layer's weights together. The number that `take` returns
    becomes the model's logits, all of them, so that it is an output of the model to whatever watches its outputs.

    Args:
        head (`nn.Module`): The output layer.
        take (`Take`): What to do with them.
    """
    results: list[torch.Tensor | None] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        results.append(take(args[0], module.forward))
        return (args[0][:, :1].detach(),)

    def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        result = results.pop()
        return output if result is None else result.expand(output.shape)

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_output_head(model: nn.Module) -> nn.Module | None:
    """
    Return a language model's output layer if what it puts out are the model's logits, bit for bit, in a forward of two tokens;
    `None` if the model does more with them (a soft cap, a factor), or has none.
    """
    base: Any = model
    head: nn.Module | None = base.get_output_embeddings()
    if head is None:
        return None
    outputs: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with evaluating(model):
            logits = base(input_ids=torch.tensor([[0, 1]], device=execution_device(model)), use_cache=False).logits
    finally:
        handle.remove()
    is_plain = len(outputs) == 1 and torch.equal(outputs[0].to(logits.dtype), logits)
    return head if is_plain else None
