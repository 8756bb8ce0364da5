"""
Measure how well a prefix stands for a document that the model does not know.

    python benchmarks/documents.py --model .cache/smollm2

The document and the questions are in documents_text.py. With the loss of a prefix per token of the answers,

    gap closed = (loss without document - loss with prefix) / (loss without document - loss with the document in context)

Every measurement has a file in --output; a run that is broken off goes on where it was. A way of making a prefix is a function in
`WAYS`.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from documents_text import END_OF_ANSWER, Question, document, held_out_questions, user_turn
from peft import CartridgeConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from quality_runs import Results, file_name, silence
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_prefix_plus import PrefixPlusConfig, initialize_from_text


TEXT = document() + "\n\n"
ROWS = 32
NOTHING, CONTEXT = "without the document", "the document in context"


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Encoded:
    """A question as the model gets it, and its answer."""

    prompt: list[int]
    answer: list[int]


def encode(tokenizer: Any, question: Question) -> Encoded:
    prompt = tokenizer(user_turn(question.question), add_special_tokens=False)["input_ids"]
    return Encoded(prompt, tokenizer(question.answer + END_OF_ANSWER, add_special_tokens=False)["input_ids"])


def batches(rows: list[Encoded]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the questions with their answers, those of about the same length together, padded on the right."""
    rows = sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))
    for start in range(0, len(rows), ROWS):
        chunk = rows[start : start + ROWS]
        length = max(len(row.prompt) + len(row.answer) for row in chunk)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in chunk:
            padding = length - len(row.prompt) - len(row.answer)
            batch["input_ids"].append([*row.prompt, *row.answer, *[0] * padding])
            batch["attention_mask"].append([1] * (length - padding) + [0] * padding)
            batch["labels"].append([*[-100] * len(row.prompt), *row.answer, *[-100] * padding])
        yield {name: torch.tensor(values) for name, values in batch.items()}


@torch.no_grad()
def answer_loss(model: Any, rows: list[Encoded], cache: Any = None) -> float:
    """Return the loss per token of the answers, after the tokens of a cache if one is given."""
    total = count = 0.0
    for batch in batches(rows):
        labels, inputs = batch.pop("labels"), dict(batch)
        if cache is not None:
            past = copy.deepcopy(cache)
            past.batch_repeat_interleave(len(labels))
            seen = inputs["attention_mask"].new_ones(len(labels), past.get_seq_length())
            inputs |= {"past_key_values": past, "attention_mask": torch.cat([seen, inputs["attention_mask"]], dim=1)}
        logits = model(**inputs).logits[:, :-1].float().flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item()
        count += (labels[:, 1:] != -100).sum().item()
    return total / count


@torch.no_grad()
def recalled(model: Any, tokenizer: Any, questions: list[Question], context: list[int]) -> float:
    """Return the share of questions whose greedy answer names the fact."""
    found = 0
    for question in questions:
        row = encode(tokenizer, question)
        ids = torch.tensor([[*context, *row.prompt]])
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(row.answer) + 8,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        found += question.fact.lower() in answer.lower()
    return found / len(questions)


def gap_closed(loss: float, without: float, in_context: float) -> float:
    return (without - loss) / (without - in_context)


# --------------------------------------------------------------------------------------------------------------- ways


def prompts() -> list[str]:
    """What a user could ask about any part of the document, by its headings alone."""
    titles = [line.split(". ", 1)[1] for line in TEXT.splitlines() if line.split(".")[0].isdigit()]
    return [user_turn(f"What does the handbook say about this: {title}?") for title in titles]


def from_text(
    position_free: bool = False, has_prompts: bool = False, **arguments: Any
) -> Callable[[Any, Any, int], Any]:
    """Return a way that starts a prefix from the document, at fixed positions unless `position_free` says otherwise."""

    def make(base: Any, tokenizer: Any, tokens: int) -> Any:
        fields = {"num_virtual_tokens": tokens, "position_free": position_free, "decoupled": False}
        model = get_peft_model(base, PrefixPlusConfig(task_type="CAUSAL_LM", **fields))
        initialize_from_text(model, tokenizer, TEXT, prompts=prompts() if has_prompts else None, **arguments)
        return model

    return make


