"""`prefix-plus train`: teach a frozen language model by a prefix, with transformers' Trainer."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from ..config import SERVABLE, PrefixPlusConfig
from ..saving.files import update_model_card
from ..saving.together import saving_together
from ..serving.folding import why_not_served
from ..training.checkpoints import checkpoints
from .errors import CommandError, check_numbers, check_positive, shown_as_command_error
from .loading import LARGEST_SEED, check_dtype, load_adapter_config, load_model, load_tokenizer, num_positions
from .records import Collator, EncodedRecord, Record, check_vocabulary, encode, padding_id, read_records


@dataclass(kw_only=True)
class TrainingSettings:
    """What to train on what, how, and where the adapter goes. The fields' help texts say the rest."""

    model: str = field(metadata={"help": "The base model: a directory or a name on the Hub."})
    data: Path = field(
        metadata={"help": "JSON lines with 'prompt' and 'completion' (loss on the completion), or with 'text'."}
    )
    output: Path = field(metadata={"help": "The directory for checkpoints and, in the end, the adapter."})
    eval_data: Path | None = field(default=None, metadata={"help": "Data to compute the loss on after every epoch."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in the output directory, if it has one."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Train anew into an output directory that is not empty."})
    learning_rate: float = field(default=2e-3, metadata={"help": "The highest learning rate."})
    schedule: str = field(
        default="linear",
        metadata={"help": "How the learning rate falls: linear, cosine, constant, … (transformers' names)."},
    )
    warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    epochs: float = field(default=3.0, metadata={"help": "Passes over the data."})
    max_steps: int = field(
        default=-1, metadata={"help": "Optimizer steps; if positive, it counts instead of the epochs."}
    )
    batch_size: int = field(default=8, metadata={"help": "Records per device and step."})
    gradient_accumulation: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    max_length: int = field(
        default=1024, metadata={"help": "The most tokens per record: prompts lose their start, completions their end."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "The base model's dtype: auto, float32, bfloat16 or float16."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations twice instead of keeping them."}
    )
    servable: bool = field(
        default=False,
        metadata={"help": "Choose the form that vLLM serves: in the softmax, at fixed positions, in all layers."},
    )
    seed: int = field(default=0, metadata={"help": "For the adapter's start, the order of the data and dropout."})
    save_steps: int = field(default=500, metadata={"help": "Optimizer steps between checkpoints."})
    keep_checkpoints: int = field(default=2, metadata={"help": "How many checkpoints to keep."})
    logging_steps: int = field(default=50, metadata={"help": "Optimizer steps between reports of the loss."})
    progress: bool = field(default=True, metadata={"help": "Show a progress bar."})

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other.")
        check_positive(self, "learning_rate", *(["epochs"] if self.max_steps <= 0 else []))
        check_numbers(self, 0, "warmup_steps", "weight_decay")
        check_numbers(
            self, 1, "batch_size", "gradient_accumulation", "save_steps", "keep_checkpoints", "logging_steps"
        )
        check_numbers(self, -1, "max_steps")
        check_numbers(self, 2, "max_length")  # the loss is on what comes after a token
        check_numbers(self, 0, "seed", at_most=LARGEST_SEED)


def train(settings: TrainingSettings, config: PrefixPlusConfig) -> PeftModel:
    """
    Train an adapter and save it with its model card and the tokenizer.

    Args:
        settings (`TrainingSettings`): What to train on what, how, and where the adapter goes.
        config (`PrefixPlusConfig`): The adapter's configuration.

    Returns:
        `PeftModel`: The trained model.

    Raises:
        CommandError: If the data, the output directory or a name is not as it must be. Nothing has been written then.
    """
    config.task_type = "CAUSAL_LM"
    if settings.servable:
        config = dataclasses.replace(config, **SERVABLE)
    checkpoint = prepare_output(settings, config)
    records = read_records(settings.data)
    eval_records = read_records(settings.eval_data) if settings.eval_data is not None else None
    tokenizer = load_tokenizer(settings.model)
    base_model = load_model(settings.model, settings.dtype)
    dataset = encode_all(records, tokenizer, settings.max_length, base_model)
    eval_dataset = (
        None if eval_records is None else encode_all(eval_records, tokenizer, settings.max_length, base_model)
    )
    set_seed(settings.seed)
    with shown_as_command_error(ValueError, TypeError):
        arguments = training_arguments(settings, has_eval_data=eval_dataset is not None)
        model = get_peft_model(base_model, config)
    obstacle = why_not_served(base_model.config, config)
    with shown_as_command_error(OSError, while_doing="Cannot write to --output"):
        settings.output.mkdir(parents=True, exist_ok=True)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.print_trainable_parameters()
    print("vLLM can serve this adapter." if obstacle is None else f"vLLM cannot serve this adapter: {obstacle}")
    if settings.overwrite:
        for leftover in checkpoints(settings.output):
            shutil.rmtree(leftover)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=Collator(padding_id(tokenizer)),
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    save_adapter(model, tokenizer, settings.output)
    return model


def training_arguments(settings: TrainingSettings, has_eval_data: bool) -> TrainingArguments:
    """Say in the Trainer's words what the settings say."""
    return TrainingArguments(
        output_dir=str(settings.output),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        seed=settings.seed,
        save_steps=settings.save_steps,
        save_total_limit=settings.keep_checkpoints,
        logging_steps=settings.logging_steps,
        eval_strategy="epoch" if has_eval_data else "no",
        disable_tqdm=not settings.progress,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
    )


def encode_all(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int, model: nn.Module
) -> list[EncodedRecord]:
    """
    Encode the records, and say on stderr how many are longer than what the model gets to see.

    Args:
        records (`Sequence[Record]`): The records.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        max_length (`int`): The most tokens per record, if the model has as many positions.
        model (`nn.Module`): The model that is to read them.

    Raises:
        CommandError: If the tokenizer is not that of the model.
    """
    encoded = [encode(record, tokenizer) for record in records]
    check_vocabulary(model, tokenizer, [record.token_ids for record in encoded])
    max_length = min(max_length, num_positions(model) or max_length)
    num_long = sum(len(record.token_ids) > max_length for record in encoded)
    if num_long:
        print(f"{num_long} of {len(records)} records have more than {max_length} tokens and are cut.", file=sys.stderr)
        encoded = [encode(record, tokenizer, max_length) for record in records]
    return encoded


# ---------------------------------------------------------------------------------------------------- the output directory


def prepare_output(settings: TrainingSettings, config: PrefixPlusConfig) -> Path | None:
    """
    Check that the output directory may be written to.

    Returns:
        `Path`: The checkpoint to go on from, or `None`.

    Raises:
        CommandError: If it may not, or if its checkpoint is of an adapter with another configuration.
    """
    output = settings.output
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output must be a directory, {output} is a file.")
    is_used = output.is_dir() and any(output.iterdir())
    complete = checkpoints(output, complete_only=True)
    if not is_used or settings.overwrite:
        return None
    if not settings.resume:
        raise CommandError(
            f"The output directory {output} is not empty. Use --resume to go on from its last checkpoint, --overwrite to "
            "train anew into it, or another --output."
        )
    if not complete:
        raise CommandError(f"--resume: {output} is not empty but has no complete checkpoint. Use --overwrite.")
    check_same_config(complete[-1], config, settings.model)
    return complete[-1]


def check_same_config(checkpoint: Path, config: PrefixPlusConfig, model: str) -> None:
    """
    Check that a checkpoint is of an adapter with this configuration, of this base model.

    Raises:
        CommandError: If it is not.
    """
    saved = load_adapter_config(str(checkpoint))
    inherited = {item.name for item in dataclasses.fields(PeftConfig)}
    names = [item.name for item in dataclasses.fields(PrefixPlusConfig) if item.name not in inherited]
    differing = [
        f"{name} is {getattr(saved, name, None)!r} there and {getattr(config, name)!r} here"
        for name in names
        if getattr(saved, name, None) != getattr(config, name)
        and (name, getattr(config, name)) != ("position_free", None)  # the saved one has what it resolved to
    ]
    base = saved.base_model_name_or_path
    if base is not None and Path(base).absolute() != Path(model).absolute():
        differing.append(f"the base model is {base!r} there and {model!r} here")
    if differing:
        raise CommandError(
            f"--resume: the checkpoint {checkpoint} is of another adapter ({'; '.join(differing)}). Repeat the options "
            "that it was trained with, or use --overwrite."
        )


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Save the adapter, its card and the tokenizer, all files together."""
    with saving_together(output) as folder:
        if (output / "README.md").exists():
            shutil.copy(output / "README.md", folder)  # PEFT updates the card that it finds
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    update_model_card(str(output))  # of all adapters that lie there
