"""`prefix-plus train`: train a prefix for a frozen model with transformers' Trainer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import create_repo, upload_folder
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..config import SERVABLE, PrefixPlusConfig
from ..saving.files import CARD_NAME, TRAINER_STATE, update_model_card
from ..saving.reading import find_file
from ..serving.folding import why_not_served
from ..training.checkpoints import checkpoints, remove_checkpoints
from ..training.padding import padding_id
from .chat import encode_chat
from .errors import CommandError, shown_as_command_error
from .loading import load_model, load_tokenizer, num_positions
from .records import (
    Chat,
    Collator,
    EncodedRecord,
    LabelledText,
    check_vocabulary,
    encode,
    encode_for_decoder,
    read_records,
)
from .rows import has_one_split
from .training_output import (
    OptionsInCheckpoints,
    check_same_options,
    lasting_options,
    made_directory,
    prepare_output,
    save_adapter,
)
from .training_report import report
from .training_settings import TrainingSettings, trainer_arguments


__all__ = ["TrainingSettings", "encode_all", "train"]


def train(settings: TrainingSettings, config: PrefixPlusConfig) -> PeftModel:
    """
    Train an adapter and save it with its model card and the tokenizer.

    Args:
        settings (`TrainingSettings`): The options.
        config (`PrefixPlusConfig`): The adapter's configuration.

    Returns:
        `PeftModel`: The trained model.

    Raises:
        CommandError: If the data or the base model cannot be read, or the output directory cannot be used. No training has started then.
    """
    config.task_type = settings.task_type
    if settings.servable:
        config = dataclasses.replace(config, **SERVABLE)
    checkpoint = prepare_output(settings, config)
    records, eval_records = read_training_data(settings)
    classes = class_names(records, eval_records) if settings.task_type == "SEQ_CLS" else []
    tokenizer = load_training_tokenizer(settings)
    base_model = load_base_model(settings, tokenizer, classes)
    encoding: dict[str, Any] = {"assistant_only_loss": settings.assistant_only_loss, "classes": classes}
    encoding["task_type"] = settings.task_type
    dataset = encode_all(records, tokenizer, settings.max_length, base_model, **encoding)
    eval_dataset = eval_records and encode_all(eval_records, tokenizer, settings.max_length, base_model, **encoding)
    options = {**lasting_options(settings), "data_digest": digest(dataset)}
    if checkpoint is not None:
        check_same_options(checkpoint, options)
    set_seed(settings.seed)
    with made_directory(settings.output):
        with shown_as_command_error(ValueError, TypeError, RuntimeError, ImportError):
            arguments = training_arguments(settings)
            model = get_peft_model(base_model, config, revision=settings.revision)
            if settings.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=dataset,
                eval_dataset=eval_dataset,
                data_collator=Collator(padding_id(tokenizer)),
                compute_metrics=accuracy if settings.task_type == "SEQ_CLS" else None,
                callbacks=callbacks(settings, options),
            )
        repository = hub_repository(settings)
        if settings.overwrite:
            remove_checkpoints(settings.output)
        model.print_trainable_parameters()
        obstacle = why_not_served(base_model.config, config)
        print("vLLM can serve this adapter." if obstacle is None else f"vLLM cannot serve this adapter: {obstacle}")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.is_world_process_zero():
        save_adapter(model, tokenizer, settings.output)
        report(settings, trainer, dataset)
        if repository is not None:
            upload(model, tokenizer, repository, settings)
    return model


def training_arguments(settings: TrainingSettings) -> TrainingArguments:
    """Return the Trainer's arguments for these options."""
    keeps_best = settings.load_best_model_at_end
    by_steps = settings.eval_strategy == "steps"
    eval_steps = settings.eval_steps or settings.logging_steps  # the Trainer's rule
    save_steps = settings.save_steps or (eval_steps if keeps_best and by_steps else 500)
    return trainer_arguments(
        settings,
        weight_decay=settings.weight_decay,
        per_device_eval_batch_size=settings.eval_batch_size or settings.batch_size,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),  # without it, the Trainer refuses bf16 on a CPU
        save_strategy="epoch" if keeps_best and not by_steps and settings.save_steps is None else "steps",
        save_steps=save_steps,
        eval_strategy=settings.eval_strategy or "no",
        eval_steps=eval_steps if by_steps else None,
        load_best_model_at_end=keeps_best,
        metric_for_best_model=settings.metric_for_best_model if keeps_best else None,
        remove_unused_columns=False,
        report_to=settings.report_to,
    )


