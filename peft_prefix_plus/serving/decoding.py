"""
Decoding the rows of a batch together, each with its own adapter, sampling, end and reader.

transformers' `generate` has one set of these for a batch. Here a logits processor chooses the token of each row and rules out all others,
and a stopping criterion ends each row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from .adapted_model import LoadedAdapter
from .text_stream import TextStream


LOWEST_TEMPERATURE = 1e-4
"""Below this, sampling is greedy: the scaled logits would overflow, and the likeliest token has all of the probability anyway."""

CHANGING_LOGITS = (
    *("sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("min_length", "min_new_tokens", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("remove_invalid_values", "renormalize_logits", "watermarking_config", "guidance_scale"),
)
"""The fields of a `generation_config` that change the logits. A batch has none of them: each row has its own processors."""

ABOUT_THE_END = ("forced_eos_token_id", "exponential_decay_length_penalty")
"""Those that have no meaning where no token ends the text."""

NOT_FOR_ROWS: dict[str, Any] = {"num_beams": 1, "guidance_scale": None}
"""Guidance would compute the model a second time for each row."""


class Sampling:
    """
    How the tokens of one row are chosen.

    Args:
        processors (`LogitsProcessorList`): What changes the row's logits: [`processors_of`].
        is_greedy (`bool`): Whether the likeliest token is taken, instead of drawing one.
        seed (`int`, *optional*): The random seed; `None` means a new one.
    """

    def __init__(self, processors: LogitsProcessorList, is_greedy: bool, seed: int | None = None) -> None:
        self._processors = processors
        self._is_greedy = is_greedy
        self.takes_the_likeliest = is_greedy and not processors
        self._generator = torch.Generator()  # on the CPU: a seed draws the same on every device
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def choose(self, tokens: list[int], scores: torch.Tensor) -> int:
        """
        Choose a token.

        Args:
            tokens (`list[int]`): The tokens so far, without padding.
            scores (`torch.Tensor`): The logits of the next token, (1, vocabulary).

        Returns:
            `int`: The token.
        """
        scores = self._processors(torch.tensor([tokens], device=scores.device), scores)  # type: ignore[arg-type]
        if self._is_greedy:
            return int(scores.argmax())
        probabilities = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities.cpu(), 1, generator=self._generator))


def processors_of(
    model: Any,
    prompt: Sequence[int],
    max_tokens: int,
    ends: Collection[int],
    fields: Mapping[str, Any],
    device: torch.device,
) -> LogitsProcessorList:
    """
    Return what changes the logits of one row: what the model's `generate` would use for its prompt alone.

    Many processors look at the tokens so far or count them. In a batch they would see the padding, and begin anew whenever rows join.

    Args:
        model (`PreTrainedModel`): The base model, whose `generation_config` says what changes its logits.
        prompt (`Sequence[int]`): The row's prompt.
        max_tokens (`int`): The most tokens to generate.
        ends (`Collection[int]`): The tokens that end the text.
        fields (`Mapping[str, Any]`): Fields of the request, which replace those of the `generation_config`.
        device (`torch.device`): The device of the logits.
    """
    config = copy.deepcopy(model.generation_config)
    changes = {**fields, **NOT_FOR_ROWS, **({} if ends else dict.fromkeys(ABOUT_THE_END))}
    changes |= {"max_length": len(prompt) + max_tokens, "eos_token_id": sorted(ends) or None}
    for name, value in changes.items():
        setattr(config, name, value)
    model._prepare_special_tokens(config, device=device)
    processors: LogitsProcessorList = model._get_logits_processor(
        config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=torch.tensor([list(prompt)], device=device),
        device=device,
    )
    return processors


@dataclass(frozen=True)
class Progress:
    """
    A message to a row's reader.

    Attributes:
        index (`int`): The index of the row among the rows of its request.
        text (`str`): The text that is ready.
        token_ids (`list[int]`): The tokens since the last message.
        finish_reason (`str`, *optional*): `"stop"` or `"length"` in the last message.
        error (`str`, *optional*): Why the row failed.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Row:
    """
    A prompt and its answer so far.

    Attributes:
        adapter (`LoadedAdapter`): The adapter.
        prompt (`list[int]`): The prompt's tokens.
        max_tokens (`int`): The most tokens to generate.
        sampling (`Sampling`): How to choose them.
        text (`TextStream`): Turns them into text.
        ends (`Collection[int]`): The tokens that end the text.
        send (`Callable[[Progress], None]`): Called with each message to the reader. It must not block.
        index (`int`): The index of the row among the rows of its request.
        tokens (`list[int]`): The tokens so far.
        is_over (`bool`): Whether the row has ended.
    """

    adapter: LoadedAdapter
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    text: TextStream
    ends: Collection[int]
    send: Callable[[Progress], None]
    index: int = 0
    tokens: list[int] = field(default_factory=list)
    is_over: bool = False

    def accept(self, token: int) -> None:
        """Add a token, and send it to the reader."""
        self.tokens.append(token)
        if token in self.ends:
            self._tell(self.text.end(), token, "stop")
            return
        piece = self.text.add(token)
        if self.text.has_stopped:
            self._tell(piece, token, "stop")
        elif len(self.tokens) == self.max_tokens:
            rest = self.text.end()
            self._tell(piece + rest, token, "stop" if self.text.has_stopped else "length")
        else:
            self._tell(piece, token, None)

    def _tell(self, text: str, token: int, finish_reason: str | None) -> None:
        self.is_over = self.is_over or finish_reason is not None
        self.send(Progress(self.index, text, [token], finish_reason))

    def fail(self, error: str) -> None:
        """End the row, and send the reason to the reader."""
        self.is_over = True
        self.send(Progress(self.index, error=error))

    def cancel(self) -> None:
        """End the row without a message, because its reader is gone."""
        self.is_over = True


class ChooseTokens(LogitsProcessor):
    """Chooses the next token of each row, and rules out all others."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, vocabulary) that allow only the chosen token of each row."""
        chosen = scores.argmax(dim=-1).tolist()
        for number, row in enumerate(self._rows):
            if row.is_over:
                continue
            if not row.sampling.takes_the_likeliest:
                chosen[number] = row.sampling.choose(row.prompt + row.tokens, scores[number : number + 1])
            row.accept(chosen[number])
        tokens = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


class RowsAreOver(StoppingCriteria):
    """Ends the rows that are over, or all rows if the batch must pause."""

    def __init__(self, rows: Sequence[Row], must_pause: Callable[[], bool]) -> None:
        self._rows = rows
        self._must_pause = must_pause

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return whether each row ends, (batch,)."""
        pauses = self._must_pause()
        return torch.tensor([pauses or row.is_over for row in self._rows], device=input_ids.device)
