"""The data of the small benchmark of quality: what its base model is trained on and how, and the tasks that it is adapted to."""

from __future__ import annotations

import pydoc_data.topics
import random
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from quality_methods import Sizes
from quality_training import Batch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_prefix_plus.cli.demo_text import examples
from peft_prefix_plus.cli.records import Collator, Record, encode


BEGIN, END = "<s>", "</s>"


@dataclass(frozen=True)
class Scale:
    """The sizes of the base model and of the runs."""

    model: dict[str, int]
    vocab_size: int
    pretraining_steps: int
    pretraining_batch: int
    pretraining_tokens: int
    steps: int
    batch: int
    tokens: int
    sizes: dict[str, Sizes]  # by their share of the base model's parameters


SCALES = {
    "small": Scale(
        {
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
        vocab_size=2048,
        pretraining_steps=900,
        pretraining_batch=16,
        pretraining_tokens=128,
        steps=120,
        batch=8,
        tokens=64,
        sizes={"0.5 %": Sizes(20, 4, 80, 62, 50, (20, 16)), "2 %": Sizes(80, 16, 320, 62, 50, (80, 67))},
    ),
    "large": Scale(
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
        vocab_size=8192,
        pretraining_steps=6000,
        pretraining_batch=32,
        pretraining_tokens=512,
        steps=500,
        batch=16,
        tokens=256,
        sizes={"0.5 %": Sizes(32, 4, 256, 62, 50, (20, 30)), "2 %": Sizes(128, 16, 1024, 62, 50, (80, 140))},
    ),
}


# ------------------------------------------------------------------------------------------------------- base model


LIBRARY = Path(sysconfig.get_paths()["stdlib"])
"""The folder of Python's standard library."""


def library_files() -> list[Path]:
    """Return the files of the standard library, without tests and tables."""
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "lib2to3", "encodings"}
    return sorted(path for path in LIBRARY.rglob("*.py") if not skipped.intersection(path.relative_to(LIBRARY).parts))


def library_sources() -> list[str]:
    """Return the sources of the standard library, without tests and tables."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in library_files()]


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END)


def make_base(directory: Path, scale: Scale, device: str, progress: Progress) -> None:
    """Train the base model and its tokenizer and save both."""
    texts = library_sources()
    tokenizer = make_tokenizer(texts, scale.vocab_size)
    stream = token_stream(tokenizer, texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        **scale.model,
        vocab_size=scale.vocab_size,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = OneCycleLR(optimizer, max_lr=3e-3, total_steps=scale.pretraining_steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    task = progress.add_task("base model", total=scale.pretraining_steps)
    for _ in range(scale.pretraining_steps):
        ids = windows(stream, scale.pretraining_batch, scale.pretraining_tokens, generator).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.update(task, advance=1, description=f"base model, loss {loss.item():.2f}")
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Return the tokens of all texts, one after the other, each begun by the token for that."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [tokenizer.bos_token_id, *ids]])


def windows(stream: torch.Tensor, batch: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Return pieces of the stream, (batch, tokens), from anywhere in it."""
    starts = torch.randint(len(stream) - tokens, (batch,), generator=generator).tolist()
    return torch.stack([stream[start : start + tokens] for start in starts])


# ------------------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class Task:
    """What to learn: draws training batches, and has held-out ones."""

    draw: Callable[[torch.Generator], Batch]
    held_out: list[Batch]


def prose_task(tokenizer: PreTrainedTokenizerFast, scale: Scale) -> Task:
    """The reference documentation that comes with Python: English, with examples."""
    titles = sorted(pydoc_data.topics.topics)
    random.Random(0).shuffle(titles)
    texts = [pydoc_data.topics.topics[title] for title in titles]
    num_training = len(texts) * 9 // 10
    training, held_out = token_stream(tokenizer, texts[:num_training]), token_stream(tokenizer, texts[num_training:])
    held_out = held_out[: 64 * scale.tokens].unflatten(0, (-1, scale.tokens))

    def draw(generator: torch.Generator) -> Batch:
        ids = windows(training, scale.batch, scale.tokens, generator)
        return {"input_ids": ids, "labels": ids}

    return Task(draw, [{"input_ids": ids, "labels": ids} for ids in held_out.split(32)])


def table_task(tokenizer: PreTrainedTokenizerFast, scale: Scale) -> Task:
    """Tables as text, and the sentence that says the same, whose tokens alone count."""
    collate = Collator(tokenizer.pad_token_id)
    records = [encode(Record(**record), tokenizer) for record in examples(1100, random.Random(0))]
    held_out, training = records[:100], records[100:]

    def draw(generator: torch.Generator) -> Batch:
        return collate(
            [training[index] for index in torch.randint(len(training), (scale.batch,), generator=generator)]
        )

    return Task(draw, [collate(held_out[start : start + 25]) for start in range(0, len(held_out), 25)])


TASKS = {"prose": prose_task, "table": table_task}
