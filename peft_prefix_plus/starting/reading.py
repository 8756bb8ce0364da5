"""
A base model's attention modules while it reads a text: the text's keys and values, and the queries that come after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..probing.inputs import positions_before
from ..probing.modules import attention_modules, execution_device
from ..probing.recording import evaluating, recording
from ..probing.rotations import observing_rotations
from ..probing.tensors import LACK_OF_MEMORY
from .compaction import Reading
from .fitting import KeyValue


PIECE = 64
"""How many tokens of a text that is read again see each other: as many as follow a prefix in a short prompt."""

MOST_QUERIES = 4096
"""The most queries that one head of keys is fitted to."""

MEASURED = 8
"""One of how many queries is left out of the fit, and measures it."""


def read(model: nn.Module, token_ids: Sequence[int]) -> dict[str, KeyValue]:
    """
    Return the keys and values that a base model computes for a text before an input, (heads, tokens, dim), by
    attention module.

    Raises:
        TypeError: If the model is not one of transformers.
        ValueError: If it cannot read a text.
    """
    found: dict[str, KeyValue] = {}

    def record(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: Any) -> None:
        found.setdefault(name, (key[0], value[0]))

    _run(model, token_ids, (), False, record)
    return found


def read_again(
    model: nn.Module,
    token_ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    key_values: Mapping[str, KeyValue],
    unrotated: Collection[str],
    use: Callable[[str, list[Reading], list[Reading]], None],
) -> None:
    """
    Let a base model read a text and then prompts, and pass on how the prompts' queries attend in each attention
    module. Each prompt attends only to the text and itself, as it would after a prefix. For a prefix that meets
    unrotated queries, each prompt begins at the position where an input would, because its keys cannot distinguish
    near from far queries. Otherwise the prompts follow each other. On SmolLM2 each choice closed more of the gap than
    its opposite.

    Args:
        model (`nn.Module`): The base model.
        token_ids (`Sequence[int]`): The text.
        prompts (`Sequence[Sequence[int]]`): The prompts' tokens.
        key_values (`Mapping[str, KeyValue]`): The text's own keys and values in the modules that count, as [`read`] returns them.
        unrotated (`Collection[str]`): The modules whose prefix meets queries before their rotation.
        use (`Callable`): Takes the name of a module and, for each of its heads of keys, the queries to fit a prefix to, and those
            to measure it by. It is called while the model runs, so that the queries of one module at a time are in memory.
    """
    blocks = torch.cat([torch.full((len(prompt),), index) for index, prompt in enumerate(prompts)])
    modules = attention_modules(model)
    seen: set[str] = set()

    with observing_rotations({name: modules[name] for name in unrotated}) as rotations:

        def record(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: Any) -> None:
            rotation, embeddings = rotations.of_query(name, query) if name in unrotated else (None, None)
            if name not in key_values or name in seen:
                return
            seen.add(name)
            query = query.detach()
            met = query if rotation is None or embeddings is None else rotation.undo(query, embeddings).detach()
            after = (query.shape[2] - len(blocks), key.shape[2] - len(blocks))
            is_causal = query.shape[2] == key.shape[2] and not _sees_ahead(modules[name])
            parts = _Parts(
                met[0, :, after[0] :].float() * float(scale),
                query[0, :, after[0] :].float() * float(scale),
                key[0, :, after[1] :].detach().float(),
                value[0, :, after[1] :].detach().float(),
            )
            use(name, *parts.readings(*key_values[name], blocks.to(query.device), is_causal))

        _run(model, token_ids, prompts, bool(unrotated), record)


class _Parts:
    """The queries, keys and values of the prompts in one attention module."""

    def __init__(self, met: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        self.met, self.query, self.key, self.value = met, query, key, value

    def readings(
        self, text_key: torch.Tensor, text_value: torch.Tensor, blocks: torch.Tensor, is_causal: bool
    ) -> tuple[list[Reading], list[Reading]]:
        """Return what the queries of each head of keys see: those to fit to, and those to measure by."""
        sees = blocks[:, None] == blocks[None]
        if is_causal:
            sees = sees.tril()
        group = self.query.shape[0] // self.key.shape[0]
        stride = max(1, -(-group * len(blocks) // MOST_QUERIES))
        used = torch.arange(0, len(blocks), stride, device=blocks.device)
        is_measured = (torch.arange(len(used) * group, device=blocks.device) % MEASURED) == MEASURED - 1
        fitted, measured = [], []
        for head, (key, value) in enumerate(zip(self.key, self.value, strict=True)):
            heads = slice(head * group, (head + 1) * group)
            query = self.query[heads, used]
            scores = (query @ key.T).masked_fill(~sees[used], -torch.inf)
            reading = Reading.of(
                self.met[heads, used].flatten(0, 1),
                query.flatten(0, 1),
                text_key[head].float(),
                text_value[head].float(),
                scores.logsumexp(dim=-1).flatten(),
                (scores.softmax(dim=-1) @ value).flatten(0, 1),
            )
            fitted.append(reading.rows(~is_measured))
            measured.append(reading.rows(is_measured).without_shares())
        return fitted, measured


def _sees_ahead(module: nn.Module) -> bool:
    return getattr(module, "is_causal", True) is False


def _run(
    model: nn.Module,
    token_ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    begin_anew: bool,
    record: Callable[..., None],
) -> None:
    """Run a base model on a text that stands before an input, and prompts after it, each or only the first where an input begins."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"A text can be read by a model of transformers, got a {type(model).__name__}.")
    device = execution_device(model)
    text = torch.tensor([list(token_ids)], device=device)
    tokens = torch.tensor([[*token_ids, *(token for prompt in prompts for token in prompt)]], device=device)
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    names = ("input_ids", "decoder_input_ids") if is_encoder_decoder else ("input_ids",)
    before = positions_before(model, dict.fromkeys(names, text))
    lengths = [len(prompt) for prompt in prompts] if begin_anew else [tokens.shape[1] - text.shape[1]]
    after = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    inputs = {name: torch.cat([positions, after], dim=1) for name, positions in before.items()}
    inputs.update(dict.fromkeys(names, tokens))
    if begin_anew and "attention_mask" in inspect.signature(model.forward).parameters:
        # without a mask transformers takes positions that begin anew for packed sequences, which do not see each other
        inputs["attention_mask"] = torch.ones_like(tokens)
    with recording(attention_modules(model), record), evaluating(model):
        try:
            model(**inputs)
        except LACK_OF_MEMORY:
            raise
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot read a text of {tokens.shape[1]} tokens by itself: a forward with "
                f"{sorted(inputs)} failed ({type(error).__name__}: {error}). Use initialize_from_key_values."
            ) from error
