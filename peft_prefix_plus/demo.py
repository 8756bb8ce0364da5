"""`prefix-plus demo`: prefix tuning's first task, table to text, from nothing to a saved adapter, with no downloads.

A small language model is made on generated text (see `demo_text.py`) and frozen. A prefix then teaches it, through the
very code of `prefix-plus train`, sentences of a form that the text does not have. A new process loads the adapter and
must write the same sentences.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from .cli.errors import CommandError, check_numbers
from .cli.generation import complete
from .cli.loading import LARGEST_SEED, load_model
from .cli.records import IGNORED_LABEL, Collator, EncodedRecord, Record, encode, padding_id
from .cli.training import TrainingSettings, train
from .config import PrefixPlusConfig
from .demo_text import document, examples
from .hub import write_atomically


END, PADDING = "<end>", "<pad>"
MAX_NEW_TOKENS = 40


@dataclass(kw_only=True)
class DemoSettings:
    """Where the demo writes and how long it trains."""

    output: Path = field(default=Path("demo-output"), metadata={"help": "Where the models and the data go."})
    pretraining_steps: int = field(default=3000, metadata={"help": "Steps in which the base model is made."})
    prefix_steps: int = field(default=600, metadata={"help": "Steps in which the prefix is trained."})
    training_tables: int = field(default=1000, metadata={"help": "Tables to train the prefix on."})
    held_out_tables: int = field(default=100, metadata={"help": "Tables to test it on."})
    seed: int = field(default=0, metadata={"help": "For the text, the models and the training."})

    def __post_init__(self) -> None:
        check_numbers(self, 1, "pretraining_steps", "prefix_steps", "training_tables", "held_out_tables")
        check_numbers(self, 0, "seed", at_most=LARGEST_SEED)


class Score(NamedTuple):
    """How a model does on the held-out tables."""

    loss: float
    exact_match: float
    sentences: list[str]


def run_demo(settings: DemoSettings) -> tuple[Score, Score]:
    """
    Run the demo, and print what happens.

    Args:
        settings (`DemoSettings`): Where it writes and how long it trains.

    Returns:
        `tuple[Score, Score]`: The score before the prefix and with it.

    Raises:
        CommandError: If the adapter, loaded in a new process, writes other sentences.
    """
    started = time.monotonic()
    console = Console(soft_wrap=True)
    transformers_logging.disable_progress_bar()  # loading this model is not worth a bar
    torch.set_num_threads(1)  # for matrices this small more threads only wait for each other
    generator = random.Random(settings.seed)
    base, adapter = settings.output / "base", settings.output / "adapter"
    settings.output.mkdir(parents=True, exist_ok=True)

    console.rule("1. A small language model")
    tokenizer = make_base_model(base, settings.pretraining_steps, generator, settings.seed, console)

    console.rule("2. Tables that it has never seen described like this")
    held_out = write_data(settings, generator)
    before = score(load_model(str(base)), tokenizer, held_out)
    show(console, held_out, before)

    console.rule("3. A prefix, with the model frozen")
    model = train(training_settings(settings, base, adapter), prefix_config())
    after = score(model, tokenizer, held_out)
    show(console, held_out, after)

    console.rule("4. The adapter in a new process")
    check_in_new_process(adapter, settings.output / "held-out.jsonl", after.sentences)
    console.print(f"It writes the same {len(held_out)} sentences.")

    trainable, total = model.get_nb_trainable_parameters()
    table = Table("", "before", "with the prefix", title=f"{len(held_out)} held-out tables")
    table.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row("exact match", f"{before.exact_match:.2f}", f"{after.exact_match:.2f}")
    table.add_row("trainable parameters", "", f"{trainable:,} of {total:,}")
    table.add_row("adapter's file", "", f"{(adapter / 'adapter_model.safetensors').stat().st_size / 1024:.0f} KiB")
    console.print(table)
    console.print(f"All of it is in {settings.output}. It took {time.monotonic() - started:.0f} seconds.")
    return before, after


# ---------------------------------------------------------------------------------------------------- the base model


def make_base_model(
    directory: Path, num_steps: int, generator: random.Random, seed: int, console: Console
) -> PreTrainedTokenizerBase:
    """Train a tokenizer and a language model on generated text, save both, and return the tokenizer."""
    batches = document_batches(num_steps, generator)
    tokenizer = make_tokenizer([text for batch in batches[: max(20, num_steps // 4)] for text in batch])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.07,  # near 1 / sqrt(hidden_size): at this size it learns to copy far sooner than at 0.02
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens. A document that it learns from:")
    console.print(f"  {batches[0][0]}", style="dim", highlight=False)
    pretrain(model, tokenizer, batches, console)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return tokenizer


def document_batches(
    num_batches: int, generator: random.Random, batch_size: int = 6, pool: int = 20
) -> list[list[str]]:
    """Return batches of generated documents; those of a batch are about equally long, so that little is padding."""
    batches: list[list[str]] = []
    while len(batches) < num_batches:
        drawn = sorted((document(generator) for _ in range(batch_size * pool)), key=lambda text: len(text.split()))
        batches += [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
    generator.shuffle(batches)
    return batches[:num_batches]


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Train a byte-pair tokenizer that, on these texts, comes close to a token per word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING)


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, batches: Sequence[Sequence[str]], console: Console
) -> None:
    """Train all of the model's parameters to predict the documents, one batch per step."""
    collate = Collator(padding_id(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(batches), pct_start=0.3)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    model.train()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("pretraining", total=len(batches))
        for texts in batches:
            loss = model(**collate([encode(Record("", text), tokenizer) for text in texts])).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"pretraining, loss {loss.item():.2f}")


