"""Distilling a document into a prefix, from the text to the trained adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ..adapters.lookup import base_of, layers_with_adapter
from ..config import PrefixPlusConfig
from ..saving.files import write_atomically
from ..saving.reading import read_fields
from ..starting.initialization import initialize_from_text
from .checkpoints import checkpoints
from .conversations import Conversation, ConversationFile
from .distillation import DistillationCollator, DistillationTrainer, check_distractors, encode_conversations
from .document import Chat, Message, Window, read_messages, read_text
from .padding import padding_id
from .self_study import SelfStudy, Writer, answer_prompts, study


STARTS = ("attention", "first", "config")

CONVERSATIONS_FILE = "conversations.jsonl"
RUN_FILE = "distillation.json"

Prompt = str | tuple[str, str]
"""A prompt, or a prompt and its answer."""


def distill(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    messages: Sequence[Message] | None = None,
    *,
    args: TrainingArguments | str,
    config: PrefixPlusConfig | None = None,
    adapter_name: str = "default",
    prompts: Sequence[Prompt] | None = None,
    self_study: SelfStudy | None = None,
    start: str | None = None,
    window_tokens: int | None = None,
    k: int | None = 20,
    distractors: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> PeftModel:
    """
    Train a prefix to replace a document in the context (after Cartridges, arXiv 2506.06266).

    The teacher is the base model with the document in its context. The student is the same model with the prefix and
    without the document. With [`DistillationTrainer`], the prefix learns the teacher's distribution over the tokens of
    answers. The teacher writes the answers, to the given prompts or to prompts that the model writes about pieces of
    the document. The output directory keeps the conversations and the Trainer's checkpoints. To continue a run that
    was killed, make the same call again; it ends with the same weights. The returned model has the adapter; save it
    like any other.

    Args:
        model: A causal language model, or a `PeftModel` with the adapter to train.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        text (`str`, *optional*): The document. If it is too long for one window, it is split into several.
        messages (`Sequence[dict]`, *optional*): In place of a text: a conversation's first messages, a system prompt or examples.
        args (`TrainingArguments` or `str`): The Trainer's arguments, or the output directory alone.
        config (`PrefixPlusConfig`, *optional*): The adapter's configuration, if the model does not have it. `None` means 128
            virtual tokens at fixed positions.
        adapter_name (`str`, defaults to `"default"`): The adapter.
        prompts (`Sequence[str | tuple[str, str]]`, *optional*): Prompts, or pairs of prompt and answer. `None` means
            self-study. If the document has several windows, each prompt is about the one in whose context the model
            finds it and its answer likeliest.
        self_study (`SelfStudy`, *optional*): How self-study is done, and how answers to prompts are written.
        start (`str`, *optional*): Where the prefix starts: `"attention"` or `"first"`, the methods of
            [`initialize_from_text`], from the document (its first window); or `"config"`, as the configuration says.
            `None` means `"attention"` for a joint prefix, and `"config"` for others.
        window_tokens (`int`, *optional*): The most tokens of the document in the teacher's context. `None` means half
            of the model's context, which leaves the rest for the conversations.
        k (`int`, *optional*, defaults to 20): How many of the teacher's likeliest tokens count one by one; `None` means all.
        distractors (`Sequence[str]`, *optional*): Other adapters of the model that are also active in some steps, so
            that the prefix still works together with prefixes of other documents.
        callbacks (`Sequence[TrainerCallback]`, *optional*): For the Trainer.

    Returns:
        `PeftModel`: The model with the trained adapter.

    Raises:
        ValueError: If the document is empty, too short for the prefix or too long for a window, the tokenizer has no chat template,
            a prompt is empty, or the output directory is another run's. Nothing has been written then.
    """
    if (text is None) == (messages is None):
        raise ValueError("Give either `text` or `messages`, the document.")
    if start not in (None, *STARTS):
        raise ValueError(f"`start` must be one of {', '.join(map(repr, STARTS))} or None, got {start!r}.")
    arguments = default_arguments(args) if isinstance(args, (str, Path)) else args
    settings = self_study or SelfStudy()
    chat = Chat(tokenizer)
    window_tokens = check_window_tokens(model, window_tokens)
    windows = (
        read_text(chat, text, window_tokens)
        if text is not None
        else read_messages(chat, messages or (), window_tokens)
    )
    check_prompts(prompts)
    run = Run(
        Path(str(arguments.output_dir)),
        {
            "document": hashlib.sha256(repr((text, messages)).encode()).hexdigest(),
            "prompts": None if prompts is None else hashlib.sha256(repr(list(prompts)).encode()).hexdigest(),
            "self_study": json.loads(json.dumps(dataclasses.asdict(settings))),
            "window_tokens": window_tokens,
        },
    )
    run.check()
    with added_adapter(model, config, adapter_name) as adapted:
        check_distractors(adapted, distractors)
        if not checkpoints(run.directory, complete_only=True):  # which has the prefix that training goes on from
            start_prefix(adapted, chat, windows[0], adapter_name, start)
    with arguments.main_process_first(desc="self-study"):  # the other processes read what the first has written
        run.begin()
        conversations = run.conversations(adapted, chat, windows, prompts, settings, not arguments.disable_tqdm)
    trainer = DistillationTrainer(
        adapted,
        arguments,
        windows=windows,
        k=k,
        distractors=distractors,
        train_dataset=encode_conversations(conversations, chat, windows),
        data_collator=DistillationCollator(padding_id(tokenizer)),
        callbacks=list(callbacks),
    )
    found = checkpoints(run.directory, complete_only=True)
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    return adapted


def default_arguments(output_dir: str | Path) -> TrainingArguments:
    """Return the Trainer's arguments that are used where only the output directory is given."""
    return TrainingArguments(
        output_dir=str(output_dir),
        learning_rate=6e-3,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        save_steps=50,
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
    )


