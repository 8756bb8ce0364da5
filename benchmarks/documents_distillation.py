"""
How much of a document a distilled prefix holds: PREFIX_PLUS and PEFT's CARTRIDGE, trained on the same conversations for as many steps.

    python benchmarks/documents_distillation.py --model .cache/smollm2 --output .cache/documents

The gap is the loss per answer token without the document minus that with it in the context, on questions that are not trained on. What a
prefix closes of it is (loss without - loss with the prefix) / gap. A share of facts is that of the questions whose greedy answer has the
fact in it. Time is CPU time of one thread, whatever else the machine does. A run that is broken off goes on where it was, and one that
has ended is not repeated; --done reports without running.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from documents_text import Question, document, held_out_questions
from peft import CartridgeConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from peft_prefix_plus import DistillationTrainer, PrefixPlusConfig, SelfStudy
from peft_prefix_plus.training.checkpoints import checkpoints
from peft_prefix_plus.training.conversations import Conversation, ConversationFile
from peft_prefix_plus.training.distill import start_prefix
from peft_prefix_plus.training.distillation import DistillationCollator, encode_conversations, predicting_positions
from peft_prefix_plus.training.document import Chat, Window, read_text
from peft_prefix_plus.training.padding import padding_id
from peft_prefix_plus.training.self_study import TEMPLATES, Writer, study
from peft_prefix_plus.training.teacher import Contexts


WINDOW_TOKENS = 4096
BATCH = 4


@dataclass(frozen=True)
class Method:
    """
    How a prefix is made.

    Attributes:
        rate: The learning rate.
        start: `start` of `distill`; `None` for CARTRIDGE, which starts from the document's first tokens by PEFT's own function.
        position_free: See `PrefixPlusConfig`.
        keeps_sink: Whether the prefix's first keys and values stay as they start, as CARTRIDGE's do.
    """

    rate: float
    start: str | None = None
    position_free: bool = False
    keeps_sink: bool = False


METHODS = {
    "PREFIX_PLUS": Method(6e-3, "attention"),
    "PREFIX_PLUS, start: first": Method(6e-3, "first"),
    "PREFIX_PLUS, frozen sink": Method(6e-3, "attention", keeps_sink=True),
    "PREFIX_PLUS, position-free": Method(6e-3, "attention", position_free=True),
    "PREFIX_PLUS, position-free, quiet start": Method(3e-3, "config", position_free=True),
    "CARTRIDGE": Method(2e-2),
}


@dataclass(frozen=True)
class Place:
    """What all runs share."""

    model: str
    chat: Chat
    window: Window
    questions: Sequence[Question]

    def base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model).requires_grad_(False).eval()

    def held_out(self) -> list[dict[str, Any]]:
        asked = [Conversation(each.question, self.chat.answer(each.answer)) for each in self.questions]
        return sorted(encode_conversations(asked, self.chat, [self.window]), key=lambda row: len(row["input_ids"]))


# ------------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def answer_loss(model: Any, place: Place, has_document: bool = False) -> float:
    """Return the loss per token of the answers to the held-out questions, with or without the document in the context."""
    model.eval()
    contexts = Contexts([place.window.token_ids])
    if has_document:
        contexts.read(model, model)
    total, count, rows = 0.0, 0, place.held_out()
    for start in range(0, len(rows), 8):
        batch = DistillationCollator(padding_id(place.chat.tokenizer))(rows[start : start + 8])
        if has_document:
            labels = batch["teacher_labels"]
            mask = contexts.mask(0, batch["teacher_mask"])
            cache = contexts.cache(0, len(labels))
            logits = model(input_ids=batch["teacher_ids"], attention_mask=mask, past_key_values=cache).logits
        else:
            labels = batch["labels"]
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        predicting = predicting_positions(labels)
        wanted = labels[:, 1:][predicting[:, :-1]]
        total += torch.nn.functional.cross_entropy(logits[predicting].float(), wanted, reduction="sum").item()
        count += len(wanted)
    return total / count


def share_of_facts(model: Any, place: Place, has_document: bool = False) -> float:
    """Return the share of the questions whose greedy answer has the fact in it."""
    prompts = [each.question for each in place.questions]
    limit = 8 + max(len(place.chat.answer(each.answer)) for each in place.questions)
    if has_document:
        writer = Writer(model, place.chat, [place.window], temperature=0)
        answers = [
            answer
            for start in range(0, len(prompts), 8)
            for answer in writer.answers(prompts[start : start + 8], [0] * len(prompts[start : start + 8]), limit)
        ]
    else:
        answers = [greedy_answer(model.eval(), place.chat, prompt, limit) for prompt in prompts]
    texts = [place.chat.text(answer).lower() for answer in answers]
    return sum(each.fact.lower() in text for each, text in zip(place.questions, texts, strict=True)) / len(prompts)


@torch.no_grad()
def greedy_answer(model: Any, chat: Chat, prompt: str, limit: int) -> list[int]:
    """Answer alone in a batch: PEFT's prompt learning ignores position ids in `generate`, so padding moves the text away from the prefix."""
    ids = torch.tensor([chat.prompt(prompt)])
    output = model.generate(
        input_ids=ids, max_new_tokens=limit, do_sample=False, pad_token_id=padding_id(chat.tokenizer)
    )
    return list(output[0, ids.shape[1] :].tolist())


