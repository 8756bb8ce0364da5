"""
What a `PeftModel` does with its adapters, done as a whole or not at all.

Adding, loading, switching, deleting and saving begin and end in PEFT's own methods, out of reach of a tuner. So a `PeftModel`
around a [`PrefixPlusModel`] gets objects of these classes for attributes, in the place of the methods that they call.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..config import PrefixPlusConfig
from ..references import ModelReference
from ..registration import PREFIX_PLUS
from ..saving.files import CARD_NAME, complete_model_cards, update_model_card, write_atomically
from ..saving.together import saving_together
from ..saving.weights import difference_of_settings, find_weights, naming_file, read_weights, write_settings
from .snapshot import Snapshot, all_or_nothing, what_switching_changes


if TYPE_CHECKING:
    from ..model import PrefixPlusModel


def act_as_a_whole(model: PeftModel) -> None:
    """Let the operations of a `PeftModel` leave it as it was if they end by an error or an interrupt."""
    for name, operation in OPERATIONS.items():
        setattr(model, name, operation(ModelReference(model), name))
    complete_model_cards(model)


@dataclass(eq=False)
class Operation:
    """
    A method of a `PeftModel`, as a whole.

    Args:
        reference (`ModelReference`): The model.
        name (`str`): The method's name.
    """

    reference: ModelReference
    name: str

    @property
    def model(self) -> Any:
        """The `PeftModel`."""
        return self.reference()

    @property
    def __wrapped__(self) -> Any:
        """The method itself: also what `inspect.signature` reads."""
        return types.MethodType(getattr(type(self.model), self.name), self.model)

    @property
    def tuner(self) -> PrefixPlusModel:
        """The tuner that the `PeftModel` wraps."""
        tuner: PrefixPlusModel = self.model.base_model
        return tuner

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments by name; further keyword arguments are under `"kwargs"`."""
        bound = inspect.signature(types.MethodType(getattr(PeftModel, self.name), self.model)).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments


class AddAdapter(Operation):
    """`PeftModel.add_adapter`."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with all_or_nothing(self.model, self.arguments(*args, **kwargs)["peft_config"]):
            self.__wrapped__(*args, **kwargs)


class SetAdapter(Operation):
    """`PeftModel.set_adapter`."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with all_or_nothing(self.model, modules=what_switching_changes(self.model)):
            self.__wrapped__(*args, **kwargs)


class DeleteAdapter(Operation):
    """`PeftModel.delete_adapter`."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with all_or_nothing(self.model):
            self.__wrapped__(*args, **kwargs)


class DisableAdapter(Operation):
    """`PeftModel.disable_adapter`, whose end cannot be missed."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        model, tuner = self.model, self.tuner
        before = Snapshot(model, modules=what_switching_changes(model))
        was_disabled = model._adapters_disabled
        was_enabled = any(not layer.disable_adapters for _, layer in tuner.prefix_layers())
        is_inside = False
        try:
            with self.__wrapped__():
                is_inside = True
                yield
        except BaseException:
            if not is_inside:
                before.restore()
                raise
            # at the end, too: what PEFT does there, again, in case that it was interrupted
            if was_enabled:
                tuner.enable_adapter_layers()
            model._adapters_disabled = was_disabled
            raise


class LoadAdapter(Operation):
    """`PeftModel.load_adapter`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arguments(*args, **kwargs)
        name, source = arguments["adapter_name"], arguments["model_id"]
        hub_kwargs, _ = self.model._split_kwargs(dict(arguments["kwargs"]))
        hub_kwargs.pop("use_auth_token", None)
        # of an adapter that `PeftModel.from_pretrained` has just made: the base model before that
        made = self.tuner.before_loading.pop(name, None)
        before = Snapshot(self.model, adapter_name=name) if made is None else made
        try:
            directory = os.path.join(source, hub_kwargs.get("subfolder") or "")
            if os.path.isdir(source) and find_weights(source, **hub_kwargs) is None:
                raise ValueError(
                    f"{directory} has no weights of an adapter: expected the file {SAFETENSORS_WEIGHTS_NAME}."
                )
            with naming_file(directory):
                if name not in self.model.peft_config and os.path.isdir(source):
                    PrefixPlusConfig.from_pretrained(source, **hub_kwargs)  # whose errors say more than PEFT's
                elif name in self.model.peft_config:
                    self._check_same_settings(name, source, hub_kwargs)
                return self.__wrapped__(*args, **kwargs)
        except BaseException:
            before.restore()
            raise

    def _check_same_settings(self, name: str, source: Any, hub_kwargs: dict[str, Any]) -> None:
        """Raise if an adapter that the model has already means something else by its weights than the file: PEFT would keep its configuration."""
        own = self.tuner.resolved_config(name).to_dict()
        path = find_weights(source, **hub_kwargs)
        found = [] if path is None else [(path, read_weights(path).settings)]
        try:
            found.append(
                (f"{CONFIG_NAME} of {source}", PrefixPlusConfig.from_pretrained(source, **hub_kwargs).to_dict())
            )
        except ValueError:
            if path is None or os.path.exists(os.path.join(os.path.dirname(path), CONFIG_NAME)):
                raise  # there is no need of a configuration, but where there is one it must be right
        for where, saved in found:
            setting = difference_of_settings(own, saved)
            if setting is not None:
                raise ValueError(
                    f"The adapter {name!r} of the model has `{setting}` = {own[setting]!r}, and the {where} has "
                    f"{saved[setting]!r}, so the weights would not mean the same in it. Load them as an adapter of another name, "
                    f"or delete the adapter {name!r} first."
                )


class SavePretrained(Operation):
    """`PeftModel.save_pretrained`, all of whose files are put in place together."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        arguments = self.arguments(*args, **kwargs)
        directory = arguments.pop("save_directory")
        if not arguments["is_main_process"] or os.path.isfile(directory):
            return self.__wrapped__(*args, **kwargs)
        options = {**arguments.pop("kwargs"), **arguments}
        with all_or_nothing(self.model, modules=()), saving_together(directory) as folder:
            if os.path.exists(os.path.join(directory, CARD_NAME)):
                shutil.copy(os.path.join(directory, CARD_NAME), folder)  # PEFT updates the card that it finds
            self.__wrapped__(folder, **options)
            for name in arguments["selected_adapters"] or self.model.peft_config:
                if self.model.peft_config[name].peft_type == PREFIX_PLUS:
                    self._complete(name, folder if name == "default" else os.path.join(folder, name))
        update_model_card(os.fspath(directory))
        return None

    def _complete(self, name: str, folder: str) -> None:
        """Say in the saved configuration what it resolved to, and in the weights' file what configuration they belong to."""
        path = os.path.join(folder, CONFIG_NAME)
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
        fields["position_free"] = self.tuner.resolved_config(name).position_free
        write_atomically(path, json.dumps(fields, indent=2, sort_keys=True))
        weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if os.path.exists(weights):
            write_settings(weights, fields)


OPERATIONS: dict[str, type[Operation]] = {
    "add_adapter": AddAdapter,
    "load_adapter": LoadAdapter,
    "set_adapter": SetAdapter,
    "delete_adapter": DeleteAdapter,
    "disable_adapter": DisableAdapter,
    "save_pretrained": SavePretrained,
}
