"""
Two documents in one prompt: prefixes that were distilled each alone, and those that were distilled beside the other, composed.

    python benchmarks/documents_composition.py --model .cache/smollm2 --output .cache/documents-composed

The documents are two parts of the handbook in documents_text.py that share no section. Each is measured by the loss per answer token on its
own questions, and by the part of the gap that a prefix closes; see documents_distillation.py. All four prefixes have as many steps on the
same conversations, whose answers are the documents' own words. A run that is broken off goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from documents_distillation import WINDOW_TOKENS, Place, answer_loss, kept
from documents_text import FIRST, SECOND, document, held_out_questions
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, TrainingArguments

from peft_prefix_plus import PrefixPlusConfig, SelfStudy, compose, distill
from peft_prefix_plus.training.document import Chat, read_text
from peft_prefix_plus.training.self_study import TEMPLATES


PARTS = {"a": FIRST, "b": SECOND}

BESIDE = {"a": (), "b": (), "a beside b": ("b",), "b beside a": ("a beside b",)}
"""The prefixes in the order in which they are made, and the distractors of each; the first letter is the document."""

WAYS = {"each alone": ("a", "b"), "with distractors": ("a beside b", "b beside a")}
"""The prefixes that are composed."""


def run_directory(options: argparse.Namespace) -> Path:
    directory: Path = options.output / f"{options.tokens}tokens-{options.steps}steps"
    return directory


def place_of(options: argparse.Namespace, part: slice) -> Place:
    """Return one of the documents with its questions."""
    chat = Chat(AutoTokenizer.from_pretrained(options.model))
    (window,) = read_text(chat, document(part), WINDOW_TOKENS)
    return Place(options.model, chat, window, held_out_questions(part))


def trained(base: Any, places: dict[str, Place], options: argparse.Namespace) -> PeftModel:
    """Return the model with all prefixes."""
    model = base
    for name, distractors in BESIDE.items():
        place = places[name[0]]
        print(
            f"{name}: {len(place.window.token_ids)} tokens, distractors {', '.join(distractors) or 'none'}", flush=True
        )
        arguments = TrainingArguments(
            output_dir=str(run_directory(options) / name.replace(" ", "-")),
            max_steps=options.steps,
            learning_rate=6e-3,
            per_device_train_batch_size=4,
            save_steps=10,
            save_total_limit=2,
            logging_steps=10,
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        model = distill(
            model,
            place.chat.tokenizer,
            document(PARTS[name[0]]),
            args=arguments,
            config=PrefixPlusConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=options.tokens,
                decoupled=False,
                gating=False,
                position_free=False,
            ),
            adapter_name=name,
            self_study=SelfStudy(
                num_conversations=4 * options.steps, templates=[each for each in TEMPLATES if each.recites]
            ),
            distractors=list(distractors),
        )
    return model


def measure(places: dict[str, Place], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the loss on each document's questions, for no prefix, the document in the context, and every way."""
    base = places["a"].base()
    losses = {
        "none": {name: answer_loss(base, place) for name, place in places.items()},
        "in the context": {name: answer_loss(base, place, has_document=True) for name, place in places.items()},
    }
    model = trained(base, places, options)
    for way, names in WAYS.items():
        for name in names:
            model.set_adapter(name)
            losses[name] = {each: answer_loss(model, place) for each, place in places.items()}
        composed = f"composed, {way}"
        compose(model, names, new=composed)
        model.set_adapter(composed)
        losses[composed] = {each: answer_loss(model, place) for each, place in places.items()}
    return losses


def report(console: Console, losses: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    table = Table("prefix", *(f"{what} {name}" for name in PARTS for what in ("loss on", "gap closed of")))
    for way, found in losses.items():
        cells = []
        for name in PARTS:
            without, best = losses["none"][name], losses["in the context"][name]
            cells += [f"{found[name]:.3f}", f"{(without - found[name]) / (without - best):.0%}"]
        table.add_row(way, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2", help="a chat model")
    parser.add_argument("--output", type=Path, default=Path(".cache/documents-composed"))
    parser.add_argument("--tokens", type=int, default=64, help="virtual tokens of each prefix")
    parser.add_argument("--steps", type=int, default=40, help="steps for each prefix, of 4 conversations")
    options = parser.parse_args()
    torch.set_num_threads(1)
    places = {name: place_of(options, part) for name, part in PARTS.items()}
    report(Console(), kept(run_directory(options) / "losses.json", lambda: measure(places, options)))


if __name__ == "__main__":
    main()