def callbacks(settings: TrainingSettings, options: dict[str, Any]) -> list[Any]:
    """Return the callbacks of a training, beside the Trainer's own."""
    patience = settings.early_stopping_patience
    return [OptionsInCheckpoints(options), *([] if patience is None else [EarlyStoppingCallback(patience)])]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the fraction of texts whose likeliest class is the right one."""
    predictions, labels = prediction.predictions, np.asarray(prediction.label_ids)
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return {"accuracy": float((logits.argmax(-1) == labels.reshape(-1)).mean())}


# ---------------------------------------------------------------------------------------------------- the data


def read_training_data(settings: TrainingSettings) -> tuple[list[Any], list[Any] | None]:
    """
    Read the records to train on and those to evaluate on.

    Args:
        settings (`TrainingSettings`): The options.

    Returns:
        `tuple`: The training records, and the evaluation records or `None`.

    Raises:
        CommandError: If they cannot be read, or there are too few to hold some out.
    """

    def read(source: str, split: str) -> list[Any]:
        return read_records(source, settings.task_type, split, settings.data_config)

    fraction = settings.eval_fraction
    if settings.eval_split is not None and fraction is None and has_one_split(settings.data):
        raise CommandError(
            f"--eval-split {settings.eval_split}: {settings.data} is a file, which has no splits. Give a fraction to hold out, "
            "or another file with --eval-data."
        )
    records = read(settings.data, settings.data_split)
    if settings.eval_data is not None:
        return records, read(settings.eval_data, settings.data_split)
    if fraction is not None:
        return held_out(records, fraction, settings.seed)
    return records, None if settings.eval_split is None else read(settings.data, settings.eval_split)


def held_out(records: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """
    Hold out random records for evaluation, at least one.

    Args:
        records (`list`): The records.
        fraction (`float`): The fraction to hold out.
        seed (`int`): The random seed.

    Returns:
        `tuple`: The records to train on, and those to evaluate on.

    Raises:
        CommandError: If none would be left to train on.
    """
    number = max(1, round(len(records) * fraction))
    if number >= len(records):
        raise CommandError(
            f"--eval-split {fraction}: of {len(records)} records none would be left to train on. Give a smaller fraction."
        )
    chosen = set(random.Random(seed).sample(range(len(records)), number))
    return (
        [record for index, record in enumerate(records) if index not in chosen],
        [record for index, record in enumerate(records) if index in chosen],
    )


def class_names(records: Sequence[LabelledText], eval_records: Sequence[LabelledText] | None) -> list[str]:
    """
    Return the names of the classes, in the order of their numbers.

    Args:
        records (`Sequence[LabelledText]`): The training data.
        eval_records (`Sequence[LabelledText]`, *optional*): The evaluation data.

    Raises:
        CommandError: If there are fewer than two, or the evaluation data have a class that the training data do not have.
    """
    names = {record.label for record in records}
    are_numbers = all(name.isdecimal() for name in names)
    unknown = {record.label for record in eval_records or ()} - names
    if unknown:
        raise CommandError(
            f"The evaluation data have the class {min(unknown)!r}, which the training data do not have."
        )
    if len(names) < 2:
        raise CommandError(f"The training data have only the class {min(names)!r}; expected at least two classes.")
    return sorted(names, key=int) if are_numbers else sorted(names)


def load_training_tokenizer(settings: TrainingSettings) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer, with the chat template of `chat_template_path`."""
    template = None
    if settings.chat_template_path is not None:
        with shown_as_command_error(OSError, UnicodeDecodeError, while_doing="Cannot read --chat-template-path"):
            template = settings.chat_template_path.read_text(encoding="utf-8")
    tokenizer = load_tokenizer(settings.model, settings.source)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def load_base_model(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase, classes: list[str]) -> Any:
    """Load the base model; with classes, as a classifier of these."""
    changes: dict[str, Any] = {}
    if classes:
        changes = {
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
        }
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        changes["pad_token_id"] = padding_id(tokenizer)  # classifiers of decoders find the last token by it
    return load_model(settings.model, settings.dtype, settings.task_type, settings.source, settings.bits, **changes)


