"""Loading all adapters of a directory, whatever their methods."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..saving.files import CARD_NAME, CONFIG_NAME, is_prefix_tuning_folder
from ..saving.reading import find_folder, load_config, naming_file
from ..saving.weights import UNFINISHED
from .snapshot import all_or_nothing


def load_adapters(
    model: Any, directory: str | os.PathLike[str], is_trainable: bool = False, **hub_kwargs: Any
) -> dict[str, PeftModel]:
    """
    Load all adapters of a directory onto one base model, those of a prefix and of LoRA for instance.

    `save_pretrained` and `push_to_hub` of the prefix's wrapper save the adapters of all methods on the model, each in a
    folder of its name, or in the directory itself if the name is `"default"`. This is their counterpart. Each method
    has its own `PeftModel` around the base model. All of these compute with all active adapters; the first adapter of
    each method is active.

    Args:
        model (`nn.Module`): The base model.
        directory (`str` or `os.PathLike`): The directory, or the name of a repository on the Hub.
        is_trainable (`bool`, defaults to `False`): Whether to train the active adapters.
        hub_kwargs: For a repository, what `huggingface_hub.snapshot_download` takes (`revision`, `token`…).

    Returns:
        `dict[str, PeftModel]`: By each adapter's name, the `PeftModel` of its method.

    Raises:
        TypeError: If the model is a `PeftModel`.
        ValueError: If there is no adapter, the Hub cannot be reached, a file is missing or broken, or an adapter replaces the input
            instead of layers. The model is then as it was, as it is after any other error.

    Example:

    ```py
    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, load_adapters

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), adapter_name="style")
    >>> both = get_peft_model(base, PrefixPlusConfig(), adapter_name="manual")
    >>> directory = tempfile.mkdtemp()
    >>> both.save_pretrained(directory)

    >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> loaded = load_adapters(base, directory)
    >>> sorted(loaded)
    ['manual', 'style']

    ```
    """
    if isinstance(model, PeftModel):
        raise TypeError("The model is a PeftModel. Give the base model, model.unload().")
    folder_of_all = find_folder(directory, ["adapter_*", "*/adapter_*", f"*/{CARD_NAME}"], **hub_kwargs)
    folders = _adapter_folders(folder_of_all)
    if not folders:
        raise ValueError(f"{directory} has no adapter: neither it nor a folder in it has the file {CONFIG_NAME}.")
    wrappers: dict[Any, PeftModel] = {}
    loaded = {}
    with all_or_nothing(model):
        for name, folder in folders.items():
            config: Any = load_config(folder)
            if config.is_prompt_learning and len(folders) > 1:
                raise ValueError(
                    f"The adapter {name!r} is one of {config.peft_type.value}, which only its own PeftModel computes with. Load it alone, "
                    f"with PeftModel.from_pretrained(model, {str(folder)!r})."
                )
            with naming_file(folder):
                if config.peft_type in wrappers:
                    wrappers[config.peft_type].load_adapter(str(folder), name)
                else:
                    wrappers[config.peft_type] = PeftModel.from_pretrained(
                        model,
                        str(folder),
                        adapter_name=name,
                        is_trainable=is_trainable,
                    )
            loaded[name] = wrappers[config.peft_type]
    return loaded


def _adapter_folders(directory: Path) -> dict[str, Path]:
    """
    The adapters of a directory. A folder with a card of its own (a checkpoint) is not part of it, and one that has another form of an
    adapter is no adapter of its own.
    """
    folders = {"default": directory} if (directory / CONFIG_NAME).exists() else {}
    for folder in sorted(directory.iterdir()):
        is_part = not folder.name.startswith(UNFINISHED) and not (folder / CARD_NAME).exists()
        if is_part and (folder / CONFIG_NAME).exists() and not is_prefix_tuning_folder(folder):
            folders[folder.name] = folder
    return folders
