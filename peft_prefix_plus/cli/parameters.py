"""`prefix-plus params`: count the parameters that every reparameterization trains, on the model itself."""

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
    """The options of `prefix-plus params`; the help texts describe them."""

    model: str | None = field(
        default=None, metadata={"help": "A model's directory or name on the Hub. Default: the shape of Llama-2-7B."}
    )
    num_virtual_tokens: int = field(default=20, metadata={"help": "Number of prefix positions per attention module."})
    encoder_dim: int = field(default=64, metadata={"help": "Width of the learned input of the reparameterization."})
    encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "Hidden width of the MLP. Default: encoder-dim."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Layers to prefix. Default: all. Negative numbers count from the last layer."},
    )
    markdown: bool = field(default=False, metadata={"help": "Print a Markdown table."})


class Count(NamedTuple):
    """The numbers of parameters of one combination; `sharing` is empty if there is nothing to share."""

    reparameterization: str
    sharing: str
    trainable: int
    total: int


def params(settings: CountingSettings) -> None:
    """
    Print the table of trainable parameters.

    Args:
        settings (`CountingSettings`): The options.

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
    """Adapt the model with every combination of reparameterization and sharing, and yield the counts."""
    model = model_on_meta_device(settings.model)
    reparameterization: Any  # another package may have registered one, which the types do not know
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
                    prefix_scaling=1.0,  # without weights none can be measured
                )
                adapted = get_peft_model(model, config)
            trainable, total = adapted.get_nb_trainable_parameters()
            yield Count(reparameterization, sharing if encoder.shares_parts else "", trainable, total)
            model = adapted.unload()