# ---------------------------------------------------------------------------------------------------------------- checks


def check_window_tokens(model: Any, window_tokens: int | None) -> int:
    """
    Return how many tokens a window may have: those given, or half of the model's context.

    Raises:
        ValueError: If the model's context is not longer than those given.
    """
    config: Any = base_of(model).config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if window_tokens is None:
        return (context or 8192) // 2
    if window_tokens < 1 or (context is not None and window_tokens >= context):
        raise ValueError(
            f"`window_tokens` must be at least 1 and leave room for conversations in the model's context of {context} tokens, got "
            f"{window_tokens}."
        )
    return window_tokens


def check_prompts(prompts: Sequence[Prompt] | None) -> None:
    """
    Raise unless prompts are texts, or pairs of texts.

    Raises:
        ValueError: If not.
    """
    if prompts is None:
        return
    if not prompts:
        raise ValueError("`prompts` is empty. Leave it out for self-study.")
    for number, prompt in enumerate(prompts):
        parts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        if len(parts) not in (1, 2) or not all(isinstance(part, str) and part.strip() for part in parts):
            raise ValueError(
                f"`prompts[{number}]` must be a string that is not empty, or a pair of a prompt and its answer; got {prompt!r}."
            )


# --------------------------------------------------------------------------------------------------------------- adapter


def default_config() -> PrefixPlusConfig:
    """Return the configuration of a prefix for a document."""
    return PrefixPlusConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=128, decoupled=False, gating=False, position_free=False
    )


def with_adapter(model: Any, config: PrefixPlusConfig | None, adapter_name: str) -> Any:
    """
    Return the model with the adapter, which is added if it is not there, and is the only active one.

    Raises:
        ValueError: If the adapter is there and a configuration is given.
    """
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config or default_config(), adapter_name=adapter_name)
    if adapter_name not in model.peft_config:
        model.add_adapter(adapter_name, config or default_config())
    elif config is not None:
        raise ValueError(
            f"The model has an adapter {adapter_name!r} already. Leave `config` out to train it, or give another name."
        )
    model.set_adapter(adapter_name)
    return model


