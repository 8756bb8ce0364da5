"""
Run an experiment with PREFIX_PLUS in PEFT's own comparison of methods on MetaMathQA: register the method, and hand on to
PEFT's `run.py`, which stays as it is.

    cd benchmarks/method_comparison
    python run.py PEFT_CHECKOUT -v experiments/prefix_plus/llama-3.2-3B-default

PEFT_CHECKOUT is a git checkout of PEFT. Everything after it goes to PEFT's `run.py`, which takes the path of an experiment only
in this form, relative to the current directory. What has to be installed: docs/method-comparison.md.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import peft_prefix_plus  # noqa: F401 (registers the method)


TASK = Path("method_comparison", "MetaMathQA")
"""Where PEFT keeps the comparison."""


def main(arguments: Sequence[str]) -> None:
    """
    Run PEFT's `run.py` as `python run.py …` in its own folder would.

    Args:
        arguments (`Sequence[str]`): A checkout of PEFT, and the arguments of its `run.py`.

    Raises:
        SystemExit: If no checkout is given, or it has no such file.
    """
    if not arguments or arguments[0].startswith("-"):
        sys.exit("Usage: python run.py PEFT_CHECKOUT [arguments of PEFT's run.py] experiments/prefix_plus/NAME")
    script = (Path(arguments[0]) / TASK / "run.py").resolve()
    if not script.is_file():
        sys.exit(f"Error: {arguments[0]!r} is no checkout of PEFT: it has no file {TASK / 'run.py'}.")
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(script.parent))  # its neighbours `utils` and `data`
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
