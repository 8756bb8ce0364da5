"""The adapters of one transformers model, by the names that clients use."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType

from ..model import BASE_MODEL_NAME
from ..registration import PREFIX_PLUS
from .adapter_files import chat_template


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """
    An adapter on the model.

    Attributes:
        key (`str`): Its name there. Clients' names may have characters that PEFT's may not, and move from one adapter to another.
        source (`str`): The directory or repository that it came from.
        chat_template (`str`, *optional*): The template that it was saved with.
    """

    key: str
    source: str
    chat_template: str | None = None


class AdaptedModel:
    """
    A base model and the adapters on it. Whoever owns it calls its methods one at a time.

    An adapter whose name is gone stays until [`AdaptedModel.drop_unnamed`] removes it: requests that still run may need it.

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
        """The base model, without what PEFT wraps around it."""
        return self._base_model

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The adapters by name."""
        return dict(self._named)

    def find(self, name: str | None) -> LoadedAdapter:
        """
        Return what a name stands for; without one, the base model.

        Raises:
            KeyError: If it stands for nothing.
        """
        return self.base if name in (None, self.base_name) else self._named[str(name)]

    def load(self, name: str, folder: Path, source: str) -> LoadedAdapter:
        """
        Let a name stand for an adapter, whatever it stood for before.

        Args:
            name (`str`): The name.
            folder (`Path`): The adapter's directory.
            source (`str`): Where it came from.

        Raises:
            ValueError: If it is no adapter of this package's method. Whatever is raised, everything is as before then.
        """
        self.check_name(name)
        config = PeftConfig.from_pretrained(str(folder))
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
            ValueError: If it may not.
        """
        if not name or name == self.base_name:
            raise ValueError(
                f"An adapter cannot be named {name!r}, as the base model or not at all. Choose another name."
            )

    def unload(self, name: str) -> None:
        """
        Let a name stand for nothing.

        Raises:
            KeyError: If there is no adapter of that name.
        """
        del self._named[name]

    def drop_unnamed(self, in_use: Collection[LoadedAdapter]) -> None:
        """Remove the adapters that neither a name stands for nor a request uses."""
        kept = {*self._named.values(), *in_use}
        dropped = [adapter for adapter in self._on_model if adapter not in kept]
        if len(dropped) == len(self._on_model):
            if dropped:  # PEFT's wrapper cannot do without any
                self._base_model = self._model = self._model.unload()
        else:
            for adapter in dropped:
                self._model.delete_adapter(adapter.key)
        self._on_model = [adapter for adapter in self._on_model if adapter in kept]

    @torch.no_grad()
    def generate(self, adapters: Sequence[LoadedAdapter], **kwargs: Any) -> Any:
        """
        Call the model's `generate`.

        Args:
            adapters (`Sequence[LoadedAdapter]`): The adapter of each row; `base` for none.
            kwargs: For `generate`.
        """
        if self._on_model:
            kwargs["adapter_names"] = [adapter.key for adapter in adapters]
        return self._model.generate(**kwargs)


def _other_method(source: str, config: Any) -> str:
    method = PeftType(config.peft_type).value
    way_out = (
        "Convert it by prefix-plus convert."
        if config.peft_type == PeftType.PREFIX_TUNING
        else "Serve it by another program."
    )
    return f"{source!r} is a {method} adapter; this server takes {PREFIX_PLUS.value} adapters. {way_out}"