def cartridge(base: Any, tokenizer: Any, tokens: int) -> Any:
    """PEFT's CARTRIDGE with its own start from the document."""
    model = get_peft_model(base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    initialize_kv_prefix_from_text(model, tokenizer, text=TEXT, use_chat_template=False)
    return model


WAYS: dict[str, Callable[[Any, Any, int], Any]] = {
    "CARTRIDGE, its own start": cartridge,
    "first": from_text(method="first"),
    "attention": from_text(method="attention"),
    "attention, position-free": from_text(method="attention", position_free=True),
    "attention, with prompts": from_text(method="attention", has_prompts=True),
}


# ---------------------------------------------------------------------------------------------------------- benchmark


@dataclass(frozen=True)
class Run:
    """One way at one length, or what it is measured against."""

    model: str
    way: str
    tokens: int

    @property
    def file_name(self) -> str:
        return file_name(self.model, self.way, self.tokens)


def perform(run: Run, is_answering: bool) -> dict[str, Any]:
    """Make a prefix and measure it: `loss`, `seconds` that making it took, and with --answers `recalled`."""
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.bfloat16).eval()
    questions, cache, context = held_out_questions(), None, []
    rows = [encode(tokenizer, question) for question in questions]
    started = time.perf_counter()
    if run.way == CONTEXT:
        context = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            cache = model(torch.tensor([context]), logits_to_keep=1).past_key_values
    elif run.way != NOTHING:
        model = WAYS[run.way](model, tokenizer, run.tokens).eval()
    result: dict[str, Any] = {"seconds": time.perf_counter() - started, "loss": answer_loss(model, rows, cache)}
    if is_answering:
        result["recalled"] = recalled(model, tokenizer, questions, context)
    return result


def report(results: Results, options: argparse.Namespace, runs: list[Run], console: Console) -> None:
    without, in_context = (results.loss(Run(options.model, way, 0)) for way in (NOTHING, CONTEXT))
    table = Table(title=f"loss {without:.3f} without the document, {in_context:.3f} with it in context")
    for column in ("prefix", "tokens", "loss", "gap closed", "facts", "seconds"):
        table.add_column(column, justify="left" if column == "prefix" else "right")
    for run in runs:
        result = results.of(run)
        closed = gap_closed(result["loss"], without, in_context)
        facts = f"{result['recalled']:.0%}" if "recalled" in result else ""
        figures = (f"{result['loss']:.3f}", f"{closed:.1%}", facts, f"{result['seconds']:.0f}")
        table.add_row(run.way, str(run.tokens or ""), *figures)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=".cache/smollm2", help="a causal language model with SmolLM2's chat template"
    )
    parser.add_argument("--output", type=Path, default=Path("documents-output"), help="a directory for results")
    parser.add_argument("--tokens", type=int, nargs="+", default=[160, 80, 32], help="lengths of the prefix")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="ways of making a prefix")
    parser.add_argument("--answers", action="store_true", help="also let the model answer, and count the facts")
    options = parser.parse_args()
    silence()
    warnings.filterwarnings("ignore")
    results, console = Results(options.output), Console()
    runs = [Run(options.model, way, 0) for way in (NOTHING, CONTEXT)]
    runs += [Run(options.model, way, tokens) for tokens in options.tokens for way in options.ways]
    for run in runs:
        found = results.get(run)
        if found is None or (options.answers and "recalled" not in found):
            results.add(run, perform(run, options.answers))
            console.print(f"{run.way}, {run.tokens}: loss {results.loss(run):.3f}")
    report(results, options, runs, console)


if __name__ == "__main__":
    main()
