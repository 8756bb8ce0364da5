"""The adapters of one transformers model, by the names that clients use."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType

from ..model import BASE_MODEL_NAME
from ..registration import PREFIX_PLUS
from ..saving.reading import load_config
from .adapter_files import chat_template, check_name


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """
    An adapter on the model.

    Attributes:
        key (`str`): Its name in PEFT. Clients use another name, which may have characters that PEFT does not allow, and may be
            given to another adapter later.
        source (`str`): The directory or repository that it came from.
        chat_template (`str`, *optional*): The chat template that it was saved with.
    """

    key: str
    source: str
    chat_template: str | None = None


class AdaptedModel:
    """
    A base model and the adapters on it. Not safe for threads: its owner calls one method at a time.

    An adapter without a name stays until [`AdaptedModel.drop_unnamed`] removes it, because running requests may need it.

    Args:
        base_model (`PreTrainedModel`): The base model.
        base_name (`str`): The name by which clients ask for it.
    """

    def __init__(self, base_model: Any, base_name: str) -> None:
        self._model = base_model.eval()
        self._base_model = base_model
        self.base = LoadedAdapter(BASE_MODEL_NAME, base_name)
        self.base_name = base_name
        self._named: dict[str, LoadedAdapter] = {}
        self._on_model: list[LoadedAdapter] = []
        self._num_loaded = 0

    @property
    def base_model(self) -> Any:
        """The base model, without PEFT's wrapper."""
        return self._base_model

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """A copy of the adapters by name."""
        return dict(self._named)

    def find(self, name: str | None) -> LoadedAdapter:
        """
        Return the adapter of a name.

        Args:
            name (`str`, *optional*): The name; `None` means the base model.

        Returns:
            `LoadedAdapter`: The adapter, or `base` for the base model.

        Raises:
            KeyError: If no adapter has the name.
        """
        return self.base if name in (None, self.base_name) else self._named[str(name)]

    def load(self, name: str, folder: Path, source: str) -> LoadedAdapter:
        """
        Load an adapter and give it a name. An adapter that had the name loses it.

        Args:
            name (`str`): The name.
            folder (`Path`): The adapter's directory.
            source (`str`): The directory or repository that it came from, to show to clients.

        Returns:
            `LoadedAdapter`: The adapter.

        Raises:
            ValueError: If the name is not allowed, the adapter is of another method, or its files are broken. Nothing has
                changed then.
        """
        self.check_name(name)
        config = load_config(folder)
        if config.peft_type != PREFIX_PLUS:
            raise ValueError(_other_method(source, config))
        adapter = LoadedAdapter(f"served_{self._num_loaded}", source, chat_template(folder))
        self._num_loaded += 1
        if self._on_model:
            self._model.load_adapter(str(folder), adapter.key)
        else:
            self._model = PeftModel.from_pretrained(self._base_model, str(folder), adapter_name=adapter.key)
        self._model.eval()
        self._on_model.append(adapter)
        self._named[name] = adapter
        return adapter

    def check_name(self, name: str) -> None:
        """
        Raise unless an adapter may have a name.

        Raises:
            ValueError: If it is empty, or the base model's.
        """
        check_name(name, is_base_name=name == self.base_name)

    def unload(self, name: str) -> None:
        """
        Take a name away from its adapter.

        Raises:
            KeyError: If no adapter has the name.
        """
        del self._named[name]

    def drop_unnamed(self, in_use: Collection[LoadedAdapter]) -> None:
        """Remove the adapters that have no name and are not in use."""
        kept = {*self._named.values(), *in_use}
        dropped = [adapter for adapter in self._on_model if adapter not in kept]
        if len(dropped) == len(self._on_model):
            if dropped:  # PEFT's wrapper needs at least one
                self._base_model = self._model = self._model.unload()
        else:
            for adapter in dropped:
                self._model.delete_adapter(adapter.key)
        self._on_model = [adapter for adapter in self._on_model if adapter in kept]

    @torch.no_grad()
    def generate(self, adapters: Sequence[LoadedAdapter], **kwargs: Any) -> Any:
        """
        Call the model's `generate`, with an adapter for each row.

        Args:
            adapters (`Sequence[LoadedAdapter]`): The adapter of each row; `base` for the base model.
            kwargs: Passed to `generate`.

        Returns:
            The output of `generate`.
        """
        if self._on_model:
            kwargs["adapter_names"] = [adapter.key for adapter in adapters]
        return self._model.generate(**kwargs)


def _other_method(source: str, config: Any) -> str:
    method = PeftType(config.peft_type).value
    way_out = (
        "Convert it with prefix-plus convert."
        if config.peft_type == PeftType.PREFIX_TUNING
        else "Serve it with another program."
    )
    return f"{source!r} is a {method} adapter; this server serves {PREFIX_PLUS.value} adapters. {way_out}"
