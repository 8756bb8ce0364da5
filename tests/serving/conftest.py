"""What the tests of serving share: a model and adapters on disk, what PEFT makes of them, and vLLM's settings for small machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest


sys.path.insert(0, str(Path(__file__).parent))

from served import ENVIRONMENT, Reference, save_adapters, save_model

from peft_prefix_plus.serving.folding import fold, served_model
from peft_prefix_plus.serving.store import PrefixStore


NUM_ADAPTERS = 20

os.environ.update(ENVIRONMENT)  # before vLLM is imported, which some tests do


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    path = tmp_path_factory.mktemp("served") / "model"
    save_model(path)
    return path


@pytest.fixture(scope="session")
def adapter_paths(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of all forms that can be served, and of many lengths, by name."""
    return save_adapters(model_path, tmp_path_factory.mktemp("adapters"), NUM_ADAPTERS)


@pytest.fixture(scope="session")
def reference(model_path: Path, adapter_paths: dict[str, Path]) -> Reference:
    """What PEFT generates with them."""
    return Reference(model_path, adapter_paths)


@pytest.fixture(scope="session")
def store(model_path: Path, adapter_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> PrefixStore:
    """The adapters as a server takes them."""
    store = PrefixStore(tmp_path_factory.mktemp("store"))
    served = served_model(str(model_path))
    for name, path in adapter_paths.items():
        store.add(name, fold(str(path), served), str(path))
    return store


@pytest.fixture
def engine(model_path: Path, store: PrefixStore) -> Callable[..., AbstractContextManager[Any]]:
    """Run vLLM in this process for a while."""

    @contextmanager
    def run(**options: Any) -> Iterator[Any]:
        import gc

        from vllm import LLM
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        from peft_prefix_plus.serving.vllm_server import kv_transfer_config

        settings = {"dtype": "float32", "max_model_len": 512, "block_size": 32, "enforce_eager": True, "seed": 0}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        llm = LLM(
            str(options.pop("model", model_path)),
            kv_transfer_config=kv_transfer_config(str(store.directory)),
            disable_log_stats=False,
            **{**settings, **options},
        )
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()

    return run
