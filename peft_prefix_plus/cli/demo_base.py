"""The base model of `prefix-plus demo`: a small Llama and its tokenizer, trained on generated text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..training.padding import padding_id
from .demo_text import document
from .records import Collator, Record, encode


END, PADDING = "<end>", "<pad>"


def make_base_model(directory: Path, num_steps: int, generator: random.Random, seed: int, console: Console) -> None:
    """
    Train a tokenizer and a language model on generated text, and save both.

    Args:
        directory (`Path`): The directory for both.
        num_steps (`int`): The number of training steps.
        generator (`random.Random`): The random generator of the text.
        seed (`int`): The random seed of the model's start.
        console (`Console`): The console to print to.
    """
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


def document_batches(
    num_batches: int, generator: random.Random, batch_size: int = 6, pool: int = 20
) -> list[list[str]]:
    """Return batches of generated documents. The documents of a batch have similar lengths, so there is little padding."""
    batches: list[list[str]] = []
    while len(batches) < num_batches:
        drawn = sorted((document(generator) for _ in range(batch_size * pool)), key=lambda text: len(text.split()))
        batches += [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
    generator.shuffle(batches)
    return batches[:num_batches]


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Train a byte-pair tokenizer, with about one token per word of these texts."""
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
    """Train the whole model to predict the documents, one batch per step."""
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
