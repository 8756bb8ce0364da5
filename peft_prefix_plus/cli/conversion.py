"""`prefix-plus convert`: turn an adapter of one format into one of another with the same output."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft import PeftConfig, PeftModel, PeftType
from peft.utils import CONFIG_NAME

from ..conversion.adapterhub import from_adapterhub, read_adapterhub_config, to_adapterhub
from ..conversion.cartridge import from_cartridge, to_cartridge
from ..conversion.key_values import FILE_NAME, from_key_values, read_key_values, to_key_values
from ..conversion.prefix_tuning import from_prefix_tuning, to_prefix_tuning
from ..registration import PREFIX_PLUS
from ..saving.reading import find_file, read_fields
from .errors import CommandError, shown_as_command_error
from .loading import (
    BASE_MODEL_HELP,
    DTYPE_HELP,
    Source,
    base_model_name,
    check_dtype,
    load_adapter_config,
    load_model,
    reading,
)


FormatName = Literal["prefix-plus", "prefix-tuning", "cartridge", "adapterhub", "key-values"]


class Format(NamedTuple):
    """
    A format of adapters: what it is called, and how to read it onto a base model, `read(adapter, base, allow_pickle)`, and
    write it, `write(model, directory)`.
    """

    title: str
    read: Callable[[str, Any, bool], PeftModel]
    write: Callable[[PeftModel, Path], Any]


FORMATS: dict[str, Format] = {
    "prefix-plus": Format(
        "PREFIX_PLUS adapter",
        lambda adapter, base, allow_pickle: PeftModel.from_pretrained(base, adapter),
        lambda model, directory: model.save_pretrained(str(directory)),
    ),
    "prefix-tuning": Format(
        "PREFIX_TUNING adapter",
        lambda adapter, base, allow_pickle: from_prefix_tuning(adapter, base, allow_pickle=allow_pickle),
        lambda model, directory: to_prefix_tuning(model, save_directory=directory),
    ),
    "cartridge": Format(
        "CARTRIDGE adapter",
        lambda adapter, base, allow_pickle: from_cartridge(adapter, base, allow_pickle=allow_pickle),
        lambda model, directory: to_cartridge(model, save_directory=directory),
    ),
    "adapterhub": Format(
        "AdapterHub adapter",
        lambda adapter, base, allow_pickle: from_adapterhub(adapter, base, allow_pickle=allow_pickle),
        lambda model, directory: to_adapterhub(model, save_directory=directory),
    ),
    "key-values": Format(
        "file of keys and values",
        lambda adapter, base, allow_pickle: from_key_values(adapter, base),
        lambda model, directory: to_key_values(model, path=directory),
    ),
}

OF_METHODS = {PREFIX_PLUS: "prefix-plus", PeftType.PREFIX_TUNING: "prefix-tuning", PeftType.CARTRIDGE: "cartridge"}


@dataclass(kw_only=True)
class ConversionSettings:
    """What to convert, and where the result goes. The fields' help texts say the rest."""

    adapter: str = field(
        metadata={"help": "The adapter: a directory, a name on the Hub, or a file of keys and values."}
    )
    output: Path = field(metadata={"help": "The directory for the converted adapter, new or empty."})
    to: FormatName | None = field(
        default=None,
        metadata={
            "help": "The format of the result: by default prefix-plus, and for an adapter of that format prefix-tuning."
        },
    )
    model: str | None = field(default=None, metadata=BASE_MODEL_HELP)
    dtype: str = field(default="auto", metadata=DTYPE_HELP)
    allow_pickle: bool = field(
        default=False, metadata={"help": "Unpickle tensors of an adapter that is not saved as safetensors."}
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.to is not None and self.to not in FORMATS:
            raise ValueError(f"`to` must be one of {', '.join(FORMATS)}, got {self.to!r}.")


def convert(settings: ConversionSettings) -> str:
    """
    Convert an adapter to another format with the same output, and save it.

    Args:
        settings (`ConversionSettings`): What to convert, and where the result goes.

    Returns:
        `str`: What the result is.

    Raises:
        CommandError: If the output is in use, something cannot be loaded, or the conversion is not exact.
    """
    if settings.output.exists() and (not settings.output.is_dir() or any(settings.output.iterdir())):
        raise CommandError(f"--output must be a new or empty directory, got {settings.output}. Give another one.")
    source, config = recognize(settings.adapter)
    target = settings.to or ("prefix-tuning" if source == "prefix-plus" else "prefix-plus")
    if target == source:
        raise CommandError(f"{settings.adapter!r} is in the format {source} already; name another one by --to.")
    base_name = base_model_name(settings.adapter, config, settings.model)
    is_named = base_name == config.base_model_name_or_path
    task_type = "SEQ_2_SEQ_LM" if config.task_type == "SEQ_2_SEQ_LM" else "CAUSAL_LM"
    base = load_model(base_name, settings.dtype, task_type, Source(config.revision if is_named else None))
    with shown_as_command_error(Exception, while_doing=f"Cannot convert the adapter {settings.adapter!r}"):
        model = FORMATS[source].read(settings.adapter, base, settings.allow_pickle)
        FORMATS[target].write(model, settings.output)
    return FORMATS[target].title


def recognize(adapter: str) -> tuple[str, PeftConfig]:
    """
    Return the format of an adapter, and what it says of its base model as PEFT would have it.

    Args:
        adapter (`str`): A directory, a name on the Hub, or a file.

    Raises:
        CommandError: If there is none, or its format is not known.
    """
    has_config = os.path.isfile(os.path.join(adapter, CONFIG_NAME))
    if os.path.isfile(adapter) or (not has_config and os.path.isfile(os.path.join(adapter, FILE_NAME))):
        with reading(f"the adapter {adapter!r}"):
            known = read_key_values(adapter).metadata
        return "key-values", PeftConfig(
            base_model_name_or_path=known.get("base_model"),
            revision=known.get("revision"),
            task_type=known.get("task_type"),
        )
    if _is_of_adapterhub(adapter):
        with reading(f"the adapter {adapter!r}"):
            saved = read_adapterhub_config(adapter)
        return "adapterhub", PeftConfig(base_model_name_or_path=saved.get("model_name") or None)
    config = load_adapter_config(adapter)
    if config.peft_type not in OF_METHODS:
        methods = [str(method.value) for method in OF_METHODS]
        raise CommandError(
            f"{adapter!r} is a {PeftType(config.peft_type).value} adapter; prefix-plus converts {', '.join(methods)} and "
            "AdapterHub's prefix_tuning adapters, and files of keys and values."
        )
    return OF_METHODS[PeftType(config.peft_type)], config


def _is_of_adapterhub(adapter: str) -> bool:
    """Whether a configuration is not PEFT's, but one of the library `adapters`. One that cannot be read is not."""
    try:
        path = find_file(adapter, CONFIG_NAME)
        fields = {} if path is None else read_fields(path)
    except (OSError, ValueError):
        return False  # which reading it as PEFT's says better
    return "peft_type" not in fields and isinstance(fields.get("config"), dict)
