"""A Trainer that trains a prefix to match the base model with a document in its context."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from ..adapters.lookup import base_of, layers_with_adapter, prefix_layers
from ..probing.recording import evaluating
from .conversations import Conversation
from .divergence import summed_divergence
from .document import Chat, Window
from .output_head import plain_output_head, taking_hidden_states
from .padding import IGNORED_LABEL, padded
from .teacher import Contexts, adapters_off, check_trains_prefix_alone


class DistillationTrainer(Trainer):
    """
    transformers' Trainer with another loss: the divergence of the model with its prefix from the base model with a document in
    its context, over the tokens of answers.

    Teacher and student are one model in memory. The teacher reads each window of the document once and keeps its keys and values.
    Everything else (devices, precision, accumulation, checkpoints, logging) is the Trainer's. `train_dataset` and `eval_dataset`
    are what [`encode_conversations`] returns; a batch is of one window.

    Args:
        model (`PeftModel`): The model, with the adapter to train active. Adapters of other methods can be trained too.
        windows (`Sequence[Window]`): The document's windows.
        k (`int`, *optional*, defaults to 20): How many of the teacher's likeliest tokens count one by one; the others count
            together. `None` means all.
        distractors (`Sequence[str]`, *optional*): Other adapters of the model, which are not trained. In about every
            other step some of them, drawn at random, are active together with the trained one (arXiv 2606.04557).
        kwargs: What the Trainer takes.

    Raises:
        ValueError: If `k` or `distractors` is not as it must be, or the adapter replaces whole modules.
    """

    def __init__(
        self,
        model: Any,
        *args: Any,
        windows: Sequence[Window],
        k: int | None = 20,
        distractors: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if k is not None and k < 1:
            raise ValueError(f"`k` must be at least 1, or None for all tokens, got {k}.")
        check_trains_prefix_alone(model)
        self.k = k
        self.contexts = Contexts([window.token_ids for window in windows])
        self.distractors = check_distractors(model, distractors)
        with adapters_off(model):
            self.head = plain_output_head(base_of(model))
        kwargs.setdefault("data_collator", DistillationCollator(padding=0))
        super().__init__(model, *args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by all answer tokens of a step
        columns: Any = ["window", "input_ids", "labels", "teacher_ids", "teacher_labels"]
        self._signature_columns = columns
        self.label_names = ["labels"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        windows = [row["window"] for row in dataset]
        return WindowSampler(windows, self.args.train_batch_size, self.args.data_seed or self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        windows = [row["window"] for row in eval_dataset]
        return WindowSampler(windows, self.args.eval_batch_size, seed=None)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Take a step. Until backward is over, the adapters of [`drawn_distractors`] are active together with the trained
        one.
        """
        names = drawn_distractors(self.distractors, f"{self.args.seed} {self.state.global_step}")
        with ExitStack() as stack:
            for _, layer in prefix_layers(model) if names else ():
                stack.enter_context(layer.activating([*layer.active_adapters, *names]))
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the divergence per answer token. With `return_outputs` the outputs are empty."""
        call: Any = model
        unwrapped = self.accelerator.unwrap_model(model)
        self.contexts.read(model, unwrapped)
        teacher = self.teacher_states(model, inputs)
        predicting = predicting_positions(inputs["labels"])
        students = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if self.head is None:
            states = call(**students, use_cache=False).logits[predicting]
            loss = summed_divergence(states, teacher, _as_it_is, self.k)
        else:

            def take(states: torch.Tensor, head: Any) -> torch.Tensor:
                return summed_divergence(states[predicting], teacher, head, self.k)

            with taking_hidden_states(self.head, take):
                loss = call(**students, use_cache=False).logits.flatten()[0]
        if num_items_in_batch is None:
            loss = loss / len(teacher)
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def teacher_states(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """
        Return the base model's states for the tokens of the answers, with the document in its context.

        Args:
            model (`nn.Module`): The model, or what it is wrapped in.
            inputs (`dict`): A batch of [`DistillationCollator`].

        Returns:
            `torch.Tensor`: The hidden states before the output layer (tokens, hidden) or, where the model does more with its output than
            this layer, the logits (tokens, vocabulary), of the tokens that predict an answer's.
        """
        call: Any = model
        unwrapped = self.accelerator.unwrap_model(model)
        predicting = predicting_positions(inputs["teacher_labels"])
        window, rows = int(inputs["window"][0]), len(predicting)
        found: list[torch.Tensor] = []

        def take(states: torch.Tensor, head: Any) -> None:
            found.append(states[predicting])

        taking = nullcontext() if self.head is None else taking_hidden_states(self.head, take)
        with evaluating(unwrapped), adapters_off(unwrapped), taking:
            logits = call(
                input_ids=inputs["teacher_ids"],
                attention_mask=self.contexts.mask(window, inputs["teacher_mask"]),
                past_key_values=self.contexts.cache(window, rows),
                use_cache=True,
            ).logits
        return logits[predicting] if self.head is None else found[0]

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the divergence, without predictions."""
        return super().prediction_step(model, inputs, True, ignore_keys)


