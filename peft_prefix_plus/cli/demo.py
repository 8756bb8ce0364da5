"""
`prefix-plus demo`: table-to-text, the first task of prefix tuning, from nothing to a saved adapter.

The demo trains a small language model on generated text (see `demo_text.py`), without downloads, or loads a pretrained one. The model is
then frozen. With the code of `prefix-plus train`, a prefix learns sentences of a form that the text does not have. A new process loads the
adapter and must generate the same sentences.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..config import PrefixPlusConfig
from ..saving.files import write_atomically
from ..training.padding import IGNORED_LABEL, padding_id
from .demo_base import make_base_model
from .demo_text import examples, in_ordinary_text
from .errors import CommandError, check_numbers
from .generation import complete
from .loading import LARGEST_SEED, load_model, load_tokenizer
from .records import Collator, Record, encode
from .training import TrainingSettings, train


MAX_NEW_TOKENS = 40
PRETRAINING_STEPS = 3000


class Plan(NamedTuple):
    """The plan for training a prefix on a base model."""

    steps: int
    batch_size: int
    learning_rate: float


PLAN_OF_SMALL_MODEL = Plan(steps=600, batch_size=16, learning_rate=5e-3)
PLAN_OF_REAL_MODEL = Plan(steps=120, batch_size=8, learning_rate=5e-3)


@dataclass(kw_only=True)
class DemoSettings:
    """The options of `prefix-plus demo`; the help texts describe them."""

    model: str | None = field(
        default=None,
        metadata={"help": "A pretrained model, a directory or a name on the Hub. Default: train a small one here."},
    )
    output: Path = field(default=Path("demo-output"), metadata={"help": "The directory for the models and the data."})
    pretraining_steps: int | None = field(
        default=None,
        metadata={"help": f"Training steps of the small base model. Default: {PRETRAINING_STEPS}. Not with --model."},
    )
    prefix_steps: int | None = field(
        default=None,
        metadata={
            "help": f"Training steps of the prefix. Default: {PLAN_OF_SMALL_MODEL.steps}, or with --model {PLAN_OF_REAL_MODEL.steps}."
        },
    )
    training_tables: int = field(default=1000, metadata={"help": "Tables to train the prefix on."})
    held_out_tables: int = field(default=100, metadata={"help": "Tables to test it on."})
    seed: int = field(default=0, metadata={"help": "The random seed of the text, the models and the training."})

    def __post_init__(self) -> None:
        given = [name for name in ("pretraining_steps", "prefix_steps") if getattr(self, name) is not None]
        check_numbers(self, 1, *given, "training_tables", "held_out_tables")
        check_numbers(self, 0, "seed", at_most=LARGEST_SEED)
        if self.model is not None and self.pretraining_steps is not None:
            raise ValueError(
                f"`pretraining_steps` is {self.pretraining_steps}, but `model` is {self.model!r}, which is already trained. "
                "Give one of them."
            )

    @property
    def base(self) -> str:
        """The base model: a directory or a name on the Hub."""
        return str(self.output / "base") if self.model is None else self.model

    @property
    def dtype(self) -> str:
        """The base model's dtype."""
        return "float32" if self.model is None else fast_dtype()


class Score(NamedTuple):
    """The result of a model on the held-out tables."""

    loss: float
    exact_match: float
    sentences: list[str]


class Outcome(NamedTuple):
    """The scores of the base model and of the trained prefix, and the loss before the first step."""

    before: Score
    untrained_loss: float
    after: Score


