"""
Requests per second and time to first token in vLLM: the base model, prefixes and LoRA, with 1, 8 and 50 adapters at once.

Every request has a prompt of its own and gets the same number of tokens. The base model's prompts start with as many tokens, the same in
all, as a prefix has, so that both attend to equally many. The ways of one server take turns, so that what else the machine does
meets them alike; each round starts with requests that are not counted. Run by `make bench-serving`; prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_prefix_plus import PrefixPlusConfig


NUMBERS = (1, 8, 50)
PREFIX_TOKENS = 32
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
MODULE = "vllm.entrypoints.openai.api_server"


@dataclass
class Way:
    """
    One row of the table.

    Attributes:
        title: What answers.
        models: The names that requests ask for in turn.
        requests_per_second: Of each round.
        first_tokens: The seconds to the first token of every request.
    """

    title: str
    models: list[str]
    requests_per_second: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)


def save_adapters(model: str, directory: Path) -> dict[str, list[Path]]:
    """Save random adapters of each method, and return their folders."""
    configs: dict[str, Any] = {
        "joint": PrefixPlusConfig.servable(num_virtual_tokens=PREFIX_TOKENS, task_type="CAUSAL_LM"),
        "decoupled": PrefixPlusConfig(num_virtual_tokens=PREFIX_TOKENS, decoupled=True, task_type="CAUSAL_LM"),
        "lora": LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    }
    paths: dict[str, list[Path]] = {}
    base = AutoModelForCausalLM.from_pretrained(model)
    for kind, config in configs.items():
        adapted: Any = get_peft_model(base, config)
        for index in range(max(NUMBERS)):
            torch.manual_seed(index)
            for parameter in adapted.parameters():
                if parameter.requires_grad and parameter.dim() > 1:
                    parameter.data.normal_(std=0.02)
            path = directory / f"{kind}-{index}"
            adapted.save_pretrained(str(path))
            paths.setdefault(kind, []).append(path)
        base = adapted.unload()
    return paths


@contextlib.contextmanager
def running(command: Sequence[str], port: int, log: Path) -> Iterator[float]:
    """Run a server, and yield how many seconds it took to start."""
    start = time.monotonic()
    with open(log, "wb") as writer:
        process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=writer, stderr=writer)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"The server has stopped:\n{log.read_text()[-3000:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            time.sleep(0.5)
        yield time.monotonic() - start
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def first_and_all(client: Any, model: str, prompt: list[int], num_tokens: int) -> float:
    """Ask for tokens, and return the seconds to the first one."""
    start, first = time.perf_counter(), 0.0
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=num_tokens,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for _ in stream:
        first = first or time.perf_counter() - start
    return first


async def measure(way: Way, client: Any, arguments: argparse.Namespace, draw: random.Random) -> None:
    """One round: every model is asked once, and then the counted requests are made, so many at a time."""
    common = list(range(1000, 1000 + PREFIX_TOKENS)) if way.title.startswith("base") else []
    prompts = [
        common + [draw.randrange(100, 20000) for _ in range(arguments.prompt_tokens)]
        for _ in range(arguments.requests)
    ]
    limit = asyncio.Semaphore(arguments.concurrency)

    async def ask(index: int, prompt: list[int], num_tokens: int) -> float:
        async with limit:
            return await first_and_all(client, way.models[index % len(way.models)], prompt, num_tokens)

    await asyncio.gather(*(ask(index, prompts[0], 1) for index in range(len(way.models))))
    start = time.perf_counter()
    firsts = await asyncio.gather(*(ask(index, prompt, arguments.new_tokens) for index, prompt in enumerate(prompts)))
    way.requests_per_second.append(len(prompts) / (time.perf_counter() - start))
    way.first_tokens += firsts


async def take_turns(ways: list[Way], port: int, arguments: argparse.Namespace) -> None:
    draw = random.Random(0)
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600) as client:
        for _ in range(arguments.rounds):
            for way in ways:
                await measure(way, client, arguments, draw)


def show(ways: list[Way], base: Way) -> None:
    for way in ways:
        rate, base_rate = statistics.median(way.requests_per_second), statistics.median(base.requests_per_second)
        first = statistics.median(way.first_tokens)
        print(f"| {way.title} | {rate:.2f} | {rate / base_rate:.2f} | {1000 * first:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=50, help="per way and round")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--without-lora", action="store_true")
    arguments = parser.parse_args()
    options = ["--served-model-name", "base", "--max-model-len", "1024", "--enforce-eager", "--block-size", "32"]
    with tempfile.TemporaryDirectory() as name:
        directory, port = Path(name), free_port()
        paths = save_adapters(arguments.model, directory)
        command = [
            sys.executable,
            "-m",
            "peft_prefix_plus.cli",
            "serve",
            "--model",
            arguments.model,
            "--port",
            str(port),
        ]
        for path in paths["joint"] + paths["decoupled"]:
            command += ["--adapter", f"{path.name}={path}"]
        print(
            "| what answers | requests/s | of base | median ms to the first token |\n|---|---:|---:|---:|", flush=True
        )
        with running([*command, "--", *options], port, directory / "log"):
            ways = [Way("base", ["base"])]
            ways += [
                Way(f"{kind} prefix, {number}", [path.name for path in paths[kind][:number]])
                for kind in ("joint", "decoupled")
                for number in NUMBERS
            ]
            asyncio.run(take_turns(ways, port, arguments))
            show(ways, ways[0])
        if arguments.without_lora:
            return
        command = [sys.executable, "-m", MODULE, "--model", arguments.model, "--port", str(port), *options]
        command += ["--enable-lora", "--max-loras", "8", "--max-cpu-loras", str(max(NUMBERS)), "--lora-modules"]
        command += [f"{path.name}={path}" for path in paths["lora"]]
        with running(command, port, directory / "lora.log"):
            ways = [Way("base, server with LoRA", ["base"])]
            ways += [Way(f"LoRA, {number}", [path.name for path in paths["lora"][:number]]) for number in NUMBERS]
            asyncio.run(take_turns(ways, port, arguments))
            show(ways, ways[0])


if __name__ == "__main__":
    main()
