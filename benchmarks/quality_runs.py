"""The runs of benchmarks/quality.py: each has a file with its result, and several are performed at the same time."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from peft_prefix_plus.saving.files import write_atomically


class Run(Protocol):
    """One training, identified by what its result depends on."""

    @property
    def file_name(self) -> str: ...


AnyRun = TypeVar("AnyRun", bound=Run)


def file_name(*parts: object) -> str:
    """Return the name of a run's file, made of the parts that identify the run."""
    name = "-".join(str(part) for part in parts)
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name) + ".json"


class Results:
    """The results of runs, a file each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, run: Run) -> dict[str, Any] | None:
        path = self.directory / run.file_name
        return json.loads(path.read_text()) if path.exists() else None

    def add(self, run: Run, result: dict[str, Any]) -> None:
        write_atomically(str(self.directory / run.file_name), json.dumps(result))

    def of(self, run: Run) -> dict[str, Any]:
        """Return the result of a run that has been performed."""
        result = self.get(run)
        assert result is not None, f"{run} has not been performed"
        return result

    def loss(self, run: Run) -> float:
        return float(self.of(run)["loss"])


def rank(loss: float) -> float:
    """Return what losses are compared by: a loss that is not a number is the highest."""
    return math.inf if math.isnan(loss) else loss


def lowest(losses: Mapping[float, float]) -> float:
    """Return the learning rate with the lowest loss."""
    return min(losses, key=lambda rate: rank(losses[rate]))


# ------------------------------------------------------------------------------------------------------- performing


def progress_bar(console: Console) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(*columns, TimeRemainingColumn(), console=console)


def silence() -> None:
    """Keep libraries from writing between the progress bar's lines, here and in processes that are started from here."""
    os.environ.update(KINETO_LOG_LEVEL="99", TORCH_CPP_LOG_LEVEL="ERROR")  # torch's profiler
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()


def prepare_worker() -> None:
    silence()
    torch.set_num_threads(1)


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes with one thread each. If the block fails, runs that have not begun are dropped."""
    context = torch.multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def perform_all(
    runs: Sequence[AnyRun],
    perform: Callable[[AnyRun], dict[str, Any]],
    results: Results,
    pool: ProcessPoolExecutor,
    progress: Progress,
    name: str,
) -> None:
    """Perform the runs that have no result yet."""
    missing = [run for run in runs if results.get(run) is None]
    task = progress.add_task(name, total=len(runs), completed=len(runs) - len(missing))
    pending = {pool.submit(perform, run): run for run in missing}
    for future in as_completed(pending):
        results.add(pending[future], future.result())
        progress.advance(task)
