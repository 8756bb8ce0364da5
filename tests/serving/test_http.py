"""`prefix-plus serve`: adapters are models of an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from hub_server import HubServer, running_hub
from served import ENVIRONMENT, VOCABULARY, Reference, push, save_adapter
from transformers import AutoTokenizer


pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]
pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

MAX_MODEL_LEN = 512
ON_HUB = ("adapter-2", "adapter-5")
"""The adapters that the server gets from a Hub."""
LOAD_SECONDS = float(os.environ.get("SERVING_LOAD_SECONDS", "45"))
"""How long the mixed load runs, half of it on the base model alone."""


class Server:
    """A running server: its address, its process, and a client."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url, self.process, self.log = url, process, log
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=120)

    def post(self, route: str, /, **body: Any) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            f"{self.url}{route}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer secret"},
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def complete(self, model: str, prompt: Any, num_tokens: int = 12, **options: Any) -> Any:
        return self.client.completions.create(
            model=model, prompt=prompt, max_tokens=num_tokens, temperature=0.0,
            extra_body={"ignore_eos": True, "return_token_ids": True, **options},
        )  # fmt: skip

    def memory(self) -> int:
        """What the server's processes have in memory, in bytes."""
        parent = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in [parent, *parent.children(recursive=True)])


@pytest.fixture(scope="module")
def hub(adapter_paths: dict[str, Path]) -> Iterator[HubServer]:
    """A Hub with an additive adapter and one for the cache."""
    with running_hub({"token-of-user": "user"}) as hub:
        for name in ON_HUB:
            push(adapter_paths[name], hub, f"user/{name}")
        yield hub


@pytest.fixture(scope="module")
def server(
    model_path: Path, adapter_paths: dict[str, Path], hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "peft_prefix_plus.cli", "serve", "--model", str(model_path), "--port", str(port)]
    for name, path in adapter_paths.items():
        command += ["--adapter", f"{name}=user/{name}" if name in ON_HUB else f"{name}={path}"]
    command += [
        "--may-load",
        "--",
        "--served-model-name",
        "base",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--block-size=32",
        "--num-gpu-blocks-override=640",  # a cache that is soon full, so that what it has in memory does not grow
    ]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--api-key", "secret", "--max-num-seqs", "32"]
    environment = {**os.environ, **ENVIRONMENT, **hub.environment(tmp_path_factory.mktemp("home"))}
    with open(log, "wb") as writer:
        process = subprocess.Popen(command, env=environment, stdout=writer, stderr=writer)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{url}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield Server(url, process, log)
    finally:
        process.terminate()
        process.wait(60)


def questions(names: list[str], number: int, seed: int) -> list[tuple[str, list[int]]]:
    draw = random.Random(seed)
    return [
        (names[index % len(names)], [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 60))])
        for index in range(number)
    ]


def test_the_models_are_the_base_model_and_the_adapters(server: Server, adapter_paths: dict[str, Path]) -> None:
    models = {model.id: model for model in server.client.models.list()}
    assert set(models) == {"base", *adapter_paths}
    assert all(models[name].parent == "base" for name in adapter_paths)
    assert {models[name].root for name in ON_HUB} == {f"user/{name}" for name in ON_HUB}


def test_completions_of_a_mixed_load_are_pefts(
    server: Server, reference: Reference, adapter_paths: dict[str, Path]
) -> None:
    asked = questions(["base", *adapter_paths], 42, seed=11)
    expected = [reference.generate(None if name == "base" else name, prompt, 12) for name, prompt in asked]
    for _ in ("cold", "warm"):
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda question: server.complete(*question), asked))
        assert [answer.choices[0].token_ids for answer in found] == expected
        assert [answer.model for answer in found] == [name for name, _ in asked]
        assert [answer.usage.prompt_tokens for answer in found] == [len(prompt) for _, prompt in asked]


def test_several_prompts_texts_and_streams(server: Server, model_path: Path, reference: Reference) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    texts = ["The first text", "and another one"]
    expected = [reference.generate("adapter-4", tokenizer(text)["input_ids"], 12) for text in texts]
    answer = server.complete("adapter-4", texts)
    assert [choice.token_ids for choice in answer.choices] == expected
    options = {"model": "adapter-4", "prompt": texts[0], "max_tokens": 12, "temperature": 0.0, "stream": True}
    events = list(server.client.completions.create(**options, extra_body={"ignore_eos": True}))
    assert "".join(event.choices[0].text for event in events) == answer.choices[0].text
    assert {event.model for event in events} == {"adapter-4"}