def base_result(place: Place) -> dict[str, float]:
    """Return what holds without a prefix."""
    base = place.base()
    return {
        "loss_without": answer_loss(base, place),
        "loss_with": answer_loss(base, place, has_document=True),
        "facts_without": share_of_facts(base, place),
        "facts_with": share_of_facts(base, place, has_document=True),
    }


# -------------------------------------------------------------------------------------------------------------- training


class Clock(TrainerCallback):
    """Counts the CPU time of steps, kept beside the checkpoints, and measures the loss now and then."""

    def __init__(self, file: Path, place: Place, every: int) -> None:
        self.file, self.place, self.every = file, place, every
        self.record: dict[str, Any] = {"seconds": 0.0, "losses": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:  # a run that goes on
            self.record = json.loads(self.file.read_text(encoding="utf-8"))[str(state.global_step)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.record["seconds"] += time.process_time() - self.start
        if state.global_step % self.every == 0:
            loss = answer_loss(model, self.place)
            model.train()
            self.record["losses"][str(state.global_step)] = [round(self.record["seconds"] / 60, 2), loss]
            print(
                f"  step {state.global_step}: {self.record['seconds'] / 60:.1f} minutes, loss {loss:.3f}", flush=True
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.file.write_text(json.dumps({**kept, str(state.global_step): self.record}), encoding="utf-8")


def adapt(place: Place, method: Method, tokens: int) -> Any:
    """Return the base model with the prefix as it starts."""
    torch.manual_seed(0)
    base = place.base()
    if method.start is None:
        model = get_peft_model(base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
        initialize_kv_prefix_from_text(model, place.chat.tokenizer, text=place.window.text)
        return model
    fields: dict[str, Any] = dict(decoupled=False, gating=False, position_free=method.position_free)
    model = get_peft_model(base, PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **fields))
    start_prefix(model, place.chat, place.window, "default", method.start)
    if method.keeps_sink:
        freeze_first_token(model)
    return model


def freeze_first_token(model: Any) -> None:
    """Keep the prefix's first keys and values as they are: without a gradient and weight decay AdamW does not change them."""

    def without_first(gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(gradient[:, :1]), gradient[:, 1:]], dim=1)

    for name, parameter in model.named_parameters():
        if "prefix_plus_encoder" in name:
            parameter.register_hook(without_first)


def perform(
    place: Place, name: str, tokens: int, rows: list[dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """Train a prefix, or go on with it, and measure it."""
    method = METHODS[name]
    directory = run_directory(options, name, tokens)
    directory.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    model = adapt(place, method, tokens)
    seconds = time.process_time() - start
    result: dict[str, Any] = {"start_seconds": seconds, "first_loss": answer_loss(model, place)}
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=options.steps,
        learning_rate=method.rate,
        per_device_train_batch_size=BATCH,
        save_steps=10,
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    clock = Clock(directory / "clock.json", place, options.every)
    trainer = DistillationTrainer(model, arguments, windows=[place.window], train_dataset=rows, callbacks=[clock])
    found = checkpoints(directory, complete_only=True)
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    result.update(minutes=clock.record["seconds"] / 60, losses=clock.record["losses"], loss=answer_loss(model, place))
    if options.facts:
        result["facts"] = share_of_facts(model, place)
    return result


def data_directory(options: argparse.Namespace) -> Path:
    """Return where the conversations are, and the runs that learn from them."""
    directory: Path = options.output / f"{'recited' if options.recited else 'all'}-{options.conversations}"
    return directory


def run_directory(options: argparse.Namespace, name: str, tokens: int) -> Path:
    words = name.replace(",", "").replace(":", "").lower().split()
    return data_directory(options) / "-".join([*words, f"{tokens}tokens", f"{options.steps}steps"])


def kept(file: Path, make: Any) -> dict[str, Any]:
    """Return what a file has, or make it and write it there."""
    if not file.exists():
        made = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made, indent=1), encoding="utf-8")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def training_rows(place: Place, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the conversations that all methods learn from, and note the CPU time that they took."""
    templates = [template for template in TEMPLATES if template.recites or not options.recited]
    settings = SelfStudy(num_conversations=options.conversations, templates=templates)
    directory = data_directory(options)
    directory.mkdir(parents=True, exist_ok=True)
    file = ConversationFile(directory / "conversations.jsonl", settings.batch_size)
    start = time.process_time()
    conversations = study(
        place.base(), place.chat, [place.window], settings, file, lambda done: print(f"  {done}", flush=True)
    )
    minutes = (time.process_time() - start) / 60
    if minutes > 0.1:
        with (directory / "conversations.minutes").open("a", encoding="utf-8") as log:
            log.write(f"{minutes:.2f}\n")
    return encode_conversations(conversations, place.chat, [place.window])


# --------------------------------------------------------------------------------------------------------------- report


def report(console: Console, base: dict[str, float], results: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Print a table."""
    gap = base["loss_without"] - base["loss_with"]
    table = Table("prefix", "virtual tokens", "CPU minutes", "closed at the start", "loss", "gap closed", "facts")
    table.add_row(
        "none, without the document", "", "", "", f"{base['loss_without']:.3f}", "0 %", f"{base['facts_without']:.2f}"
    )
    table.add_row(
        "none, with the document", "", "", "", f"{base['loss_with']:.3f}", "100 %", f"{base['facts_with']:.2f}"
    )
    for (name, tokens), result in results.items():
        closed = [100 * (base["loss_without"] - result[key]) / gap for key in ("first_loss", "loss")]
        minutes = result["minutes"] + result["start_seconds"] / 60
        cells = [
            f"{minutes:.1f}",
            f"{closed[0]:.0f} %",
            f"{result['loss']:.3f}",
            f"{closed[1]:.0f} %",
            f"{result['facts']:.2f}" if "facts" in result else "",
        ]
        table.add_row(name, str(tokens), *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2", help="a chat model")
    parser.add_argument("--output", type=Path, default=Path(".cache/documents"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 64, 32])
    parser.add_argument("--conversations", type=int, default=240)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--every", type=int, default=20, help="steps between measurements of the loss")
    parser.add_argument("--recited", action="store_true", help="only answers that are the document's own words")
    parser.add_argument(
        "--facts", action=argparse.BooleanOptionalAction, default=True, help="let the model answer too"
    )
    parser.add_argument("--done", action="store_true", help="report what has been run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chat = Chat(AutoTokenizer.from_pretrained(options.model))
    (window,) = read_text(chat, document(), WINDOW_TOKENS)
    place = Place(options.model, chat, window, held_out_questions())
    base = kept(options.output / "base.json", lambda: base_result(place))
    rows: list[dict[str, Any]] = []
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for tokens in options.tokens:
        for name in options.methods:
            file = run_directory(options, name, tokens) / "result.json"
            if options.done and not file.exists():
                continue
            if not file.exists():
                rows = rows or training_rows(place, options)
                print(f"{name}, {tokens} virtual tokens", flush=True)
            results[name, tokens] = kept(file, lambda: perform(place, name, tokens, rows, options))  # noqa: B023
    report(Console(), base, results)


if __name__ == "__main__":
    main()
