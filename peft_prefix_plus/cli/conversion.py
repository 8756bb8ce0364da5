"""`prefix-plus convert`: turn a PREFIX_TUNING adapter into a PREFIX_PLUS adapter, or back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel, PeftType

from ..conversion.prefix_tuning import from_prefix_tuning, to_prefix_tuning
from ..registration import PREFIX_PLUS
from .errors import CommandError, shown_as_command_error
from .loading import base_model_name, check_dtype, load_adapter_config, load_model


@dataclass(kw_only=True)
class ConversionSettings:
    """What to convert, and where the result goes. The fields' help texts say the rest."""

    adapter: str = field(metadata={"help": "The adapter: a directory or a name on the Hub."})
    output: Path = field(metadata={"help": "The directory for the converted adapter, new or empty."})
    model: str | None = field(default=None, metadata={"help": "The base model, if it is not where the adapter says."})
    dtype: str = field(
        default="auto", metadata={"help": "The base model's dtype: auto, float32, bfloat16 or float16."}
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)


def convert(settings: ConversionSettings) -> str:
    """
    Convert an adapter of either method into the other, verify it on the base model and save it.

    Args:
        settings (`ConversionSettings`): What to convert, and where the result goes.

    Returns:
        `str`: The method of the new adapter.

    Raises:
        CommandError: If the output is in use, something cannot be loaded, or the conversion is not exact.
    """
    if settings.output.exists() and (not settings.output.is_dir() or any(settings.output.iterdir())):
        raise CommandError(f"{settings.output} is not an empty directory; name another one by --output.")
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
