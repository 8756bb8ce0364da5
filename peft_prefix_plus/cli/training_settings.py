"""The options of `prefix-plus train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import check_numbers, check_positive
from .loading import LARGEST_SEED, TASKS, Source, check_dtype


def option(default: Any, text: str, *aliases: str, may_change: bool = False) -> Any:
    """
    Return a field for an option.

    Args:
        default: Its value if it is not given.
        text (`str`): Its help.
        aliases: What transformers or TRL call it, where that is another name.
        may_change (`bool`): Training may go on from a checkpoint with another value.
    """
    return field(default=default, metadata={"help": text, "aliases": aliases, "may_change": may_change})


@dataclass(kw_only=True)
class TrainingSettings:
    """What to train on what, how, and where the adapter goes. The fields' help texts say the rest."""

    model: str = field(
        metadata={"help": "The base model: a directory or a name on the Hub.", "aliases": ("model-name-or-path",)}
    )
    data: str = field(
        metadata={
            "help": "A JSON-lines, CSV or Parquet file, a folder of them, or a data set on the Hub; with 'messages', "
            "or 'prompt' and 'completion', or 'text', or for SEQ_CLS 'text' and 'label'.",
            "aliases": ("dataset-name",),
        }
    )
    output: Path = field(
        metadata={
            "help": "The directory for checkpoints and, in the end, the adapter.",
            "aliases": ("output-dir",),
            "may_change": True,
        }
    )
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"] = option("CAUSAL_LM", "What kind of model it is.")
    resume: bool = option(
        False, "Go on from the last checkpoint in the output directory, if it has one.", may_change=True
    )
    overwrite: bool = option(
        False, "Train anew into an output directory that is not empty.", "overwrite-output-dir", may_change=True
    )

    data_config: str | None = option(None, "The data set's configuration, if it has several.", "dataset-config")
    data_split: str = option("train", "The data set's split to train on; a file has one.", "dataset-train-split")
    eval_data: str | None = option(None, "Data to evaluate on.", may_change=True)
    eval_split: str | None = option(
        None, "Evaluate on this split of the data set, or on a fraction such as 0.1 held out.", "dataset-test-split"
    )
    max_length: int = option(
        1024,
        "The most tokens per record: prompts lose their start, completions, conversations and texts their end.",
    )
    chat_template_path: Path | None = option(None, "A Jinja file that replaces the tokenizer's chat template.")  # noqa: RUF009
    assistant_only_loss: bool = option(True, "In conversations, have the loss on what the assistant says only.")

    revision: str | None = option(None, "The base model's branch, tag or commit on the Hub.", "model-revision")
    trust_remote_code: bool = option(False, "Run code that lies beside the base model's weights.")
    dtype: str = option("auto", "The base model's dtype: auto, float32, bfloat16 or float16.", "torch-dtype")
    load_in_4bit: bool = option(False, "Quantize the base model to 4 bits, by bitsandbytes.")
    load_in_8bit: bool = option(False, "Quantize the base model to 8 bits, by bitsandbytes.")
    bf16: bool = option(False, "Compute in bfloat16 where autocast does; the adapter stays in float32.")
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
    max_steps: int = option(-1, "Optimizer steps; if positive, it counts instead of the epochs.", may_change=True)
    batch_size: int = option(8, "Records per device and step.", "per-device-train-batch-size")
    eval_batch_size: int | None = option(
        None,
        "Records per device in evaluation; as many as in training unless given.",
        "per-device-eval-batch-size",
        may_change=True,
    )
    gradient_accumulation: int = option(1, "Batches per optimizer step.", "gradient-accumulation-steps")
    servable: bool = option(
        False, "Choose the form that vLLM serves: in the softmax, at fixed positions, in all layers."
    )
    seed: int = option(0, "For the adapter's start, the order of the data and dropout.")

    eval_strategy: Literal["epoch", "steps"] | None = option(
        None, "When to evaluate: by default after every epoch, or with --eval-steps by steps.", may_change=True
    )
    eval_steps: int | None = option(None, "Optimizer steps between evaluations.", may_change=True)
    load_best_model_at_end: bool = option(
        False, "Keep the checkpoint that was best in evaluation, and save that adapter.", may_change=True
    )
    metric_for_best_model: str = option(
        "eval_loss", "What best means: eval_loss, or for SEQ_CLS eval_accuracy.", may_change=True
    )
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a better one; sets --load-best-model-at-end.", may_change=True
    )
    save_steps: int | None = option(
        None,
        "Optimizer steps between checkpoints: 500, or with --load-best-model-at-end at each evaluation.",
        may_change=True,
    )
    keep_checkpoints: int = option(2, "How many checkpoints to keep.", "save-total-limit", may_change=True)
    logging_steps: int = option(50, "Optimizer steps between reports of the loss.", may_change=True)
    report_to: str | list[str] = option(  # noqa: RUF009
        "none", "Where to report to: tensorboard, wandb, … (transformers' names).", may_change=True
    )
    progress: bool = option(True, "Show a progress bar.", may_change=True)

    push_to_hub: bool = option(False, "Upload the adapter to the Hub at the end.", may_change=True)
    hub_model_id: str | None = option(
        None, "The repository to upload to: by default the output directory's name.", may_change=True
    )
    hub_private_repo: bool = option(False, "Make the repository a private one.", may_change=True)

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.task_type not in TASKS:
            raise ValueError(f"`task_type` must be one of {', '.join(TASKS)}, got {self.task_type!r}.")
        if self.eval_strategy not in (None, "epoch", "steps"):
            raise ValueError(f"`eval_strategy` must be epoch or steps, got {self.eval_strategy!r}.")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load-in-4bit and --load-in-8bit contradict each other.")
        check_positive(self, "learning_rate", *(["epochs"] if self.max_steps <= 0 else []))
        check_numbers(self, 0, "warmup_steps", "weight_decay")
        numbers = ("batch_size", "gradient_accumulation", "keep_checkpoints", "logging_steps")
        optional = ("eval_batch_size", "eval_steps", "early_stopping_patience", "save_steps")
        check_numbers(self, 1, *numbers, *(name for name in optional if getattr(self, name) is not None))
        check_numbers(self, -1, "max_steps")
        check_numbers(self, 2, "max_length")  # the loss is on what comes after a token
        check_numbers(self, 0, "seed", at_most=LARGEST_SEED)
        self._check_evaluation()
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private_repo):
            raise ValueError("--hub-model-id and --hub-private-repo need --push-to-hub.")

    def _check_evaluation(self) -> None:
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        if self.eval_data is not None and self.eval_split is not None:
            raise ValueError("--eval-data and --eval-split contradict each other.")
        if not self.evaluates:
            for name in ("eval_strategy", "eval_steps", "load_best_model_at_end", "early_stopping_patience"):
                if getattr(self, name):
                    raise ValueError(f"--{name.replace('_', '-')} needs evaluation data: --eval-data or --eval-split.")
        if self.eval_strategy == "epoch" and self.eval_steps is not None:
            raise ValueError("--eval-strategy epoch and --eval-steps contradict each other.")
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
        """Which version of the base model."""
        return Source(self.revision, self.trust_remote_code)

    @property
    def bits(self) -> int | None:
        """The bits to quantize the base model to."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None