def encode_all(
    records: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    model: nn.Module,
    task_type: str = "CAUSAL_LM",
    classes: Sequence[str] = (),
    assistant_only_loss: bool = True,
) -> list[EncodedRecord]:
    """
    Encode records, and print on stderr how many are cut.

    Args:
        records (`Sequence`): The records.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        max_length (`int`): The most tokens per record. A model with fewer positions lowers it.
        model (`nn.Module`): The model.
        task_type (`str`, defaults to `"CAUSAL_LM"`): The model's task.
        classes (`Sequence[str]`): The names of the classes, for a classifier.
        assistant_only_loss (`bool`, defaults to `True`): Whether the loss in conversations is on the assistant's messages only.

    Returns:
        `list[EncodedRecord]`: The records as token ids.

    Raises:
        CommandError: If the tokenizer does not fit the model, or a conversation does not fit the chat template.
    """

    def encoded_record(record: Any, limit: int | None) -> EncodedRecord:
        if isinstance(record, Chat):
            return encode_chat(record, tokenizer, limit, assistant_only_loss)
        if isinstance(record, LabelledText):
            tokens = list(tokenizer(record.text, truncation=limit is not None, max_length=limit)["input_ids"])
            return EncodedRecord(tokens, [classes.index(record.label)])
        return (encode_for_decoder if task_type == "SEQ_2_SEQ_LM" else encode)(record, tokenizer, limit)

    def length(record: EncodedRecord) -> int:
        return max(len(record.token_ids), len(record.labels))

    encoded = [encoded_record(record, None) for record in records]
    check_vocabulary(model, tokenizer, [record.token_ids for record in encoded])
    max_length = min(max_length, num_positions(model) or max_length)
    num_long = sum(length(record) > max_length for record in encoded)
    if num_long:
        print(f"{num_long} of {len(records)} records have more than {max_length} tokens and are cut.", file=sys.stderr)
        encoded = [encoded_record(record, max_length) for record in records]
    return encoded


def digest(dataset: Sequence[EncodedRecord]) -> str:
    """Return a hash of encoded records."""
    content = hashlib.sha256()
    for record in dataset:
        content.update(json.dumps([record.token_ids, record.labels]).encode())
    return content.hexdigest()


# ---------------------------------------------------------------------------------------------------- the Hub


def hub_repository(settings: TrainingSettings) -> str | None:
    """
    Create the repository for the adapter, if it is to be uploaded.

    Args:
        settings (`TrainingSettings`): The options.

    Returns:
        `str`, *optional*: The full name of the repository; `None` without `push_to_hub`.

    Raises:
        CommandError: If the Hub refuses.
    """
    if not settings.push_to_hub:
        return None
    name = settings.hub_model_id or settings.output.resolve().name
    with shown_as_command_error(Exception, while_doing=f"--push-to-hub: cannot write to the repository {name!r}"):
        return create_repo(name, private=settings.hub_private_repo or None, exist_ok=True).repo_id


def upload(model: PeftModel, tokenizer: PreTrainedTokenizerBase, repository: str, settings: TrainingSettings) -> None:
    """
    Upload the adapter, its card and the tokenizer.

    Args:
        model (`PeftModel`): The trained model.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        repository (`str`): The repository.
        settings (`TrainingSettings`): The options.

    Raises:
        CommandError: If that fails. The adapter is still in the output directory.
    """
    doing = f"The adapter is in {settings.output}, but it cannot be uploaded to {repository!r}"
    with shown_as_command_error(Exception, while_doing=doing), tempfile.TemporaryDirectory() as folder:
        # what its author has written on the Hub's card stays
        shutil.copy(find_file(repository, CARD_NAME) or settings.output / CARD_NAME, Path(folder, CARD_NAME))
        for checkpoint in checkpoints(settings.output, complete_only=True)[-1:]:
            shutil.copy(checkpoint / TRAINER_STATE, folder)  # of which the card has a table
        save_adapter(model, tokenizer, Path(folder))
        update_model_card(folder, repository)
        upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=TRAINER_STATE)
    print(f"The adapter is on the Hub: {repository}")
