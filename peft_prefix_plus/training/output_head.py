"""Taking the hidden states before a language model's output layer in place of the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
    Pass the hidden states that reach a model's output layer to `take`, in the model's own forward, and skip the
    logits. `take` thus runs while a sharded model has the layer's weights gathered. The number that it returns becomes
    the model's only logit, so anything that watches the model's outputs sees it as an output.

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

    with ExitStack() as stack:
        stack.callback(head.register_forward_pre_hook(before).remove)
        stack.callback(head.register_forward_hook(after).remove)
        yield


def plain_output_head(model: nn.Module) -> nn.Module | None:
    """
    Return a language model's output layer if its output is bit-identical to the model's logits, in a forward of two
    tokens. Return `None` if the model processes them further (a soft cap, a factor), or has no output layer.
    """
    base: Any = model
    head: nn.Module | None = base.get_output_embeddings()
    if head is None:
        return None
    outputs: list[torch.Tensor] = []
    with evaluating(model), ExitStack() as stack:
        stack.callback(head.register_forward_hook(lambda module, args, output: outputs.append(output)).remove)
        logits = base(input_ids=torch.tensor([[0, 1]], device=execution_device(model)), use_cache=False).logits
    is_plain = len(outputs) == 1 and torch.equal(outputs[0].to(logits.dtype), logits)
    return head if is_plain else None
