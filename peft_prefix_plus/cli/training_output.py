"""The output directory of a training: whether it can be used, its checkpoints, and the trained adapter."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import PrefixPlusConfig
from ..saving.files import update_model_card, write_atomically
from ..saving.reading import read_fields
from ..saving.together import saving_together
from ..training.checkpoints import checkpoints
from .errors import CommandError, shown_as_command_error
from .loading import load_adapter_config
from .training_settings import TrainingSettings


OPTIONS_FILE = "training_options.json"
"""The file in a checkpoint with the options that must be the same to continue training."""


def is_used(output: Path) -> bool:
    """
    Return whether an output directory has files in it.

    Raises:
        CommandError: If it is not a directory.
    """
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output must be a directory, {output} is a file. Give another path.")
    return output.is_dir() and any(output.iterdir())


def prepare_output(settings: TrainingSettings, config: PrefixPlusConfig) -> Path | None:
    """
    Check that the output directory can be used.

    Args:
        settings (`TrainingSettings`): The options.
        config (`PrefixPlusConfig`): The adapter's configuration.

    Returns:
        `Path`, *optional*: The checkpoint to continue from, or `None`.

    Raises:
        CommandError: If it is in use, or `resume` finds no checkpoint, or one of another adapter or other options.
    """
    output = settings.output
    if not is_used(output) or settings.overwrite:
        return None
    complete = [path for path in checkpoints(output, complete_only=True) if _has_options(path)]
    if not settings.resume:
        raise CommandError(
            f"The output directory {output} is not empty. Use --resume to continue from its last checkpoint, --overwrite to "
            "replace it, or another --output."
        )
    if not complete:
        raise CommandError(f"--resume: {output} is not empty but has no complete checkpoint. Use --overwrite.")
    check_same_config(complete[-1], config, settings.model)
    check_same_options(complete[-1], lasting_options(settings))
    return complete[-1]


@contextmanager
def made_directory(directory: Path) -> Iterator[None]:
    """
    Make a directory. If the block fails while the directory is still empty, remove it again.

    Raises:
        CommandError: If it cannot be made.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    with shown_as_command_error(OSError, while_doing="Cannot write to --output"):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            if any(path.iterdir()):
                break
            path.rmdir()
        raise


def _has_options(checkpoint: Path) -> bool:
    """Return whether the last file of a checkpoint was written."""
    try:
        read_fields(checkpoint / OPTIONS_FILE)
    except (OSError, ValueError):
        return False
    return True


def lasting_options(settings: TrainingSettings) -> dict[str, Any]:
    """Return the options that must be the same to continue a training. Data are compared by content instead."""
    left_out = {"model", "data", "data_config", "data_split", "eval_split", "chat_template_path", "max_length"}
    return {
        item.name: getattr(settings, item.name)
        for item in dataclasses.fields(settings)
        if not item.metadata.get("may_change") and item.name not in left_out
    }


def check_same_options(checkpoint: Path, options: dict[str, Any]) -> None:
    """
    Raise unless a checkpoint was trained with these options.

    Args:
        checkpoint (`Path`): The checkpoint.
        options (`dict`): The options.

    Raises:
        CommandError: If it was not. The message names the differences.
    """
    saved = read_fields(checkpoint / OPTIONS_FILE)
    differing = [
        f"`{name}` was {saved.get(name)!r} and is {value!r} now"
        for name, value in options.items()
        if saved.get(name) != value
    ]
    if differing:
        raise CommandError(
            f"--resume: the checkpoint {checkpoint} was trained with other options ({'; '.join(differing)}). Repeat its "
            "options, or use --overwrite."
        )


class OptionsInCheckpoints(TrainerCallback):
    """
    Writes the options into each checkpoint, as its last file.

    Args:
        options (`dict`): The options.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_atomically(str(checkpoint / OPTIONS_FILE), json.dumps(self.options, indent=2) + "\n")


def check_same_config(checkpoint: Path, config: PrefixPlusConfig, model: str) -> None:
    """
    Raise unless a checkpoint's adapter has this configuration and base model.

    Args:
        checkpoint (`Path`): The checkpoint.
        config (`PrefixPlusConfig`): The configuration.
        model (`str`): The base model.

    Raises:
        CommandError: If it does not. The message names the differences.
    """
    saved = load_adapter_config(str(checkpoint))
    inherited = {item.name for item in dataclasses.fields(PeftConfig)}
    names = [item.name for item in dataclasses.fields(PrefixPlusConfig) if item.name not in inherited]
    differing = [
        f"{name} is {getattr(saved, name, None)!r} there and {getattr(config, name)!r} here"
        for name in names
        if getattr(saved, name, None) != getattr(config, name)
        and (name, getattr(config, name)) != ("position_free", None)  # the saved one has the resolved value
    ]
    base = saved.base_model_name_or_path
    if base is not None and Path(base).absolute() != Path(model).absolute():
        differing.append(f"the base model is {base!r} there and {model!r} here")
    if differing:
        raise CommandError(
            f"--resume: the checkpoint {checkpoint} is of another adapter ({'; '.join(differing)}). Repeat its options, "
            "or use --overwrite."
        )


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Save the adapter, its card and the tokenizer, all files together."""
    with saving_together(output) as folder:
        if (output / "README.md").exists():
            shutil.copy(output / "README.md", folder)  # PEFT updates the card that it finds
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if model.peft_config["default"].task_type == "SEQ_CLS":
            config: Any = model.get_base_model().config
            config.save_pretrained(folder)  # the names of the classes
    update_model_card(str(output))  # it describes all adapters in the directory
