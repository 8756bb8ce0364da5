"""
The operations of a `PeftModel` on its adapters, all or nothing.

Adding, loading, switching, deleting and saving begin and end in PEFT's own methods, which a tuner cannot change. So a
`PeftModel` around a [`PrefixPlusModel`] gets a class of the same name that puts [`WholeOperations`] before its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..config import PrefixPlusConfig
from ..registration import PREFIX_PLUS
from ..saving.files import CARD_NAME, prefix_tuning_folder, update_model_card, write_atomically, write_model_card
from ..saving.prefix_tuning_folder import (
    Exported,
    as_prefix_tuning,
    remove_outdated_prefix_tuning,
    write_prefix_tuning,
)
from ..saving.reading import find_file, naming_file
from ..saving.together import saving_together
from ..saving.weights import difference_of_settings, find_weights, read_saved_weights, write_settings
from .snapshot import Snapshot, all_or_nothing, what_switching_changes


_PUSHED: ContextVar[Exported | None] = ContextVar("exported", default=None)
"""What the `push_to_hub` in progress adds to what it saves: PEFT's own calls `save_pretrained` without the arguments that it does not know."""


def act_as_a_whole(model: PeftModel) -> None:
    """Make the operations of a `PeftModel` leave it as it was if they end with an error or an interrupt."""
    own_class: Any = type(model)
    if not issubclass(own_class, WholeOperations):
        model.__class__ = _whole_class(own_class)