# ---------------------------------------------------------------------------------------------------- the prefix


def write_data(settings: DemoSettings, generator: random.Random) -> list[Record]:
    """Write the tables and their sentences as JSON lines, and return the held-out ones."""
    drawn = examples(settings.training_tables + settings.held_out_tables, generator)
    held_out, training = drawn[: settings.held_out_tables], drawn[settings.held_out_tables :]
    for name, part in (("held-out.jsonl", held_out), ("training.jsonl", training)):
        write_atomically(str(settings.output / name), "".join(f"{json.dumps(example)}\n" for example in part))
    return [Record(**example) for example in held_out]


def prefix_config() -> PrefixPlusConfig:
    """The demo's adapter."""
    return PrefixPlusConfig(num_virtual_tokens=20)


def training_settings(settings: DemoSettings, base: Path, adapter: Path) -> TrainingSettings:
    """The demo's training."""
    return TrainingSettings(
        model=str(base),
        data=settings.output / "training.jsonl",
        output=adapter,
        overwrite=True,
        max_steps=settings.prefix_steps,
        batch_size=16,
        learning_rate=2e-3,
        warmup_steps=settings.prefix_steps // 20,
        schedule="cosine",
        logging_steps=max(1, settings.prefix_steps // 5),
        save_steps=settings.prefix_steps,
        seed=settings.seed,
    )


@torch.no_grad()
def score(model: Any, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], batch_size: int = 50) -> Score:
    """Compute the loss on the records' completions, and let the model write its own."""
    model.eval()
    collate = Collator(padding_id(tokenizer))
    encoded: list[EncodedRecord] = [encode(record, tokenizer) for record in records]
    total_loss, num_tokens = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = collate(encoded[start : start + batch_size])
        # the first token has no prediction, and a prompt comes first, so every label counts
        count = int((batch["labels"] != IGNORED_LABEL).sum())
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total_loss += float(model(**batch).loss) * count
        num_tokens += count
    prompts = [record.prompt for record in records]
    sentences = list(complete(model, tokenizer, prompts, MAX_NEW_TOKENS, batch_size, do_sample=False))
    num_right = sum(
        sentence.strip() == record.completion.strip() for sentence, record in zip(sentences, records, strict=True)
    )
    return Score(total_loss / num_tokens, num_right / len(records), sentences)


def show(console: Console, records: Sequence[Record], result: Score, count: int = 3) -> None:
    """Print the score, and the first tables with what the model writes and what it should."""
    for record, sentence in list(zip(records, result.sentences, strict=True))[:count]:
        console.print(f"  {record.prompt}", style="dim", highlight=False)
        console.print(f"    writes  {sentence.strip()}", highlight=False)
        console.print(f"    wanted  {record.completion.strip()}", highlight=False)
    console.print(f"Loss {result.loss:.3f}, exact match {result.exact_match:.2f} on {len(records)} held-out tables.")


def check_in_new_process(adapter: Path, data: Path, expected: Sequence[str]) -> None:
    """
    Let `prefix-plus generate` complete the data's prompts in a process of its own.

    Raises:
        CommandError: If it fails or writes anything but the expected sentences.
    """
    arguments = ["--adapter", adapter, "--data", data, "--json-lines", "--max-new-tokens", MAX_NEW_TOKENS]
    command = [sys.executable, "-m", "peft_prefix_plus.cli", "generate", *map(str, arguments), "--batch-size", "50"]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if result.returncode != 0:
        raise CommandError(f"The new process failed:\n{result.stderr}")
    written = [json.loads(line)["completion"] for line in result.stdout.splitlines()]
    if written != list(expected):
        raise CommandError("The adapter, loaded in a new process, writes other sentences than before.")
