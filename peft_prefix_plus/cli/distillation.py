"""`prefix-plus distill`: train a prefix to replace a document in the context."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from peft import PeftModel, get_peft_model
from transformers import set_seed

from ..config import PrefixPlusConfig
from ..training.checkpoints import checkpoints, remove_checkpoints
from ..training.distill import CONVERSATIONS_FILE, RUN_FILE, STARTS, Prompt, distill
from ..training.self_study import TEMPLATES, SelfStudy
from .errors import CommandError, check_numbers, check_positive, shown_as_command_error
from .loading import DTYPE_HELP, LARGEST_SEED, check_dtype, load_model, load_tokenizer, reading
from .records import check_text, check_vocabulary, read_conversations, read_templates
from .rows import read_text
from .training_output import check_same_config, is_used, save_adapter
from .training_settings import trainer_arguments


@dataclass
class DocumentPrefixConfig(PrefixPlusConfig):
    """[`PrefixPlusConfig`] with the defaults of a prefix for a document."""

    num_virtual_tokens: int = field(default=128, metadata={"help": "Number of prefix positions per attention module."})
    decoupled: bool | None = field(
        default=False,
        metadata={
            "help": "Add the prefix outside the softmax. A document's own keys and values cannot start such a prefix."
        },
    )
    position_free: bool | None = field(
        default=False,
        metadata={
            "help": "The prefix meets queries without their rotary position; None means True wherever possible."
        },
    )

    def plain(self) -> PrefixPlusConfig:
        """Return this as a [`PrefixPlusConfig`]."""
        own = {item.name: getattr(self, item.name) for item in fields(PrefixPlusConfig) if item.init}
        return PrefixPlusConfig(**{name: value for name, value in own.items() if name != "peft_type"})


@dataclass(kw_only=True)
class DistillationSettings:
    """The options of `prefix-plus distill`; the help texts describe them."""

    model: str = field(
        metadata={"help": "The base model: a directory or a name on the Hub. Its tokenizer must have a chat template."}
    )
    document: list[str] = field(metadata={"help": "The document: a text file, or several separated by commas."})
    output: Path = field(metadata={"help": "The directory for conversations, checkpoints and the trained adapter."})
    data: Path | None = field(
        default=None,
        metadata={
            "help": "A file of prompts: 'prompt', and 'completion' if the answer is known. Default: self-study."
        },
    )
    conversations: int = field(
        default=512, metadata={"help": "How many conversations the model writes in self-study."}
    )
    templates: Path | None = field(
        default=None,
        metadata={
            "help": "A file of templates for self-study: 'kind', 'prompt' with {piece} or {start}, 'asks' and 'recites'."
        },
    )
    max_answer_tokens: int = field(default=128, metadata={"help": "The most tokens of an answer in self-study."})
    temperature: float = field(
        default=0.7, metadata={"help": "The sampling temperature in self-study; 0 takes the likeliest token."}
    )
    writing_batch_size: int = field(default=8, metadata={"help": "Conversations per batch in self-study."})
    window_tokens: int | None = field(
        default=None,
        metadata={"help": "The most tokens of the document in the context. Default: half of the model's context."},
    )
    top_k: int = field(
        default=20,
        metadata={
            "help": "How many of the teacher's likeliest tokens count one by one; the rest count together. 0 means all."
        },
    )
    start: str | None = field(
        default=None,
        metadata={
            "help": "The start of the prefix: attention (matched to the document), first (its first tokens) or config. Default: attention for "
            "a joint prefix, else config."
        },
    )
    distractors: list[str] | None = field(
        default=None,
        metadata={
            "help": "Adapters of other documents that are active too in some steps: directories, separated by commas."
        },
    )
    learning_rate: float = field(default=6e-3, metadata={"help": "The highest learning rate."})
    schedule: str = field(
        default="linear",
        metadata={"help": "How the learning rate falls: linear, cosine, constant, … (transformers' names)."},
    )
    warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises."})
    epochs: float = field(default=1.0, metadata={"help": "Passes over the conversations."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; if positive, they replace --epochs."})
    batch_size: int = field(default=4, metadata={"help": "Conversations per device and step."})
    gradient_accumulation: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    dtype: str = field(default="auto", metadata=DTYPE_HELP)
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations twice instead of keeping them."}
    )
    seed: int = field(
        default=0, metadata={"help": "The random seed of the conversations, their order and the adapter's start."}
    )
    save_steps: int = field(default=50, metadata={"help": "Optimizer steps between checkpoints."})
    keep_checkpoints: int = field(default=2, metadata={"help": "How many checkpoints to keep."})
    logging_steps: int = field(default=10, metadata={"help": "Optimizer steps between reports of the loss."})
    progress: bool = field(default=True, metadata={"help": "Show progress bars."})
    resume: bool = field(default=False, metadata={"help": "Continue the run in the output directory."})
    overwrite: bool = field(
        default=False, metadata={"help": "Start a new run in an output directory that is not empty."}
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other. Give one of them.")
        if self.start not in (None, *STARTS):
            raise ValueError(f"`start` must be one of {', '.join(STARTS)}, got {self.start!r}.")
        check_positive(self, "learning_rate", *(["epochs"] if self.max_steps <= 0 else []))
        check_numbers(self, 0, "warmup_steps", "temperature", "top_k")
        check_numbers(self, 1, "conversations", "max_answer_tokens", "writing_batch_size", "batch_size")
        check_numbers(self, 1, "gradient_accumulation", "save_steps", "keep_checkpoints", "logging_steps")
        check_numbers(self, -1, "max_steps")
        check_numbers(self, 0, "seed", at_most=LARGEST_SEED)
        if self.window_tokens is not None:
            check_numbers(self, 1, "window_tokens")


def distill_document(settings: DistillationSettings, config: DocumentPrefixConfig) -> PeftModel:
    """
    Distil a document into a prefix, and save it with its model card and the tokenizer.

    Args:
        settings (`DistillationSettings`): The options.
        config (`DocumentPrefixConfig`): The adapter's configuration.

    Returns:
        `PeftModel`: The trained model.

    Raises:
        CommandError: If the document, the data or the base model cannot be read, or the output directory cannot be used.
    """
    config.task_type = "CAUSAL_LM"
    text = read_documents(settings.document)
    prompts: list[Prompt] | None = None if settings.data is None else [*read_conversations(settings.data)]
    templates = TEMPLATES if settings.templates is None else read_templates(settings.templates)
    check_output(settings, config.plain())
    tokenizer = load_tokenizer(settings.model)
    base_model = load_model(settings.model, settings.dtype)
    check_vocabulary(base_model, tokenizer, [tokenizer(text, verbose=False)["input_ids"]])
    set_seed(settings.seed)
    with shown_as_command_error(ValueError, TypeError):
        study = SelfStudy(
            num_conversations=settings.conversations,
            templates=templates,
            max_answer_tokens=settings.max_answer_tokens,
            temperature=settings.temperature,
            batch_size=settings.writing_batch_size,
            seed=settings.seed,
        )
        arguments = trainer_arguments(settings, save_steps=settings.save_steps, report_to="none")
        model = get_peft_model(base_model, config.plain())
    names = load_distractors(model, settings.distractors or [])
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.print_trainable_parameters()
    with shown_as_command_error(ValueError, TypeError, OSError):
        distill(
            model,
            tokenizer,
            text,
            args=arguments,
            prompts=prompts,
            self_study=study,
            start=settings.start,
            window_tokens=settings.window_tokens,
            k=settings.top_k or None,
            distractors=names,
        )
    for name in names:
        model.delete_adapter(name)
    save_adapter(model, tokenizer, settings.output)
    return model


def read_documents(paths: list[str]) -> str:
    """
    Return the joined texts of files.

    Args:
        paths (`list[str]`): The files.

    Raises:
        CommandError: If one cannot be read or is empty.
    """
    texts = []
    for path in paths:
        text = read_text(Path(path))
        if not text.strip():
            raise CommandError(f"{path} is empty: there is nothing to learn from it.")
        texts.append(check_text(path, text).strip())
    return "\n\n".join(texts)


def load_distractors(model: PeftModel, adapters: list[str]) -> list[str]:
    """
    Add adapters to the model, frozen and inactive.

    Args:
        model (`PeftModel`): The model.
        adapters (`list[str]`): Directories or names on the Hub.

    Returns:
        `list[str]`: The names of the adapters in the model.

    Raises:
        CommandError: If one cannot be loaded.
    """
    names = []
    for number, adapter in enumerate(adapters):
        with reading(f"the adapter {adapter!r}"):
            model.load_adapter(adapter, f"distractor{number}")
        names.append(f"distractor{number}")
    return names


def check_output(settings: DistillationSettings, config: PrefixPlusConfig) -> None:
    """
    Check that the output directory can be used. With `overwrite`, remove the run that is in it.

    Args:
        settings (`DistillationSettings`): The options.
        config (`PrefixPlusConfig`): The adapter's configuration.

    Raises:
        CommandError: If it is in use, or `resume` finds a checkpoint of an adapter with another configuration.
    """
    output = settings.output
    if not is_used(output):
        return
    if settings.overwrite:
        remove_checkpoints(output)
        for name in (CONVERSATIONS_FILE, RUN_FILE):
            (output / name).unlink(missing_ok=True)
    elif not settings.resume:
        raise CommandError(
            f"The output directory {output} is not empty. Use --resume to continue its run, --overwrite to replace it, or another --output."
        )
    else:
        for checkpoint in checkpoints(output, complete_only=True)[-1:]:
            check_same_config(checkpoint, config, settings.model)