def _as_it_is(logits: torch.Tensor) -> torch.Tensor:
    return logits


# ------------------------------------------------------------------------------------------------------------------ data


def encode_conversations(
    conversations: Sequence[Conversation], chat: Chat, windows: Sequence[Window]
) -> list[dict[str, Any]]:
    """
    Return the rows of a [`DistillationTrainer`]'s dataset: each conversation without the document, and what follows it with it.

    Args:
        conversations (`Sequence[Conversation]`): The conversations.
        chat (`Chat`): The tokenizer's chat.
        windows (`Sequence[Window]`): The document's windows.

    Raises:
        ValueError: If a conversation's tokens do not begin with its window's.
    """
    rows = []
    for conversation in conversations:
        window = windows[conversation.window]
        student, teacher = chat.prompt(conversation.prompt), chat.prompt(conversation.prompt, window)
        start = len(window.token_ids)
        if tuple(teacher[:start]) != window.token_ids:
            raise ValueError(
                f"With the document in the context, the prompt {conversation.prompt!r} gives other tokens for the document than other "
                "prompts do, so that it cannot be read once for all. The chat template must put a special token between them."
            )
        answer = conversation.answer_ids
        rows.append(
            {
                "window": conversation.window,
                "input_ids": student + answer,
                "labels": [IGNORED_LABEL] * len(student) + answer,
                "teacher_ids": teacher[start:] + answer,
                "teacher_labels": [IGNORED_LABEL] * (len(teacher) - start) + answer,
            }
        )
    return rows


@dataclass(frozen=True)
class DistillationCollator:
    """Makes a batch of rows of [`encode_conversations`] that belong to one window, padded on the right."""

    padding: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the rows' columns, `attention_mask` and `teacher_mask`, each of shape (batch, tokens), and `window`."""
        return {
            "window": torch.tensor([row["window"] for row in rows]),
            "input_ids": padded([row["input_ids"] for row in rows], self.padding),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED_LABEL),
            "teacher_ids": padded([row["teacher_ids"] for row in rows], self.padding),
            "teacher_mask": padded([[1] * len(row["teacher_ids"]) for row in rows], 0),
            "teacher_labels": padded([row["teacher_labels"] for row in rows], IGNORED_LABEL),
        }


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return a mask (batch, tokens) of the tokens whose successor has a label."""
    return torch.cat([labels[:, 1:] != IGNORED_LABEL, labels.new_zeros(len(labels), 1, dtype=torch.bool)], dim=1)


class WindowSampler(Sampler[int]):
    """
    Draws batches of one window each, in a new order for every epoch. The last batch of a window is filled up with
    earlier rows of that window.

    Args:
        windows (`Sequence[int]`): Each row's window.
        batch_size (`int`): The rows of a batch.
        seed (`int`, *optional*): The seed of the order; `None` keeps the order of the rows.
    """

    def __init__(self, windows: Sequence[int], batch_size: int, seed: int | None) -> None:
        self.members: dict[int, list[int]] = {}
        for index, window in enumerate(windows):
            self.members.setdefault(window, []).append(index)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        size = self.batch_size
        return sum(-(-len(members) // size) * size for members in self.members.values())

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed} {self.epoch}")
        batches = []
        for members in self.members.values():
            order = list(members)
            if self.seed is not None:
                generator.shuffle(order)
            missing = -len(order) % self.batch_size
            order += [order[i % len(order)] for i in range(missing)]
            batches += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.seed is not None:
            generator.shuffle(batches)
        return (index for batch in batches for index in batch)


# ----------------------------------------------------------------------------------------------------------- distractors


def check_distractors(model: nn.Module, names: Sequence[str]) -> list[str]:
    """
    Return the names of adapters that are to be distractors.

    Raises:
        ValueError: If the model has no such adapter, or it is active itself.
    """
    for name in names:
        layers = layers_with_adapter(model, name)
        if any(name in layer.active_adapters for _, layer in layers):
            raise ValueError(
                f"The adapter {name!r} is active, so it is trained and cannot be a distractor. Activate the one to train alone."
            )
    return list(names)


def drawn_distractors(names: Sequence[str], seed: str) -> list[str]:
    """Return no names in half of all cases, otherwise a random number of random names."""
    generator = random.Random(seed)
    if not names or generator.random() < 0.5:
        return []
    return generator.sample(list(names), generator.randint(1, len(names)))