class WholeOperations:
    """
    The methods of a `PeftModel` that change or save its adapters, all or nothing. A mixin before a `PeftModel` class.
    """

    _peft_class: type[PeftModel]
    base_model: Any

    @wraps(PeftModel.add_adapter)
    def add_adapter(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        with all_or_nothing(self, peft_config):
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)  # type: ignore[misc]

    @wraps(PeftModel.set_adapter)
    def set_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        with all_or_nothing(self, modules=what_switching_changes(self)):
            super().set_adapter(*args, **kwargs)  # type: ignore[misc]

    @wraps(PeftModel.delete_adapter)
    def delete_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        with all_or_nothing(self):
            super().delete_adapter(*args, **kwargs)  # type: ignore[misc]

    @wraps(PeftModel.disable_adapter)
    @contextmanager
    def disable_adapter(self: Any) -> Iterator[None]:
        before = Snapshot(self, modules=what_switching_changes(self))
        was_disabled = self._adapters_disabled
        was_enabled = any(not layer.disable_adapters for _, layer in self.base_model.prefix_layers())
        is_inside = False
        try:
            with super().disable_adapter():  # type: ignore[misc]
                is_inside = True
                yield
        except BaseException:
            if not is_inside:
                before.restore()
                raise
            # at the end, too: what PEFT does there, again, in case that it was interrupted
            if was_enabled:
                self.base_model.enable_adapter_layers()
            self._adapters_disabled = was_disabled
            raise

    @wraps(PeftModel.load_adapter)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        hub_kwargs, _ = self._split_kwargs(kwargs)
        hub_kwargs.pop("use_auth_token", None)
        # of an adapter that `PeftModel.from_pretrained` has just made: the base model before that
        made = self.base_model.before_loading.pop(adapter_name, None)
        before = Snapshot(self, adapter_name=adapter_name) if made is None else made
        try:
            directory = os.path.join(model_id, hub_kwargs.get("subfolder") or "")
            if os.path.isdir(model_id) and find_weights(model_id, **hub_kwargs) is None:
                raise ValueError(
                    f"{directory} has no weights of an adapter: expected the file {SAFETENSORS_WEIGHTS_NAME}."
                )
            with naming_file(directory):
                known = self.peft_config.get(adapter_name)
                is_prefix = known is None or known.peft_type == PREFIX_PLUS  # not another method's on the same model
                if known is not None and is_prefix:
                    _check_same_settings(self, adapter_name, model_id, hub_kwargs)
                try:
                    return super().load_adapter(model_id, adapter_name, *args, **kwargs)  # type: ignore[misc]
                except Exception:
                    if is_prefix and os.path.isdir(model_id):
                        PrefixPlusConfig.from_pretrained(model_id, **hub_kwargs)  # whose errors say more than PEFT's
                    raise
        except BaseException:
            before.restore()
            raise

    @wraps(PeftModel.save_pretrained)
    def save_pretrained(
        self: Any,
        save_directory: Any,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        include_prefix_tuning: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Save the adapters, all files together.

        Args:
            save_directory (`str`): The directory, made if it does not exist.
            include_prefix_tuning (`bool`, defaults to `False`):
                Add each adapter as one of PEFT's PREFIX_TUNING, which PEFT loads without this package: in the folder
                `prefix_tuning`, and for an adapter that is not named "default" in `NAME_prefix_tuning`.
            kwargs: As in [`PeftModel.save_pretrained`].

        Raises:
            ValueError: If an adapter cannot be expressed in PREFIX_TUNING. Nothing is then written.
        """
        options = {
            "safe_serialization": safe_serialization,
            "selected_adapters": selected_adapters,
            "save_embedding_layers": save_embedding_layers,
            "is_main_process": is_main_process,
            **kwargs,
        }
        if not is_main_process or os.path.isfile(save_directory):
            super().save_pretrained(save_directory, **options)  # type: ignore[misc]
            return
        saved = [
            name for name in selected_adapters or self.peft_config if self.peft_config[name].peft_type == PREFIX_PLUS
        ]
        exported = as_prefix_tuning(self, saved, save_directory) if include_prefix_tuning else _PUSHED.get() or {}
        with all_or_nothing(self, modules=()), saving_together(save_directory) as folder:
            if os.path.exists(os.path.join(save_directory, CARD_NAME)):
                shutil.copy(os.path.join(save_directory, CARD_NAME), folder)  # PEFT updates the card that it finds
            super().save_pretrained(folder, **options)  # type: ignore[misc]
            for name in saved:
                _complete_files(self, name, folder if name == "default" else os.path.join(folder, name))
            write_prefix_tuning(exported, folder)
        for name in saved:
            if name not in exported:
                remove_outdated_prefix_tuning(os.path.join(save_directory, prefix_tuning_folder(name)))
        update_model_card(os.fspath(save_directory))

    @wraps(PeftModel.push_to_hub)
    def push_to_hub(self: Any, *args: Any, include_prefix_tuning: bool = False, **kwargs: Any) -> Any:
        names = [name for name, config in self.peft_config.items() if config.peft_type == PREFIX_PLUS]
        pushed = _PUSHED.set(as_prefix_tuning(self, names) if include_prefix_tuning else None)
        try:
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]
        finally:
            _PUSHED.reset(pushed)

    def create_or_update_model_card(self: Any, output_dir: str, repo_id: str | None = None) -> None:
        """
        Write the model's card, or update the one that is there.

        Args:
            output_dir (`str`): The directory of the card.
            repo_id (`str`, *optional*): The repository that the directory goes to; `None` if it is not known.
        """
        has_prefix = any(config.peft_type == PREFIX_PLUS for config in self.peft_config.values())
        write_model_card(super().create_or_update_model_card, output_dir, repo_id, has_prefix)  # type: ignore[misc]

    def _upload_modified_files(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # `push_to_hub` has put the card of the repository, or transformers' template, in the directory
        self.create_or_update_model_card(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_whole, (self._peft_class,), *reduced[2:]


@cache
def _whole_class(peft_class: Any) -> Any:
    """The class, of the same name, that makes the operations of a class of PEFT all or nothing."""
    names = {name: getattr(peft_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(peft_class.__name__, (WholeOperations, peft_class), {**names, "_peft_class": peft_class})


def _new_whole(peft_class: Any) -> Any:
    """Where an unpickled model starts from."""
    whole = _whole_class(peft_class)
    return whole.__new__(whole)


def _check_same_settings(model: Any, name: str, source: Any, hub_kwargs: dict[str, Any]) -> None:
    """
    Raise if the settings of an adapter on the model differ from those of the file's weights: PEFT would keep the
    adapter's configuration.
    """
    own = model.base_model.resolved_config(name).to_dict()
    found = []
    # weights need no configuration, but where there is one it must be right
    if find_file(source, CONFIG_NAME, **hub_kwargs) is None:
        weights = read_saved_weights(source, **hub_kwargs)
    else:
        config, weights = PrefixPlusConfig._with_weights(source, **hub_kwargs)
        found.append((f"{CONFIG_NAME} of {source}", config.to_dict()))
    if weights is not None:
        found.insert(0, (weights.path, weights.settings))
    for where, saved in found:
        setting = difference_of_settings(own, saved)
        if setting is not None:
            raise ValueError(
                f"The adapter {name!r} of the model has `{setting}` = {own[setting]!r}, and the {where} has "
                f"{saved[setting]!r}, so the weights would not mean the same in it. Load them as an adapter of another name, "
                f"or delete the adapter {name!r} first."
            )


def _complete_files(model: Any, name: str, folder: str) -> None:
    """
    Write the resolved values into the saved configuration, and the configuration's settings into the weights' file.
    """
    path = os.path.join(folder, CONFIG_NAME)
    with open(path, encoding="utf-8") as file:
        fields = json.load(file)
    fields["position_free"] = model.base_model.resolved_config(name).position_free
    write_atomically(path, json.dumps(fields, indent=2, sort_keys=True))
    weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if os.path.exists(weights):
        write_settings(weights, fields)
