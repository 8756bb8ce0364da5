"""Starting the engine transformers: an OpenAI-compatible server of one model and its adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from .adapted_model import AdaptedModel
from .adapter_files import adapter_folder


SHUTDOWN_SECONDS = 5
"""How long a stopping server waits for answers that are being sent."""

PACKAGES = ("fastapi", "uvicorn")


def check_installed() -> None:
    """
    Raise unless the server's packages are installed.

    Raises:
        ModuleNotFoundError: If one is missing.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"The engine transformers needs {' and '.join(missing)}. Install with: pip install "
            '"peft-prefix-plus[serve]"'
        )


def load_adapters(base_model: Any, base_name: str, adapters: Mapping[str, str]) -> AdaptedModel:
    """
    Load adapters into a model.

    Args:
        base_model (`PreTrainedModel`): The base model.
        base_name (`str`): Its name for clients.
        adapters (`Mapping[str, str]`): The adapters, directories or names on the Hub, by their names for clients.

    Returns:
        `AdaptedModel`: The model with its adapters.

    Raises:
        ValueError: If an adapter cannot be loaded. The message names it.
    """
    model = AdaptedModel(base_model, base_name)
    for name, path in adapters.items():
        try:
            model.load(name, adapter_folder(path), path)
        except Exception as error:  # broken files raise anything
            raise ValueError(f"The adapter {name!r} cannot be served: {error}") from error
    return model


def serve(
    model: AdaptedModel,
    tokenizer: Any,
    encode: Callable[[str], list[int]],
    host: str,
    port: int,
    *,
    max_batch_size: int,
    max_model_len: int | None = None,
    may_load: bool = False,
    api_key: str | None = None,
) -> None:
    """
    Serve a model and its adapters until the server is stopped.

    Args:
        model (`AdaptedModel`): The model and its adapters.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        encode (`Callable[[str], list[int]]`): Turns a prompt into tokens.
        host (`str`): The address to listen on.
        port (`int`): The port to listen on.
        max_batch_size (`int`): The most prompts in a batch.
        max_model_len (`int`, *optional*): The most tokens of a prompt and its answer; `None` if there is no limit.
        may_load (`bool`, defaults to `False`): Whether clients may load and unload adapters.
        api_key (`str`, *optional*): The key that clients must send; `None` if they need none.

    Raises:
        ModuleNotFoundError: If a package is missing.
        SystemExit: If the server cannot listen on this address.
    """
    check_installed()
    import uvicorn

    from .batcher import Batcher
    from .transformers_app import AppSettings, StoppingServer, make_app

    batcher = Batcher(model, max_batch_size, max_model_len)
    settings = AppSettings(max_model_len=max_model_len, may_load=may_load, api_key=api_key)
    app = make_app(model, batcher, tokenizer, encode, settings)
    config = uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    with suppress(KeyboardInterrupt):  # Ctrl-C stops the server
        StoppingServer(config, batcher).run()
