"""
Decoding the rows of a batch together, each with its own adapter, sampling, end and reader.

transformers' `generate` has one set of these for a batch. Here a logits processor chooses the token of each row and rules out all others,
and a stopping criterion ends each row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .adapted_model import LoadedAdapter
from .text_stream import TextStream


LOWEST_TEMPERATURE = 1e-4
"""Below this, sampling is greedy: the scaled logits would overflow, and the likeliest token has all of the probability anyway."""


class Sampling:
    """
    How the tokens of one row are chosen.

    Args:
        temperature (`float`, defaults to 1.0): The temperature; below `LOWEST_TEMPERATURE` the likeliest token is taken.
        top_p (`float`, defaults to 1.0): Draw among the likeliest tokens of this total probability.
        top_k (`int`, defaults to 0): Draw among this many of the likeliest tokens; 0 means all.
        min_p (`float`, defaults to 0.0): Draw among the tokens that are at least this many times as likely as the likeliest.
        repetition_penalty (`float`, defaults to 1.0): A penalty on the tokens of the prompt and the answer so far.
        seed (`int`, *optional*): The random seed; `None` means a new one.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> None:
        self._is_greedy = temperature < LOWEST_TEMPERATURE
        self._warpers = LogitsProcessorList()
        if repetition_penalty != 1.0:
            self._warpers.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
        self.takes_the_likeliest = self._is_greedy and not self._warpers
        if not self._is_greedy and temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if top_k > 0:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(top_p))
        if min_p > 0.0:
            self._warpers.append(MinPLogitsWarper(min_p))
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
        scores = self._warpers(torch.tensor([tokens], device=scores.device), scores)  # type: ignore[arg-type]
        if self._is_greedy:
            return int(scores.argmax())
        probabilities = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities.cpu(), 1, generator=self._generator))


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