@contextmanager
def added_adapter(model: Any, config: PrefixPlusConfig | None, adapter_name: str) -> Iterator[Any]:
    """Yield [`with_adapter`], and leave the model as it was if what is done with it fails."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = list(model.peft_config) if isinstance(model, PeftModel) else []
    active = model.active_adapter if names else None
    adapted = with_adapter(model, config, adapter_name)
    try:
        yield adapted
    except Exception:
        if not names:
            adapted.unload()
        elif adapter_name not in names:
            adapted.delete_adapter(adapter_name)
        if names:
            adapted.set_adapter(active)
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise


def start_prefix(model: Any, chat: Chat, window: Window, adapter_name: str, start: str | None) -> None:
    """
    Start a prefix from what the teacher has in its context, if that is wanted.

    Raises:
        ValueError: If it has fewer tokens than the prefix.
    """
    layers = [layer for _, layer in layers_with_adapter(model, adapter_name)]
    if start is None:
        start = "attention" if all(layer.is_joint(adapter_name) for layer in layers) else "config"
    if start == "config":
        return
    text = chat.before_prompt(window)
    if start == "first":
        text = chat.first_tokens(text, layers[0].prefix_key_value(adapter_name)[0].shape[1])
    initialize_from_text(model, chat.tokenizer, text, adapter_name, add_special_tokens=False, method=start)


# --------------------------------------------------------------------------------------------------- the output directory


@dataclasses.dataclass(frozen=True)
class Run:
    """
    What a run keeps in its directory.

    Attributes:
        directory (`Path`): The directory.
        inputs (`dict`): What the conversations depend on.
    """

    directory: Path
    inputs: dict[str, Any]

    def check(self) -> None:
        """
        Raise if the directory has conversations that were made from something else.

        Raises:
            ValueError: If so.
        """
        file = self.directory / RUN_FILE
        if not file.exists():
            if (self.directory / CONVERSATIONS_FILE).exists() or checkpoints(self.directory):
                raise ValueError(f"{self.directory} has files of a run, but no {RUN_FILE}. Use another directory.")
            return
        try:
            saved = read_fields(file)
            differing = [name for name in self.inputs if saved[name] != self.inputs[name]]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}). Use another directory, or delete what is in it."
            ) from error
        if differing:
            raise ValueError(
                f"The directory {self.directory} is another run's: {', '.join(differing)} differ. Use another directory, or delete "
                "what is in it."
            )

    def begin(self) -> None:
        """Make the directory, and note in it what the conversations depend on."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / RUN_FILE).exists():
            write_atomically(str(self.directory / RUN_FILE), json.dumps(self.inputs, indent=2))

    def conversations(
        self,
        model: Any,
        chat: Chat,
        windows: Sequence[Window],
        prompts: Sequence[Prompt] | None,
        settings: SelfStudy,
        shows_progress: bool,
    ) -> list[Conversation]:
        """Return the conversations: those of the file, and those that are still to be made."""
        file = ConversationFile(self.directory / CONVERSATIONS_FILE, settings.batch_size)
        if prompts is None:
            with progress(settings.num_conversations, shows_progress) as report:
                return study(model, chat, windows, settings, file, report)
        writer = Writer(model, chat, windows, settings.temperature)
        pairs = [(each[0], chat.answer(each[1])) for each in prompts if not isinstance(each, str)]
        given = [Conversation(*pair, writer.likeliest_window(*pair)) for pair in pairs]
        asked = [each for each in prompts if isinstance(each, str)]
        with progress(len(asked), shows_progress) as report:
            return given + answer_prompts(model, chat, windows, asked, settings, file, report)


@contextmanager
def progress(total: int, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """Show how many conversations there are."""
    with tqdm(total=total, desc="conversations", disable=not is_shown) as bar:

        def report(done: int) -> None:
            bar.update(done - bar.n)

        yield report
