"""`prefix-plus params`: how many parameters every reparameterization trains, counted on the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft import get_peft_model
from rich.console import Console
from rich.table import Table

from ..config import SHARINGS, PrefixPlusConfig
from ..encoders import ENCODERS
from .errors import shown_as_command_error
from .loading import model_on_meta_device


@dataclass(kw_only=True)
class CountingSettings:
    """For which model and which sizes of the prefix to count. The fields' help texts say the rest."""

    model: str | None = field(
        default=None, metadata={"help": "A model's directory or name on the Hub; without it, Llama-2-7B's shape."}
    )
    num_virtual_tokens: int = field(default=20, metadata={"help": "Number of prefix positions per attention module."})
    encoder_dim: int = field(default=64, metadata={"help": "Width of the learned input of the reparameterization."})
    encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "Hidden width of the MLP; without it, encoder-dim."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Layers to prefix; without it all, negative numbers count from the last layer."},
    )
    markdown: bool = field(default=False, metadata={"help": "Print a Markdown table."})


class Count(NamedTuple):
    """The parameters of one combination; `sharing` is empty where there is nothing to share."""

    reparameterization: str
    sharing: str
    trainable: int
    total: int


def params(settings: CountingSettings) -> None:
    """
    Print the table of trainable parameters.

    Args:
        settings (`CountingSettings`): For which model and which sizes of the prefix.

    Raises:
        CommandError: If the model's configuration cannot be loaded, or the sizes do not fit it.
    """
    counts = list(count_all(settings))
    if settings.markdown:
        print("\n".join(markdown_lines(counts)))
        return
    name = "Llama-2-7B's shape" if settings.model is None else settings.model
    table = Table("reparameterization", "sharing", title=f"{name}, {settings.num_virtual_tokens} virtual tokens")
    table.add_column("trainable parameters", justify="right")
    table.add_column("of all", justify="right")
    for count in counts:
        share = f"{count.trainable / count.total:.3%}"
        table.add_row(count.reparameterization, count.sharing, f"{count.trainable:,}", share)
    Console(soft_wrap=True).print(table)


def markdown_lines(counts: list[Count]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| reparameterization | sharing | trainable parameters |"
    yield "|---|---|---:|"
    for count in counts:
        sharing = f'`"{count.sharing}"` ' if count.sharing else ""
        yield f'| `"{count.reparameterization}"` | {sharing}| {count.trainable:,} |'


def count_all(settings: CountingSettings) -> Iterator[Count]:
    """Wrap the model with every combination of reparameterization and sharing, and yield what it then trains."""
    model = model_on_meta_device(settings.model)
    reparameterization: Any  # one that another package has registered is no name that the types know
    for reparameterization, encoder in ENCODERS.items():
        for sharing in SHARINGS if encoder.shares_parts else SHARINGS[:1]:
            with shown_as_command_error(ValueError, TypeError):
                config = PrefixPlusConfig(
                    task_type="CAUSAL_LM",
                    num_virtual_tokens=settings.num_virtual_tokens,
                    reparameterization=reparameterization,
                    encoder_dim=settings.encoder_dim,
                    encoder_hidden_size=settings.encoder_hidden_size if encoder.has_hidden_layer else None,
                    layers_to_transform=settings.layers_to_transform,
                    sharing=sharing,
                    prefix_scaling=1.0,  # without weights there is nothing to measure,
                    init_weights="random",  # neither for the scale nor for the start
                )
                adapted = get_peft_model(model, config)
            trainable, total = adapted.get_nb_trainable_parameters()
            yield Count(reparameterization, sharing if encoder.shares_parts else "", trainable, total)
            model = adapted.unload()