def test_chats_with_and_without_streams(server: Server, model_path: Path, reference: Reference) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    messages = [{"role": "user", "content": 'Say "model":"base" once.'}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    for adapter in ("adapter-1", "base"):
        expected = reference.generate(None if adapter == "base" else adapter, prompt, 12)
        options: dict[str, Any] = {"model": adapter, "messages": messages, "max_tokens": 12, "temperature": 0.0}
        extra = {"ignore_eos": True, "return_token_ids": True}
        answer = server.client.chat.completions.create(**options, extra_body=extra)
        assert (answer.choices[0].token_ids, answer.model) == (expected, adapter)
        events = list(server.client.chat.completions.create(**options, stream=True, extra_body={"ignore_eos": True}))
        texts = [event.choices[0].delta.content or "" for event in events if event.choices]
        assert "".join(texts) == answer.choices[0].message.content
        assert {event.model for event in events} == {adapter}


def test_adapters_come_and_go_while_it_runs(
    server: Server, model_path: Path, adapter_paths: dict[str, Path], tmp_path: Path
) -> None:
    paths = {}
    for seed in (51, 52):
        paths[seed] = tmp_path / str(seed)
        save_adapter(model_path, paths[seed], seed, num_virtual_tokens=32)
    prompt = list(range(40))
    for seed in (51, 52):  # the second takes the name, and must not meet the first's cached blocks
        assert server.post("/v1/load_prefix_adapter", name="late", path=str(paths[seed]))[0] == 200
        expected = Reference(model_path, {"late": paths[seed]}).generate("late", prompt, 12)
        for _ in range(2):
            assert server.complete("late", prompt).choices[0].token_ids == expected
    assert server.post("/v1/unload_prefix_adapter", name="late")[0] == 200
    with pytest.raises(openai.NotFoundError):
        server.complete("late", prompt)
    assert server.post("/v1/unload_prefix_adapter", name="late")[0] == 404


def test_an_adapter_comes_from_the_hub_while_it_runs(
    server: Server, hub: HubServer, adapter_paths: dict[str, Path], reference: Reference
) -> None:
    push(adapter_paths["adapter-3"], hub, "user/late")
    status, answer = server.post("/v1/load_prefix_adapter", name="late", path="user/late")
    assert status == 200, answer
    assert server.complete("late", [1, 2, 3]).choices[0].token_ids == reference.generate("adapter-3", [1, 2, 3], 12)
    server.post("/v1/unload_prefix_adapter", name="late")
    status, answer = server.post("/v1/load_prefix_adapter", name="late", path="user/nothing")
    assert status == 400 and "user/nothing" in answer["error"]["message"]


def test_what_cannot_be_served_is_refused_and_the_server_goes_on(
    server: Server, model_path: Path, adapter_paths: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    forms = {
        "position-free": {"position_free": True},
        "layers": {"layers_to_transform": [1]},
        "modules": {"modules_to_save": ["lm_head"]},
    }
    for name, fields in forms.items():
        save_adapter(model_path, tmp_path / name, 1, num_virtual_tokens=4, **fields)
        status, answer = server.post("/v1/load_prefix_adapter", name=name, path=str(tmp_path / name))
        assert status == 400 and name in answer["error"]["message"] and "servable" in answer["error"]["message"]
    broken = tmp_path / "broken"
    save_adapter(model_path, broken, 1, num_virtual_tokens=4)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for path in (broken, tmp_path / "nowhere", model_path):
        assert server.post("/v1/load_prefix_adapter", name="bad", path=str(path))[0] == 400
    assert server.post("/v1/load_prefix_adapter", name="base", path=str(adapter_paths["adapter-0"]))[0] == 400
    assert server.post("/v1/load_prefix_adapter", name="bad")[0] in (400, 422)

    with pytest.raises(openai.NotFoundError):
        server.complete("bad", [1, 2])
    for options in ({"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}):
        with pytest.raises(openai.BadRequestError, match="log-probabilities"):
            server.complete("adapter-0", [1, 2], **options)
    for prompt in ([5] * 480, "x" * 480):
        with pytest.raises(openai.BadRequestError, match=r"480 and the adapter 70 virtual tokens"):
            server.complete("adapter-2", prompt, num_tokens=4)
    with pytest.raises(openai.BadRequestError, match="virtual tokens"):
        server.client.chat.completions.create(
            model="adapter-2", messages=[{"role": "user", "content": "x" * 460}], max_tokens=4
        )
    assert server.post("/v1/completions", model="adapter-0", prompt={"no": "prompt"})[0] in (400, 422)
    lost = {"kv_transfer_params": {"prefix_plus": "0" * 64}}
    with pytest.raises(openai.InternalServerError):
        server.complete("base", [1, 2], **lost)
    answer = server.complete("adapter-0", [1, 2, 3])
    assert answer.choices[0].token_ids == reference.generate("adapter-0", [1, 2, 3], 12)


def test_the_servers_api_key_is_asked_for(server: Server, adapter_paths: dict[str, Path]) -> None:
    request = urllib.request.Request(
        f"{server.url}/v1/load_prefix_adapter",
        json.dumps({"name": "x", "path": str(adapter_paths["adapter-0"])}).encode(),
        {"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request)
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.completions.create(model="adapter-0", prompt="x", max_tokens=1)


@pytest.mark.timeout(600 + LOAD_SECONDS)
def test_a_mixed_load_gets_right_answers_and_memory_grows_no_more_than_with_the_base_model(
    server: Server, reference: Reference, adapter_paths: dict[str, Path]
) -> None:
    asked = questions(["base", *adapter_paths], 63, seed=12)
    expected = [reference.generate(None if name == "base" else name, prompt, 12) for name, prompt in asked]
    draw = random.Random(13)

    def ask(index: int) -> bool:
        name, prompt = asked[index]
        return bool(server.complete(name, prompt).choices[0].token_ids == expected[index])

    def growth(kind: str, indices: list[int]) -> float:
        """Bytes per request by which memory grows in half of the time."""
        before, end, number = server.memory(), time.monotonic() + LOAD_SECONDS / 2, 0
        while time.monotonic() < end:
            assert all(pool.map(ask, draw.choices(indices, k=32)))
            number += 32
        after = server.memory()
        print(f"{kind}: {number} requests, all right; memory {before / 2**20:.0f} MiB, then {after / 2**20:.0f} MiB")
        return (after - before) / number

    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            assert all(pool.map(ask, range(len(asked))))
        # vLLM's build for CPUs itself grows with every request, the less the longer it runs
        base = growth("base model", [index for index, (name, _) in enumerate(asked) if name == "base"])
        mixed = growth("mixed", list(range(len(asked))))
    assert mixed < 1.5 * base + 2**16
