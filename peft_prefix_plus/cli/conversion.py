"""`prefix-plus convert`: convert a PREFIX_TUNING adapter to PREFIX_PLUS, or back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel, PeftType

from ..conversion.prefix_tuning import from_prefix_tuning, to_prefix_tuning
from ..registration import PREFIX_PLUS
from .errors import CommandError, shown_as_command_error
from .loading import BASE_MODEL_HELP, DTYPE_HELP, base_model_name, check_dtype, load_adapter_config, load_model


@dataclass(kw_only=True)
class ConversionSettings:
    """The options of `prefix-plus convert`; the help texts describe them."""

    adapter: str = field(metadata={"help": "The adapter: a directory or a name on the Hub."})
    output: Path = field(metadata={"help": "The directory for the converted adapter, new or empty."})
    model: str | None = field(default=None, metadata=BASE_MODEL_HELP)
    dtype: str = field(default="auto", metadata=DTYPE_HELP)

    def __post_init__(self) -> None:
        check_dtype(self.dtype)


def convert(settings: ConversionSettings) -> str:
    """
    Convert an adapter to the other method, verify it on the base model and save it.

    Args:
        settings (`ConversionSettings`): The options.

    Returns:
        `str`: The method of the new adapter.

    Raises:
        CommandError: If the output directory is not empty, the adapter or its base model cannot be loaded, or the conversion is not
            exact.
    """
    if settings.output.exists() and (not settings.output.is_dir() or any(settings.output.iterdir())):
        raise CommandError(f"--output must be a new or empty directory, got {settings.output}. Give another one.")
    config = load_adapter_config(settings.adapter)
    if config.peft_type not in (PREFIX_PLUS, PeftType.PREFIX_TUNING):
        raise CommandError(
            f"{settings.adapter!r} is a {PeftType(config.peft_type).value} adapter; prefix-plus converts PREFIX_TUNING "
            "and PREFIX_PLUS adapters."
        )
    base = load_model(base_model_name(settings.adapter, config, settings.model), settings.dtype)
    with shown_as_command_error(Exception, while_doing=f"Cannot convert the adapter {settings.adapter!r}"):
        if config.peft_type == PREFIX_PLUS:
            to_prefix_tuning(PeftModel.from_pretrained(base, settings.adapter), save_directory=settings.output)
            return PeftType.PREFIX_TUNING.value
        from_prefix_tuning(settings.adapter, base).save_pretrained(str(settings.output))
        return PREFIX_PLUS.value
