"""The training and the held-out loss that all methods of benchmarks/quality.py have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from peft_prefix_plus.training.padding import IGNORED_LABEL


Batch = dict[str, torch.Tensor]
"""`input_ids`, `labels` and, where rows differ in length, `attention_mask`, each of shape (batch, tokens)."""


def train(
    model: Any, draw: Callable[[], Batch], groups: list[dict[str, Any]], steps: int, warmup: int, device: str
) -> list[float]:
    """
    Train with AdamW, without weight decay: a linear warmup, then a linear decay to zero.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        draw (`Callable`): Returns the next batch.
        groups (`list[dict]`): The optimizer's parameter groups, with their learning rates.
        steps (`int`): The number of steps.
        warmup (`int`): How many of them the warmup takes.
        device (`str`): Where the model is.

    Returns:
        `list[float]`: The seconds of each step.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup)))
    seconds = []
    model.train()
    for _ in range(steps):
        started = time.perf_counter()
        model(**to(draw(), device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


@torch.no_grad()
def held_out_loss(model: Any, batches: Iterable[Batch], device: str) -> float:
    """Return the mean loss per token that counts."""
    model.eval()
    total = count = 0.0
    for batch in batches:
        num_labels = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        total += float(model(**to(batch, device)).loss) * num_labels
        count += num_labels
    return total / count


def to(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
