"""
Requests per second, time to first token and time to load an adapter: vLLM with prefixes, the engine transformers, and LoRA in vLLM.

A base model and 1, 8 and 50 adapters at once are asked for some seconds each, by as many clients as `--concurrency` says. Every request has
a prompt of its own and gets the same number of tokens. The base model's prompts start with as many tokens, the same in all, as a
prefix has, so that both attend to equally many. The ways of one server take turns, so that what else the machine does meets them
alike; each round starts with requests that are not counted. Run by `make bench-serving`; prints tables.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.serving.adapted_model import AdaptedModel
from peft_prefix_plus.serving.adapter_files import adapter_folder
from peft_prefix_plus.serving.folding import fold, served_model
from peft_prefix_plus.serving.store import PrefixStore


NUMBERS = (1, 8, 50)
LORA_NUMBERS = (1, 8)  # vLLM's LoRA for CPUs copies the adapter's weights for every token, so 50 take long
ENGINES = ("vllm", "transformers", "lora")
PREFIX_TOKENS = 32
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
VLLM_OPTIONS = ("--served-model-name", "base", "--max-model-len", "1024", "--enforce-eager", "--block-size", "32")
KINDS = {"vllm": ("joint", "decoupled"), "transformers": ("decoupled",)}  # of transformers only the default form
NUM_TIMED = 8
"""How many adapters are loaded in this process to time the start."""
MODULE = "vllm.entrypoints.openai.api_server"


@dataclass
class Way:
    """
    One row of the table.

    Attributes:
        title: What answers.
        models: The names that requests ask for in turn.
        num_asked: How many requests there have been.
        requests_per_second: Of each round.
        first_tokens: The seconds to the first token of every request.
    """

    title: str
    models: list[str]
    num_asked: int = 0
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
    """One round: every model is asked once, and then requests are counted for some seconds."""
    common = list(range(1000, 1000 + PREFIX_TOKENS)) if way.title.startswith("base") else []
    limit = asyncio.Semaphore(arguments.concurrency)

    def prompt() -> list[int]:
        return common + [draw.randrange(100, 20000) for _ in range(arguments.prompt_tokens)]

    async def warm_up(model: str) -> None:
        async with limit:
            await first_and_all(client, model, prompt(), 1)

    async def keep_asking(end: float) -> int:
        number = 0
        while time.perf_counter() < end:
            model = way.models[way.num_asked % len(way.models)]
            way.num_asked += 1
            way.first_tokens.append(await first_and_all(client, model, prompt(), arguments.new_tokens))
            number += 1
        return number

    await asyncio.gather(*(warm_up(model) for model in way.models))
    start = time.perf_counter()
    numbers = await asyncio.gather(*(keep_asking(start + arguments.seconds) for _ in range(arguments.concurrency)))
    way.requests_per_second.append(sum(numbers) / (time.perf_counter() - start))


async def take_turns(ways: list[Way], port: int, arguments: argparse.Namespace) -> None:
    draw = random.Random(0)
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600) as client:
        for _ in range(arguments.rounds):
            for way in ways:
                await measure(way, client, arguments, draw)


def show(engine: str, ways: list[Way]) -> None:
    base = statistics.median(ways[0].requests_per_second)
    for way in ways:
        rate, first = statistics.median(way.requests_per_second), statistics.median(way.first_tokens)
        row = f"| {engine} | {way.title} | {rate:.2f} | {rate / base:.2f} | {1000 * first:.0f} | {way.num_asked} |"
        print(row, flush=True)


def seconds_of(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def load_over_http(port: int, path: Path) -> None:
    """Load an adapter into a running server, by its folder's name."""
    body = json.dumps({"name": path.name, "path": str(path)}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/load_prefix_adapter", body, headers)
    urllib.request.urlopen(request).close()


def seconds_at_start(engine: str, model: str, paths: list[Path], directory: Path) -> list[float]:
    """The seconds that a server takes for each adapter while it starts, from the functions that it calls."""
    if engine == "vllm":
        store = PrefixStore(directory)
        served = served_model(model)
        return [seconds_of(lambda p=path: store.add(p.name, fold(str(p), served), str(p))) for path in paths]
    adapted = AdaptedModel(AutoModelForCausalLM.from_pretrained(model), "base")
    return [seconds_of(lambda p=path: adapted.load(p.name, adapter_folder(str(p)), str(p))) for path in paths]


def show_loading(engine: str, kind: str, at_start: list[float], at_run_time: list[float]) -> None:
    """Print the milliseconds of the first adapter, which includes what is done once, and the median of the others."""
    cells = [
        f"{1000 * value:.0f}" for each in (at_start, at_run_time) for value in (each[0], statistics.median(each[1:]))
    ]
    print(f"| {engine} | {kind} | {' | '.join(cells)} |", flush=True)


SPEED = "| engine | what answers | requests/s | of base | median ms to the first token | requests |\n|---|---|---:|---:|---:|---:|"
LOADING = "| engine | adapter | at start, ms: first | others | while it runs, ms: first | others |\n|---|---|---:|---:|---:|---:|"


def measure_prefixes(
    engine: str, paths: dict[str, list[Path]], directory: Path, arguments: argparse.Namespace
) -> tuple[list[Way], dict[str, tuple[list[float], list[float]]]]:
    """Start a server without adapters, load them over HTTP, and ask. Return the speeds, and the seconds of loading."""
    port = free_port()
    command = [sys.executable, "-m", "peft_prefix_plus.cli", "serve", "--engine", engine, "--model", arguments.model]
    command += ["--port", str(port), "--may-load"]
    if engine == "vllm":
        command += ["--", *VLLM_OPTIONS]
    else:
        command += ["--max-batch-size", str(arguments.concurrency)]
    loading = {}
    with running(command, port, directory / f"{engine}.log"):
        for kind in KINDS[engine]:
            folder = directory / f"store-{kind}"
            folder.mkdir(exist_ok=True)
            loading[kind] = (
                seconds_at_start(engine, arguments.model, paths[kind][:NUM_TIMED], folder),
                [seconds_of(lambda p=path: load_over_http(port, p)) for path in paths[kind]],
            )
        ways = [Way("base", ["base" if engine == "vllm" else arguments.model])]
        ways += [
            Way(f"{kind} prefix, {number}", [path.name for path in paths[kind][:number]])
            for kind in KINDS[engine]
            for number in NUMBERS
        ]
        asyncio.run(take_turns(ways, port, arguments))
    return ways, loading


def measure_lora(paths: list[Path], directory: Path, arguments: argparse.Namespace) -> list[Way]:
    port = free_port()
    command = [sys.executable, "-m", MODULE, "--model", arguments.model, "--port", str(port), *VLLM_OPTIONS]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", str(max(LORA_NUMBERS)), "--lora-modules"]
    command += [f"{path.name}={path}" for path in paths[: max(LORA_NUMBERS)]]
    with running(command, port, directory / "lora.log"):
        ways = [Way("base, server with LoRA", ["base"])]
        ways += [Way(f"LoRA, {number}", [path.name for path in paths[:number]]) for number in LORA_NUMBERS]
        asyncio.run(take_turns(ways, port, arguments))
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="per way and round")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        paths = save_adapters(arguments.model, directory)
        loading = {}
        print(SPEED, flush=True)
        for engine in arguments.engines:
            if engine == "lora":
                show("vllm", measure_lora(paths["lora"], directory, arguments))
            else:
                ways, loading[engine] = measure_prefixes(engine, paths, directory, arguments)
                show(engine, ways)
        print(f"\n{LOADING}", flush=True)
        for engine, kinds in loading.items():
            for kind, (at_start, at_run_time) in kinds.items():
                show_loading(engine, kind, at_start, at_run_time)


if __name__ == "__main__":
    main()