def run_demo(settings: DemoSettings) -> Outcome:
    """
    Run the demo, and print what happens.

    Args:
        settings (`DemoSettings`): The options.

    Returns:
        `Outcome`: The scores on held-out tables, before and after.

    Raises:
        CommandError: If the model cannot be loaded, or the adapter generates other sentences in a new process.
    """
    started = time.monotonic()
    console = Console(soft_wrap=True)
    transformers_logging.disable_progress_bar()  # the model loads in an instant
    generator = random.Random(settings.seed)
    adapter = settings.output / "adapter"

    if settings.model is None:
        console.rule("1. A small language model")
        torch.set_num_threads(1)  # with matrices this small, more threads are slower
        steps = settings.pretraining_steps or PRETRAINING_STEPS
        make_base_model(Path(settings.base), steps, generator, settings.seed, console)
    else:
        console.rule("1. A pretrained language model")
    tokenizer = load_tokenizer(settings.base)
    model = load_model(settings.base, settings.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    console.print(f"{settings.base}: {model.num_parameters():,} parameters in {settings.dtype}.")

    console.rule("2. Tables that it has never seen described like this")
    settings.output.mkdir(parents=True, exist_ok=True)
    held_out = write_data(settings, generator)
    before = score(model, tokenizer, held_out)
    show(console, held_out, before)

    console.rule("3. A prefix, with the model frozen")
    torch.manual_seed(settings.seed)  # as in the training, for the same start
    model = get_peft_model(model, prefix_config(settings))
    untrained_loss = mean_loss(model, tokenizer, held_out)
    console.print(f"Loss before the first step: {untrained_loss:.3f} with the prefix, {before.loss:.3f} without.")
    del model  # the training loads its own
    model = train(training_settings(settings, adapter), prefix_config(settings))
    after = score(model, tokenizer, held_out)
    show(console, held_out, after)

    console.rule("4. The adapter in a new process")
    check_in_new_process(adapter, settings.output / "held-out.jsonl", settings.dtype, after.sentences)
    console.print(f"It writes the same {len(held_out)} sentences.")

    trainable, total = model.get_nb_trainable_parameters()
    size = (adapter / "adapter_model.safetensors").stat().st_size
    table = Table("", "base model", "untrained prefix", "trained prefix", title=f"{len(held_out)} held-out tables")
    table.add_row("loss", f"{before.loss:.3f}", f"{untrained_loss:.3f}", f"{after.loss:.3f}")
    table.add_row("exact match", f"{before.exact_match:.2f}", "", f"{after.exact_match:.2f}")
    table.add_row("trainable parameters", "", "", f"{trainable:,} of {total:,}")
    table.add_row("adapter's file", "", "", f"{size / 1024:.0f} KiB")
    console.print(table)
    console.print(f"All of it is in {settings.output}. It took {time.monotonic() - started:.0f} seconds.")
    return Outcome(before, untrained_loss, after)


def fast_dtype() -> str:
    """Return "bfloat16" if the machine has instructions for it, and else "float32"."""
    if torch.cuda.is_available():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = Path("/proc/cpuinfo")  # only Linux has it
        has_bfloat16 = flags.is_file() and re.search(r"bf16\b", flags.read_text(encoding="utf-8")) is not None
    return "bfloat16" if has_bfloat16 else "float32"


def write_data(settings: DemoSettings, generator: random.Random) -> list[Record]:
    """Write the tables and their sentences as JSON lines, and return the held-out ones."""
    drawn = examples(settings.training_tables + settings.held_out_tables, generator)
    if settings.model is not None:
        drawn = [in_ordinary_text(example) for example in drawn]
    held_out, training = drawn[: settings.held_out_tables], drawn[settings.held_out_tables :]
    for name, part in (("held-out.jsonl", held_out), ("training.jsonl", training)):
        write_atomically(str(settings.output / name), "".join(f"{json.dumps(example)}\n" for example in part))
    return [Record(**example) for example in held_out]


def prefix_config(settings: DemoSettings) -> PrefixPlusConfig:
    """Return the configuration of the demo's adapter."""
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    # a model as small as the demo's own wants its prefix far from the start, and the default's steps shrink on the way
    return replace(config, reparameterization="none") if settings.model is None else config


def training_settings(settings: DemoSettings, adapter: Path) -> TrainingSettings:
    """Return the options of the demo's training."""
    plan = PLAN_OF_SMALL_MODEL if settings.model is None else PLAN_OF_REAL_MODEL
    steps = settings.prefix_steps or plan.steps
    return TrainingSettings(
        model=settings.base,
        data=str(settings.output / "training.jsonl"),
        output=adapter,
        overwrite=True,
        max_steps=steps,
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        warmup_steps=steps // 20,
        schedule="cosine",
        dtype=settings.dtype,
        logging_steps=max(1, steps // 5),
        save_steps=steps,
        seed=settings.seed,
    )


@torch.no_grad()
def mean_loss(
    model: Any, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], batch_size: int = 10
) -> float:
    """Compute the loss on the records' completions, in nats per token."""
    model.eval()
    collate = Collator(padding_id(tokenizer))
    encoded = [encode(record, tokenizer) for record in records]
    total_loss, num_tokens = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = collate(encoded[start : start + batch_size])
        # the first token has no prediction, and a prompt comes first, so every label counts
        count = int((batch["labels"] != IGNORED_LABEL).sum())
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total_loss += float(model(**batch).loss) * count
        num_tokens += count
    return total_loss / num_tokens


def score(model: Any, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], batch_size: int = 50) -> Score:
    """Compute the loss on the records' completions, and generate the model's own."""
    prompts = [record.prompt for record in records]
    sentences = list(complete(model, tokenizer, prompts, MAX_NEW_TOKENS, batch_size, do_sample=False))
    num_right = sum(
        sentence.strip() == record.completion.strip() for sentence, record in zip(sentences, records, strict=True)
    )
    return Score(mean_loss(model, tokenizer, records), num_right / len(records), sentences)


def show(console: Console, records: Sequence[Record], result: Score, count: int = 3) -> None:
    """Print the score, and the first tables with the model's sentences and the wanted ones."""
    for record, sentence in list(zip(records, result.sentences, strict=True))[:count]:
        console.print(f"  {record.prompt}", style="dim", highlight=False)
        console.print(f"    writes  {sentence.strip()}", highlight=False)
        console.print(f"    wanted  {record.completion.strip()}", highlight=False)
    console.print(f"Loss {result.loss:.3f}, exact match {result.exact_match:.2f} on {len(records)} held-out tables.")


def check_in_new_process(adapter: Path, data: Path, dtype: str, expected: Sequence[str]) -> None:
    """
    Complete the prompts of the data with `prefix-plus generate` in a new process.

    Args:
        adapter (`Path`): The adapter.
        data (`Path`): The data.
        dtype (`str`): The base model's dtype.
        expected (`Sequence[str]`): The sentences.

    Raises:
        CommandError: If it fails, or generates other sentences.
    """
    arguments = ["--adapter", adapter, "--data", data, "--json-lines", "--max-new-tokens", MAX_NEW_TOKENS]
    arguments += ["--batch-size", 50, "--dtype", dtype]
    command = [sys.executable, "-m", "peft_prefix_plus.cli", "generate", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if result.returncode != 0:
        raise CommandError(f"The new process failed:\n{result.stderr}")
    written = [json.loads(line)["completion"] for line in result.stdout.splitlines()]
    if written != list(expected):
        raise CommandError("In a new process the adapter generates other sentences than before.")
