"""`prefix-plus run`: programs that do not import the plugin load its adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import failure
from peft import get_peft_model
from transformers import LlamaForCausalLM

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.cli.running import run_program


ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import helper  # beside this file, as for Python itself
from peft import PeftModel
from transformers import AutoModelForCausalLM
assert not any("peft_prefix_plus" in line for line in open(__file__) if line.startswith(("import", "from")))
assert sys.argv[1:] == ["--adapter", "first", "-m", "--help"], sys.argv
base, adapter = helper.PATHS
loaded = AutoModelForCausalLM.from_pretrained(adapter)
wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
import torch
tokens = torch.tensor([[2, 3, 4]])
logits = [model.eval()(input_ids=tokens).logits for model in (loaded, wrapped)]
print(__name__, torch.equal(*logits), logits[0].sum().item())
sys.exit(3)
"""


def run_python(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "peft_prefix_plus.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter, and a program that loads it."""
    folder = tmp_path_factory.mktemp("run")
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(str(folder / "adapter"))
    (folder / "helper.py").write_text(f"PATHS = {str(base)!r}, {str(folder / 'adapter')!r}\n", encoding="utf-8")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    return folder


@pytest.mark.parametrize("way", ["file", "module"])
def test_a_program_that_does_not_know_the_method_loads_an_adapter(folder: Path, tmp_path: Path, way: str) -> None:
    arguments = ["--adapter", "first", "-m", "--help"]
    if way == "file":
        done = run_python("run", folder / "program.py", *arguments, cwd=tmp_path)
    else:
        done = run_python("run", "-m", "program", *arguments, cwd=folder)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("__main__ True")


def test_a_command_of_another_package_runs_in_this_process_with_the_method(tmp_path: Path) -> None:
    """`accelerate` and `lm_eval` are commands of this kind."""
    (tmp_path / "tool.py").write_text(
        "import sys\nfrom peft import PeftType\n\ndef main():\n    print(PeftType('PREFIX_PLUS').value, sys.argv)\n    return 4\n",
        encoding="utf-8",
    )
    information = tmp_path / "tool-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: tool\nVersion: 1\n", encoding="utf-8")
    (information / "entry_points.txt").write_text("[console_scripts]\nmy-tool = tool:main\n", encoding="utf-8")
    done = run_python("run", "my-tool", "--model", "x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "PREFIX_PLUS ['my-tool', '--model', 'x']\n"), done.stderr


def test_an_error_of_the_program_is_shown_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("import no_such_package\n", encoding="utf-8")
    done = run_python("run", "wrong.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ModuleNotFoundError: No module named 'no_such_package'" in done.stderr


def test_what_is_no_program_is_refused_in_words(tmp_path: Path) -> None:
    assert "expected a Python file, or a command of an installed Python package" in failure("run", "no-such-program")
    assert "it is not installed" in failure("run", "-m", "no_such_module")


def test_a_program_leaves_the_search_path_as_it_was(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text("import sys\nsys.path.insert(0, 'elsewhere')\n", encoding="utf-8")
    arguments, path = list(sys.argv), list(sys.path)
    with pytest.raises(SystemExit):
        run_program(str(script), ["--option"])
    assert (sys.argv, sys.path) == (arguments, path)
