"""What all tests share: one thread, no network, the same random numbers every time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Accelerate imports DeepSpeed wherever it is installed. Left to look for a device, it prints what it finds.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from transformers.utils import logging


REPOSITORY = Path(__file__).parent.parent


def pytest_configure() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_in_new_process(tmp_path: Path) -> Callable[..., str]:
    """Run a Python program in a process that has imported nothing, and return what it prints."""

    def run(program: str, *arguments: object) -> str:
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
        script = tmp_path / "program.py"
        script.write_text(program, encoding="utf-8")
        result = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
