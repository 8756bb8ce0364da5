"""
Runs waiting requests in batches of one model, in a thread of its own.

New rows join a running batch: `generate` stops, and is called again with the tokens so far and the prompts of the new rows. So any
model with `generate` works, but the rows that were running are computed again. That takes no more than half of the time: a batch runs
for at least as long as its first step took before it can be stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from transformers import LogitsProcessorList, StoppingCriteriaList

from .adapted_model import AdaptedModel
from .decoding import CHANGING_LOGITS, ChooseTokens, Row, RowsAreOver
from .left_padding import left_padded


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PADDING = 0
"""The token to pad with. Its value does not matter, because no real token sees it."""

GENERATION: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "pad_token_id": PADDING,
    **dict.fromkeys(("eos_token_id", "max_length", *CHANGING_LOGITS)),
}
"""Overrides the settings of the model's `generation_config` that each row chooses for itself."""

STOPPING = "The server is stopping."


class StoppedError(Exception):
    """The batcher has been stopped and accepts nothing more."""


class Batcher:
    """
    The thread that the model runs in.

    Args:
        model (`AdaptedModel`): The model. Nothing else may use it from now on.
        max_batch_size (`int`): The most rows at a time.
        num_positions (`int`, *optional*): The number of positions that the model has; `None` if there is no limit.
    """

    def __init__(self, model: AdaptedModel, max_batch_size: int, num_positions: int | None = None) -> None:
        self._model = model
        self._max_batch_size = max_batch_size
        self._num_positions = num_positions
        self._waiting: deque[Row] = deque()
        self._changes: deque[tuple[Callable[[AdaptedModel], Any], Future[Any]]] = deque()
        self._running: list[Row] = []
        self._is_stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="prefix-plus-serve", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, make_rows: Callable[[], Sequence[Row]]) -> list[Row]:
        """
        Queue rows.

        Args:
            make_rows (`Callable`): Returns the rows. No adapter is removed between this call and the queueing.

        Returns:
            `list[Row]`: The rows.

        Raises:
            StoppedError: If the batcher has been stopped.
        """
        with self._changed:
            if self._is_stopping:
                raise StoppedError(STOPPING)
            rows = list(make_rows())
            self._waiting += rows
            self._changed.notify()
        return rows

    def change(self, function: Callable[[AdaptedModel], Result]) -> Future[Result]:
        """
        Queue a function that changes the model's adapters. It runs between two steps.

        Args:
            function (`Callable[[AdaptedModel], Result]`): The function.

        Returns:
            `Future`: Its result, or the exception that it raised.

        Raises:
            StoppedError: If the batcher has been stopped.
        """
        future: Future[Result] = Future()
        with self._changed:
            if self._is_stopping:
                raise StoppedError(STOPPING)
            self._changes.append((function, future))
            self._changed.notify()
        return future

    def stop(self) -> None:
        """Stop the thread. Rows that are not done fail."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._go_on()
        finally:
            with self._changed:
                self._is_stopping = True
            for row in (*self._running, *self._waiting):
                row.fail(STOPPING)
            for _, future in self._changes:
                if future.set_running_or_notify_cancel():
                    future.set_exception(StoppedError(STOPPING))

    def _go_on(self) -> None:
        """Wait for rows or changes, apply the changes, and decode until the batch pauses."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._waiting or self._changes or self._is_stopping)
            changes, self._changes = self._changes, deque()
        for function, future in changes:
            if not future.set_running_or_notify_cancel():
                continue  # the client is gone
            try:
                future.set_result(function(self._model))
            except Exception as error:  # noqa: BLE001
                # whatever a broken file raises
                future.set_exception(error)
        with self._changed:
            while self._waiting and len(self._running) < self._max_batch_size:
                self._running.append(self._waiting.popleft())
            in_use = {row.adapter for row in (*self._running, *self._waiting)}
        # without the lock, which `submit` waits for: names change in this thread alone, so no row gets an adapter without one
        self._model.drop_unnamed(in_use)
        if not self._is_stopping:
            self._decode_or_fail(self._running)
            self._running = [row for row in self._running if not row.is_over]

    def _decode_or_fail(self, rows: Sequence[Row]) -> None:
        """Decode rows. If that fails, decode each alone, so that only the rows at fault fail."""
        try:
            self._decode(rows)
        except Exception as error:  # whatever a model raises, the server goes on
            if len(rows) > 1:
                logger.warning("A batch of %d rows failed (%s); each is tried alone.", len(rows), error)
                for row in rows:
                    self._decode_or_fail([row])
                return
            logger.exception("A request failed.")
            rows[0].fail(f"The model failed: {type(error).__name__}: {error}")

    def _decode(self, rows: Sequence[Row]) -> None:
        """Decode the rows until they are over or the batch pauses."""
        rows = [row for row in rows if not row.is_over]
        if not rows:
            return
        device = self._model.base_model.device
        input_ids, attention_mask = left_padded([row.prompt + row.tokens for row in rows], PADDING)
        self._model.generate(
            [row.adapter for row in rows],
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            **GENERATION,
            max_new_tokens=max(row.max_tokens - len(row.tokens) for row in rows),
            logits_processor=LogitsProcessorList([ChooseTokens(rows)]),
            stopping_criteria=StoppingCriteriaList([RowsAreOver(rows, self._pauses(rows))]),
        )

    def _pauses(self, rows: Sequence[Row]) -> Callable[[], bool]:
        """Return a function that is called after each step of these rows, and tells whether to pause the batch."""
        start = time.monotonic()
        first_step: float | None = None
        lengths = [len(row.prompt) + len(row.tokens) for row in rows]

        def must_pause() -> bool:
            nonlocal first_step
            now = time.monotonic()
            first_step = first_step or now - start
            for number in range(len(rows)):
                lengths[number] += 1
            over = [length for row, length in zip(rows, lengths, strict=True) if row.is_over]
            if self._num_positions is not None and max(over, default=0) >= self._num_positions:
                return True  # rows that are over go on with the batch, but not beyond the model's positions
            if now - start < 2 * first_step:
                return self._is_stopping
            has_place = len(self._running) - len(over) < self._max_batch_size
            is_half_empty = 2 * len(over) >= len(rows)
            return self._is_stopping or is_half_empty or bool(self._changes) or (has_place and bool(self._waiting))

        return must_pause
