"""The options of `prefix-plus train`, and what `train` and `distill` alike tell the Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from .errors import check_numbers, check_positive
from .loading import EIGHT_BITS_HELP, FOUR_BITS_HELP, LARGEST_SEED, TASKS, Source, check_dtype, num_bits


def option(default: Any, text: str, *aliases: str, may_change: bool = False) -> Any:
    """
    Return a dataclass field for an option.

    Args:
        default: Its default.
        text (`str`): Its help text.
        aliases (`str`): Its names in transformers or TRL, if they differ.
        may_change (`bool`, defaults to `False`): Whether a resumed training may have another value.
    """
    return field(default=default, metadata={"help": text, "aliases": aliases, "may_change": may_change})


@dataclass(kw_only=True)
class TrainingSettings:
    """The options of `prefix-plus train`; the help texts describe them."""

    model: str = field(
        metadata={"help": "The base model: a directory or a name on the Hub.", "aliases": ("model-name-or-path",)}
    )
    data: str = field(
        metadata={
            "help": "A JSON-lines, CSV or Parquet file, a folder of them, or a data set on the Hub. Its rows have 'messages', "
            "or 'prompt' and 'completion', or 'text'; for SEQ_CLS 'text' and 'label'.",
            "aliases": ("dataset-name",),
        }
    )
    output: Path = field(
        metadata={
            "help": "The directory for checkpoints and the trained adapter.",
            "aliases": ("output-dir",),
            "may_change": True,
        }
    )
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"] = option("CAUSAL_LM", "The kind of model.")
    resume: bool = option(False, "Continue from the last checkpoint in the output directory.", may_change=True)
    overwrite: bool = option(
        False,
        "Start a new training in an output directory that is not empty.",
        "overwrite-output-dir",
        may_change=True,
    )

    data_config: str | None = option(None, "The data set's configuration, if it has several.", "dataset-config")
    data_split: str = option("train", "The data set's split to train on. A file has only one.", "dataset-train-split")
    eval_data: str | None = option(None, "Data to evaluate on.", may_change=True)
    eval_split: str | None = option(
        None, "Evaluate on this split of the data set, or hold out a fraction such as 0.1.", "dataset-test-split"
    )
    max_length: int = option(
        1024,
        "The most tokens per record. Long prompts lose their start; long completions, conversations and texts lose their end.",
    )
    chat_template_path: Path | None = option(None, "A Jinja file that replaces the tokenizer's chat template.")  # noqa: RUF009
    assistant_only_loss: bool = option(True, "In conversations, train on the assistant's messages only.")

    revision: str | None = option(None, "The base model's branch, tag or commit on the Hub.", "model-revision")
    trust_remote_code: bool = option(False, "Run code from the base model's repository.")
    dtype: str = option("auto", "The base model's dtype: auto, float32, bfloat16 or float16.", "torch-dtype")
    load_in_4bit: bool = option(False, FOUR_BITS_HELP["help"])
    load_in_8bit: bool = option(False, EIGHT_BITS_HELP["help"])
    bf16: bool = option(False, "Compute in bfloat16 with autocast. The adapter stays in float32.")
    gradient_checkpointing: bool = option(False, "Compute activations twice instead of keeping them.", may_change=True)

    learning_rate: float = option(2e-3, "The highest learning rate.")
    schedule: str = option(
        "linear",
        "How the learning rate falls: linear, cosine, constant, … (transformers' names).",
        "lr-scheduler-type",
    )
    warmup_steps: int = option(0, "Steps over which the learning rate rises.")
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    epochs: float = option(3.0, "Passes over the data.", "num-train-epochs", may_change=True)
    max_steps: int = option(-1, "Optimizer steps; if positive, they replace --epochs.", may_change=True)
    batch_size: int = option(8, "Records per device and step.", "per-device-train-batch-size")
    eval_batch_size: int | None = option(
        None,
        "Records per device in evaluation. Default: as in training.",
        "per-device-eval-batch-size",
        may_change=True,
    )
    gradient_accumulation: int = option(1, "Batches per optimizer step.", "gradient-accumulation-steps")
    servable: bool = option(
        False, "Train the form that costs no computation in vLLM: joint, at fixed positions, in all layers."
    )
    seed: int = option(0, "The random seed of the adapter's start, the order of the data and dropout.")

    eval_strategy: Literal["epoch", "steps"] | None = option(
        None, "When to evaluate. Default: after every epoch, or with --eval-steps by steps.", may_change=True
    )
    eval_steps: int | None = option(None, "Optimizer steps between evaluations.", may_change=True)
    load_best_model_at_end: bool = option(
        False, "Save the adapter of the checkpoint that was best in evaluation.", may_change=True
    )
    metric_for_best_model: str = option(
        "eval_loss", "The metric of the best checkpoint: eval_loss, or for SEQ_CLS eval_accuracy.", may_change=True
    )
    early_stopping_patience: int | None = option(
        None, "Stop after this many evaluations without improvement. Sets --load-best-model-at-end.", may_change=True
    )
    save_steps: int | None = option(
        None,
        "Optimizer steps between checkpoints. Default: 500, or with --load-best-model-at-end as between evaluations.",
        may_change=True,
    )
    keep_checkpoints: int = option(2, "How many checkpoints to keep.", "save-total-limit", may_change=True)
    logging_steps: int = option(50, "Optimizer steps between reports of the loss.", may_change=True)
    report_to: str | list[str] = option(  # noqa: RUF009
        "none", "Where to report metrics: tensorboard, wandb, … (transformers' names).", may_change=True
    )
    progress: bool = option(True, "Show a progress bar.", may_change=True)

    push_to_hub: bool = option(False, "Upload the adapter to the Hub at the end.", may_change=True)
    hub_model_id: str | None = option(
        None, "The repository to upload to. Default: the output directory's name.", may_change=True
    )
    hub_private_repo: bool = option(False, "Make the repository private.", may_change=True)

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.task_type not in TASKS:
            raise ValueError(f"`task_type` must be one of {', '.join(TASKS)}, got {self.task_type!r}.")
        if self.eval_strategy not in (None, "epoch", "steps"):
            raise ValueError(f"`eval_strategy` must be epoch or steps, got {self.eval_strategy!r}.")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other. Give one of them.")
        num_bits(self.load_in_4bit, self.load_in_8bit)
        check_positive(self, "learning_rate", *(["epochs"] if self.max_steps <= 0 else []))
        check_numbers(self, 0, "warmup_steps", "weight_decay")
        numbers = ("batch_size", "gradient_accumulation", "keep_checkpoints", "logging_steps")
        optional = ("eval_batch_size", "eval_steps", "early_stopping_patience", "save_steps")
        check_numbers(self, 1, *numbers, *(name for name in optional if getattr(self, name) is not None))
        check_numbers(self, -1, "max_steps")
        check_numbers(self, 2, "max_length")  # the loss needs a token and its successor
        check_numbers(self, 0, "seed", at_most=LARGEST_SEED)
        self._check_evaluation()
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private_repo):
            raise ValueError("--hub-model-id and --hub-private-repo need --push-to-hub.")

    def _check_evaluation(self) -> None:
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        if self.eval_data is not None and self.eval_split is not None:
            raise ValueError("--eval-data and --eval-split contradict each other. Give one of them.")
        if not self.evaluates:
            for name in ("eval_strategy", "eval_steps", "load_best_model_at_end", "early_stopping_patience"):
                if getattr(self, name):
                    raise ValueError(f"--{name.replace('_', '-')} needs evaluation data: --eval-data or --eval-split.")
        if self.eval_strategy == "epoch" and self.eval_steps is not None:
            raise ValueError("--eval-strategy epoch and --eval-steps contradict each other. Give one of them.")
        if self.eval_strategy is None and self.evaluates:
            self.eval_strategy = "epoch" if self.eval_steps is None else "steps"
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"`eval_split` must be a split's name or a fraction in (0, 1), got {self.eval_split}.")

    @property
    def evaluates(self) -> bool:
        """Whether there are evaluation data."""
        return self.eval_data is not None or self.eval_split is not None

    @property
    def eval_fraction(self) -> float | None:
        """The fraction of the training data to hold out, if `eval_split` is one."""
        try:
            return None if self.eval_split is None else float(self.eval_split)
        except ValueError:
            return None

    @property
    def source(self) -> Source:
        """The version of the base model."""
        return Source(self.revision, self.trust_remote_code)

    @property
    def bits(self) -> int | None:
        """The number of bits to quantize the base model to, or `None`."""
        return num_bits(self.load_in_4bit, self.load_in_8bit)


def trainer_arguments(settings: Any, **more: Any) -> TrainingArguments:
    """
    Return the Trainer's arguments for the options that all trainings have.

    Args:
        settings (`TrainingSettings` or `DistillationSettings`): The options.
        more: Further arguments.
    """
    return TrainingArguments(
        output_dir=str(settings.output),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        seed=settings.seed,
        save_total_limit=settings.keep_checkpoints,
        logging_steps=settings.logging_steps,
        disable_tqdm=not settings.progress,
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )
