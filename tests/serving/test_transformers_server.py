"""`prefix-plus serve --engine transformers`: adapters of every form are models of an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from hub_server import running_hub
from served import VOCABULARY, Reference, push, save_adapter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    WatermarkingConfig,
)
from typing_extensions import Self

from peft_prefix_plus.serving.adapted_model import AdaptedModel
from peft_prefix_plus.serving.batcher import Batcher, StoppedError
from peft_prefix_plus.serving.decoding import CHANGING_LOGITS
from peft_prefix_plus.serving.transformers_app import AppSettings, StoppingServer, make_app
from peft_prefix_plus.serving.transformers_server import load_adapters


MAX_BATCH_SIZE = 4
MAX_MODEL_LEN = 160
FORMS: dict[str, dict[str, Any]] = {
    "joint": {"num_virtual_tokens": 3},
    "decoupled": {"num_virtual_tokens": 7, "decoupled": True, "position_free": True},
    "gated": {"num_virtual_tokens": 5, "gating": True, "position_free": True},
    "position-free": {"num_virtual_tokens": 4, "position_free": True},
    "some layers, v1.0": {"num_virtual_tokens": 6, "layers_to_transform": [1]},
    "mlp": {"num_virtual_tokens": 5, "reparameterization": "mlp", "sharing": "input", "encoder_dim": 8},
    "head": {"num_virtual_tokens": 2, "decoupled": True, "modules_to_save": ["lm_head"]},
}


class Running:
    """A server that runs in this process: its parts, and a client."""

    def __init__(self, base_model: Any, tokenizer: Any, adapters: dict[str, Path], **settings: Any) -> None:
        self.model = load_adapters(base_model, "base", {name: str(path) for name, path in adapters.items()})
        self.batcher = Batcher(self.model, MAX_BATCH_SIZE, settings.get("max_model_len"))
        app = make_app(
            self.model,
            self.batcher,
            tokenizer,
            lambda text: list(tokenizer(text)["input_ids"]),
            AppSettings(**settings),
        )
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=60)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10)
        self.server = StoppingServer(config, self.batcher)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self) -> Self:
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()

    def complete(self, model: str, prompt: Any, num_tokens: int = 12, **more: Any) -> Any:
        options = {"temperature": 0.0, "max_tokens": num_tokens, **more}
        extra = {"ignore_eos": True, "return_token_ids": True}
        return self.client.completions.create(model=model, prompt=prompt, extra_body=extra, **options)

    def post(self, route: str, /, **body: Any) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        request = urllib.request.Request(self.url + route, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="module")
def paths(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of every form, by name."""
    folder = tmp_path_factory.mktemp("forms")
    found = {name: folder / str(number) for number, name in enumerate(FORMS)}
    for seed, (name, fields) in enumerate(FORMS.items()):
        save_adapter(model_path, found[name], seed, **fields)
    return found


@pytest.fixture(scope="module")
def alone(model_path: Path, paths: dict[str, Path]) -> Reference:
    """What PEFT generates, one prompt at a time."""
    return Reference(model_path, {name.replace(".", "_"): path for name, path in paths.items()})


@pytest.fixture(scope="module")
def server(model_path: Path, tokenizer: Any, paths: dict[str, Path]) -> Iterator[Running]:
    base_model = AutoModelForCausalLM.from_pretrained(model_path)
    settings = {"max_model_len": MAX_MODEL_LEN, "may_load": True, "api_key": "secret"}
    with Running(base_model, tokenizer, paths, **settings) as running:
        yield running


def questions(number: int, seed: int) -> list[tuple[str, list[int], int]]:
    """Models in turn, and for each a prompt and a number of tokens."""
    draw = random.Random(seed)
    names = ["base", *FORMS]
    return [
        (
            names[index % len(names)],
            [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 40))],
            3 + 7 * index % 18,
        )
        for index in range(number)
    ]


def expected_tokens(alone: Reference, name: str, prompt: list[int], num_tokens: int = 12) -> list[int]:
    return alone.generate(None if name == "base" else name.replace(".", "_"), prompt, num_tokens)


def test_the_models_are_the_base_model_and_the_adapters(server: Running) -> None:
    models = {model.id: model.parent for model in server.client.models.list()}
    assert models == {"base": None, **dict.fromkeys(FORMS, "base")}
    assert server.client.models.retrieve("some layers, v1.0").id == "some layers, v1.0"
    with pytest.raises(openai.NotFoundError, match="`none` does not exist"):
        server.client.models.retrieve("none")


def test_a_mixed_load_gets_the_tokens_that_each_adapter_gives_alone(server: Running, alone: Reference) -> None:
    asked = questions(24, seed=1)
    expected = [expected_tokens(alone, *question) for question in asked]
    assert len({tuple(tokens[:3]) for tokens in expected}) > 12  # they differ
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda question: server.complete(*question), asked))
    assert [answer.choices[0].token_ids for answer in found] == expected
    assert [answer.model for answer in found] == [name for name, _, _ in asked]
    assert {answer.choices[0].finish_reason for answer in found} == {"length"}
    for answer, (_, prompt, num_tokens) in zip(found, asked, strict=True):
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), num_tokens)
        assert usage.total_tokens == len(prompt) + num_tokens


def test_a_request_joins_a_batch_that_runs_and_changes_none_of_its_tokens(
    server: Running, alone: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, long = list(range(9)), 120
    batches: list[int] = []
    generate = server.model.generate

    def watched(adapters: Any, **kwargs: Any) -> Any:
        batches.append(len(adapters))
        return generate(adapters, **kwargs)

    monkeypatch.setattr(server.model, "generate", watched)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.complete, "gated", prompt, long)
        wait_until(lambda: batches)
        short = server.complete("decoupled", prompt, 2)
        assert not first.done()  # so it has not waited for the other's end
        assert first.result().choices[0].token_ids == expected_tokens(alone, "gated", prompt, long)
    assert short.choices[0].token_ids == expected_tokens(alone, "decoupled", prompt, 2)
    assert batches == [1, 2, 1]


def test_several_prompts_texts_and_streams(server: Running, alone: Reference, tokenizer: Any) -> None:
    texts = ["The first text", "and another one", "x"]
    expected = [expected_tokens(alone, "joint", tokenizer(text)["input_ids"]) for text in texts]
    answer = server.complete("joint", texts)
    assert [choice.token_ids for choice in answer.choices] == expected
    assert [choice.text for choice in answer.choices] == tokenizer.batch_decode(expected, skip_special_tokens=True)
    chunks = list(server.complete("joint", texts, stream=True, stream_options={"include_usage": True}))
    for index, choice in enumerate(answer.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(each.text for each in own) == choice.text
        assert [token for each in own for token in each.token_ids] == choice.token_ids
        assert [each.finish_reason for each in own if each.finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage
    assert {(chunk.model, chunk.object) for chunk in chunks} == {("joint", "text_completion")}


def test_chats_with_and_without_streams(server: Running, alone: Reference, tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "Say this"}, {"type": "text", "text": "once."}]
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    joined = [messages[0], {"role": "user", "content": "Say this\nonce."}]
    prompt = tokenizer.apply_chat_template(joined, add_generation_prompt=True, return_dict=True)["input_ids"]
    for name in ("position-free", "base"):
        options: dict[str, Any] = {"model": name, "messages": messages, "max_completion_tokens": 12, "temperature": 0}
        extra = {"ignore_eos": True, "return_token_ids": True}
        answer = server.client.chat.completions.create(**options, extra_body=extra)
        assert answer.choices[0].token_ids == expected_tokens(alone, name, prompt)
        chunks = list(server.client.chat.completions.create(**options, stream=True, extra_body={"ignore_eos": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason == "length"
    whole = server.client.chat.completions.create(model="mlp", messages=messages, extra_body={"ignore_eos": True})
    assert whole.usage.total_tokens == MAX_MODEL_LEN  # nothing else was asked for


def test_an_adapter_with_a_chat_template_of_its_own_is_asked_by_it(
    server: Running, alone: Reference, tokenizer: Any, paths: dict[str, Path], model_path: Path, tmp_path: Path
) -> None:
    save_adapter(model_path, tmp_path, 0, **FORMS["joint"])
    (tmp_path / "chat_template.jinja").write_text("Q {{ messages[0].content }} A")
    assert server.post("/v1/load_prefix_adapter", name="own", path=str(tmp_path))[0] == 200
    answer = server.client.chat.completions.create(
        model="own",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=12,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert answer.choices[0].token_ids == expected_tokens(alone, "joint", tokenizer("Q hello A")["input_ids"])
    assert server.post("/v1/unload_prefix_adapter", name="own")[0] == 200


def test_a_text_ends_at_a_stop_string_or_where_the_model_ends_it(
    server: Running, alone: Reference, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(64, 90))
    tokens = expected_tokens(alone, "decoupled", prompt, 30)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    stop = text[8:10]
    for more in ({"stop": stop}, {"stop": ["never there", stop]}):
        answer = server.complete("decoupled", prompt, 30, **more)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
        pieces = server.complete("decoupled", prompt, 30, stream=True, **more)
        assert "".join(chunk.choices[0].text for chunk in pieces) == answer.choices[0].text
    monkeypatch.setattr(server.model.base_model.generation_config, "eos_token_id", [VOCABULARY, tokens[4]])
    end = tokens.index(tokens[4])
    ended = server.client.completions.create(model="decoupled", prompt=prompt, max_tokens=30, temperature=0)
    assert ended.choices[0].text == tokenizer.decode(tokens[:end], skip_special_tokens=True)
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", end + 1)
    assert server.complete("decoupled", prompt, 30).choices[0].token_ids == tokens  # ignore_eos


def test_draws_are_those_of_the_seed_whatever_else_is_in_the_batch(server: Running, alone: Reference) -> None:
    prompt = [5, 6, 7]
    drawn = {"temperature": 0.8, "top_p": 0.9}

    def ask(seed: int | None) -> list[int]:
        return server.complete("gated", prompt, 20, seed=seed, **drawn).choices[0].token_ids

    seven = ask(7)
    with ThreadPoolExecutor(6) as pool:
        greedy = pool.submit(server.complete, "gated", prompt, 20)
        found = list(pool.map(ask, [7, 8, 7, None, None]))
        assert greedy.result().choices[0].token_ids == expected_tokens(alone, "gated", prompt, 20)
    assert found[0] == found[2] == seven
    assert len({tuple(tokens) for tokens in found}) == 4
    extra = {"top_k": 1, "ignore_eos": True, "return_token_ids": True}
    one = server.client.completions.create(
        model="gated", prompt=prompt, max_tokens=20, temperature=5, extra_body=extra
    )
    assert one.choices[0].token_ids == expected_tokens(alone, "gated", prompt, 20)


def test_a_penalty_on_repetitions_is_the_requests_or_the_models_and_does_not_count_padding(
    model_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_model = AutoModelForCausalLM.from_pretrained(model_path)
    prompt = [7, 8, 9]
    scores = torch.zeros(1, VOCABULARY)
    scores[0, 0] = 5.0  # the token that batches are padded with: no prompt here has it
    monkeypatch.setattr(base_model.lm_head, "forward", lambda states: scores.expand(*states.shape[:-1], -1) + 4.0)
    base_model.generation_config.repetition_penalty = 3.0  # 9 / 3 is less than the 4 of the others
    with Running(base_model, tokenizer, {}) as running:
        choices = running.complete("base", [prompt, [5] * 30], 2).choices
        for choice in choices:
            assert choice.token_ids[0] == 0 and choice.token_ids[1] != 0
        extra = {"repetition_penalty": 1, "ignore_eos": True, "return_token_ids": True}
        answer = running.client.completions.create(
            model="base", prompt=prompt, max_tokens=3, temperature=0, extra_body=extra
        )
        assert answer.choices[0].token_ids == [0, 0, 0]
        extra |= {"repetition_penalty": 1, "min_p": 0.9}  # the others are e⁻⁵ times as likely
        answer = running.client.completions.create(
            model="base", prompt=prompt, max_tokens=20, temperature=1, extra_body=extra
        )
        assert answer.choices[0].token_ids == [0] * 20


SETTINGS: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 1},
    {"repetition_penalty": 3.0},
    {"encoder_repetition_penalty": 3.0},
    {"sequence_bias": [[[0, 7, 4], 10.0]]},
    {"bad_words_ids": [[0, 7, 1]]},
    {"min_new_tokens": 3, "eos_token_id": 1},
    {"min_length": 5, "eos_token_id": 1},
    {"exponential_decay_length_penalty": (2, 0.1), "eos_token_id": 2},
    {"forced_eos_token_id": 3, "eos_token_id": 3},
    {"suppress_tokens": [1], "begin_suppress_tokens": [0]},
    {"watermarking_config": WatermarkingConfig(context_width=2, bias=20.0)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_the_models_settings_see_of_each_row_only_its_own_tokens(
    model_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    base_model = AutoModelForCausalLM.from_pretrained(model_path)
    scores = -1.0 - torch.arange(VOCABULARY)  # token 1 is the likeliest, then the padding, 2, 3, …
    scores[0] = -2.5
    monkeypatch.setattr(base_model.lm_head, "forward", lambda states: scores.expand(*states.shape[:-1], -1))
    for name, value in settings.items():
        setattr(base_model.generation_config, name, value)
    prompts = [[7], [7, 8, 9], [5] * 30]
    expected = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt])
        mask = torch.ones_like(input_ids)
        output = base_model.generate(input_ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        expected.append(output[0, len(prompt) :].tolist())
    with Running(base_model, tokenizer, {}) as running:
        answer = running.client.completions.create(
            model="base", prompt=prompts, max_tokens=6, temperature=0, extra_body={"return_token_ids": True}
        )
    assert [choice.token_ids for choice in answer.choices] == expected


def test_all_that_changes_logits_in_transformers_is_a_rows_own() -> None:
    read = re.findall(r"generation_config\.(\w+)", inspect.getsource(GenerationMixin._get_logits_processor))
    others = {"_eos_token_tensor", "do_sample", "max_length", "num_beams", "use_cache"}
    assert set(read) - others == set(CHANGING_LOGITS)


def test_first_tokens_are_drawn_with_their_probabilities(server: Running, alone: Reference) -> None:
    prompt, temperature = [1, 2, 3], 0.5
    alone.model.set_adapter("joint")
    with torch.no_grad():
        logits = alone.model(torch.tensor([prompt])).logits[0, -1].double()
    probabilities = torch.softmax(logits / temperature, dim=0)
    answer = server.complete("joint", [prompt] * 400, 1, temperature=temperature)
    likeliest = int(probabilities.argmax())
    share = sum(choice.token_ids == [likeliest] for choice in answer.choices) / 400
    p = float(probabilities[likeliest])
    assert abs(share - p) < 5 * (p * (1 - p) / 400) ** 0.5  # five standard deviations


def test_adapters_come_and_go_while_it_runs(server: Running, model_path: Path, tmp_path: Path) -> None:
    found, prompt = {}, list(range(30))
    for seed in (51, 52):
        save_adapter(model_path, tmp_path / str(seed), seed, num_virtual_tokens=8, gating=True)
        found[seed] = Reference(model_path, {"late": tmp_path / str(seed)}).generate("late", prompt, 80)
    load = {"name": "late", "path": str(tmp_path / "51")}
    assert server.post("/v1/load_prefix_adapter", **load) == (200, {"name": "late"})
    stream = server.complete("late", prompt, 80, stream=True)
    tokens = next(stream).choices[0].token_ids
    assert server.post("/v1/load_prefix_adapter", name="late", path=str(tmp_path / "52"))[0] == 200
    assert server.complete("late", prompt, 80).choices[0].token_ids == found[52]
    for chunk in stream:  # keeps the adapter that it began with
        tokens += chunk.choices[0].token_ids
    assert tokens == found[51]
    assert server.post("/v1/unload_prefix_adapter", name="late") == (200, {"name": "late"})
    with pytest.raises(openai.NotFoundError, match="`late` does not exist"):
        server.complete("late", prompt)
    assert server.post("/v1/unload_prefix_adapter", name="late")[0] == 404
    server.complete("base", prompt, 1)
    assert len(server.model._model.peft_config) == len(FORMS)  # neither is kept


def test_the_last_adapter_goes_and_the_first_comes(
    model_path: Path, tokenizer: Any, paths: dict[str, Path], alone: Reference, tmp_path: Path
) -> None:
    base_model = AutoModelForCausalLM.from_pretrained(model_path)
    names = set(base_model.state_dict())
    broken = tmp_path / "broken"
    save_adapter(model_path, broken, 1, num_virtual_tokens=4)
    (broken / "adapter_model.safetensors").write_bytes(b"not a file of tensors")
    with Running(base_model, tokenizer, {}, may_load=True) as running:
        for name in ("joint", "gated"):
            assert running.post("/v1/load_prefix_adapter", name="it", path=str(broken))[0] == 400
            assert running.complete("base", [1, 2]).choices[0].token_ids == expected_tokens(alone, "base", [1, 2])
            running.post("/v1/load_prefix_adapter", name="it", path=str(paths[name]))
            assert running.complete("it", [1, 2]).choices[0].token_ids == expected_tokens(alone, name, [1, 2])
            running.post("/v1/unload_prefix_adapter", name="it")
    assert set(running.model.base_model.state_dict()) == names


def test_a_broken_adapter_is_refused_and_the_server_goes_on(
    server: Running, alone: Reference, model_path: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    names = set(server.model._model.state_dict())
    cut, other = tmp_path / "cut", tmp_path / "other"
    save_adapter(model_path, cut, 1, num_virtual_tokens=4)
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    base = AutoModelForCausalLM.from_pretrained(model_path)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(other)
    wrong = tmp_path / "wrong"
    save_adapter(model_path, wrong, 1, num_virtual_tokens=4)
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps({**config, "num_virtual_tokens": 5}))
    for path, words in {
        cut: "cut",
        tmp_path / "none": "not a directory",
        other: "LORA",
        wrong: "5",
        model_path: "adapter_config.json",
    }.items():
        status, answer = server.post("/v1/load_prefix_adapter", name="bad", path=str(path))
        assert status == 400 and words in answer["error"]["message"], answer
    for name in ("base", ""):
        assert server.post("/v1/load_prefix_adapter", name=name, path=str(paths["joint"]))[0] == 400
    assert server.post("/v1/load_prefix_adapter", name="bad")[0] == 400
    assert set(server.model._model.state_dict()) == names
    assert server.complete("mlp", [3, 4]).choices[0].token_ids == expected_tokens(alone, "mlp", [3, 4])


def test_an_adapter_that_is_broken_at_the_start_is_named(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'menu' cannot be served.*not a directory"):
        load_adapters(AutoModelForCausalLM.from_pretrained(model_path), "base", {"menu": str(tmp_path / "none")})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [1] * 150}, r"160 tokens. The prompt has 150 tokens and the answer may have 13"),
    ({"prompt": []}, "no tokens|empty"),
    ({"prompt": ""}, "no tokens"),
    ({"prompt": [1, VOCABULARY]}, "0 to 299"),
    ({"prompt": [-1]}, "0 to 299"),
    ({"n": 2}, "`n` = 2 is not supported"),
    ({"logprobs": 0}, "`logprobs` = 0 is not supported"),
    ({"presence_penalty": 0.5}, "`presence_penalty` = 0.5"),
    ({"logit_bias": {"5": 1}}, "`logit_bias`"),
    ({"extra_body": {"no_such_field": 1}}, "`no_such_field`"),
    ({"max_tokens": 0}, "`max_tokens`"),
    ({"temperature": -1}, "`temperature`"),
    ({"top_p": 0}, "`top_p`"),
    ({"extra_body": {"top_k": "many"}}, "`top_k`"),
    ({"extra_body": {"min_p": 1.5}}, "`min_p`"),
    ({"extra_body": {"repetition_penalty": 0}}, "`repetition_penalty`"),
    ({"stop": ["x", ""]}, "`stop`"),
    ({"stream_options": {"include_usage": True}}, "`stream_options`"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_what_it_cannot_do_is_refused_by_name(server: Running, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        server.client.completions.create(**{"model": "joint", "prompt": "x", "max_tokens": 13, **fields})
    assert refused.value.type == "BadRequestError"


def test_what_asks_for_nothing_is_taken(server: Running) -> None:
    neutral: dict[str, Any] = {"n": 1, "presence_penalty": 0.0, "logprobs": None, "user": "me", "echo": False}
    assert len(server.client.completions.create(model="joint", prompt="x", **neutral).choices) == 1
    assert server.client.completions.create(model="joint", prompt="x", best_of=1).usage.completion_tokens <= 16


def test_conversations_that_a_template_does_not_take_are_refused(
    server: Running, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    ask = server.client.chat.completions.create
    for messages in ([], [{"role": "user", "content": [image]}], [{"content": "x"}]):
        with pytest.raises(openai.BadRequestError, match="messages"):
            ask(model="joint", messages=messages)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no users here') }}")
    with pytest.raises(openai.BadRequestError, match="no users here"):
        ask(model="joint", messages=[{"role": "user", "content": "x"}])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        ask(model="joint", messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", ["truncation", "max_length", "return_tensors", "chat_template", "tokenize", "tools"])
def test_arguments_of_the_tokenizer_are_no_variables_of_a_template(server: Running, name: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "model": "joint", "max_tokens": 2}
    status, answer = server.post("/v1/chat/completions", **body, chat_template_kwargs={name: "pt"})
    assert status == 400 and f"`{name}` is no variable" in answer["error"]["message"], answer
    assert server.post("/v1/chat/completions", **body, chat_template_kwargs={"thinks": True})[0] == 200


HALF = "\ud800"
NO_TEXT: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": HALF}),
    ("/v1/completions", {"prompt": ["x", HALF]}),
    ("/v1/completions", {"prompt": "x", "model": HALF}),
    ("/v1/completions", {"prompt": "x", "stop": [HALF]}),
    ("/v1/completions", {"prompt": "x", HALF: 1}),
    ("/v1/completions", {"prompt": "x", "no_such_field": HALF}),
    ("/v1/chat/completions", {"messages": [{"role": HALF, "content": "x"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "x", "content": "x", "name": HALF}]}),
    ("/v1/chat/completions", {"messages": [{"role": "x", "content": "x"}], "chat_template_kwargs": {"a": HALF}}),
    ("/v1/load_prefix_adapter", {"name": HALF, "path": "x"}),
]


@pytest.mark.parametrize(("route", "fields"), NO_TEXT)
def test_half_of_a_surrogate_pair_is_refused(server: Running, route: str, fields: dict[str, Any]) -> None:
    status, answer = server.post(route, **fields)
    assert status == 400 and answer["error"]["type"] == "BadRequestError", answer
    assert server.post("/v1/completions", prompt="😀")[0] == 200


def test_unknown_models_and_paths_are_not_found_and_the_key_is_asked_for(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
        server.complete("other", "x")
    status, answer = server.post("/v1/nothing")
    assert status == 404 and answer["error"]["type"] == "NotFoundError"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        stranger.completions.create(model="joint", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert urllib.request.urlopen(f"{server.url}/health").status == 200


def test_adapters_come_and_go_only_where_that_is_allowed(
    model_path: Path, tokenizer: Any, paths: dict[str, Path]
) -> None:
    with Running(AutoModelForCausalLM.from_pretrained(model_path), tokenizer, {}) as running:
        assert running.post("/v1/load_prefix_adapter", name="it", path=str(paths["joint"]))[0] == 403
        assert running.post("/v1/unload_prefix_adapter", name="it")[0] == 403


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_its_row_and_harms_nobody(server: Running, alone: Reference, streams: bool) -> None:
    body = {"model": "mlp", "prompt": [1, 2, 3], "max_tokens": 150, "ignore_eos": True, "stream": streams}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: {len(content)}\r\n"
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(server.complete, "joint", [9, 9], 60)
        with socket.create_connection(server.socket.getsockname()) as leaving:
            leaving.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
            wait_until(
                lambda: any(
                    row.adapter.source.endswith(str(list(FORMS).index("mlp"))) for row in server.batcher._running
                )
            )
        (row,) = [row for row in server.batcher._running if row.max_tokens == 150]
        wait_until(lambda: row.is_over)
        assert len(row.tokens) < 150
        assert other.result().choices[0].token_ids == expected_tokens(alone, "joint", [9, 9], 60)


def test_a_client_that_leaves_before_the_first_byte_frees_its_row(model_path: Path, tokenizer: Any) -> None:
    model = load_adapters(AutoModelForCausalLM.from_pretrained(model_path), "base", {})
    rows: list[Any] = []

    class KeepsRows(Batcher):
        def submit(self, make_rows: Any) -> Any:
            rows.extend(make_rows())
            return rows

    app = make_app(model, KeepsRows(model, MAX_BATCH_SIZE), tokenizer, tokenizer.encode, AppSettings())
    content = json.dumps({"prompt": [1, 2], "stream": True}).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(_: object) -> None:
        await asyncio.Event().wait()  # nobody takes a byte

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "asgi": {}}
    headers = [(b"content-type", b"application/json")]
    asyncio.run(asyncio.wait_for(app({**scope, "headers": headers}, receive, send), 30))
    assert len(rows) == 1 and rows[0].is_over


def test_removing_adapters_does_not_keep_requests_waiting(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_adapters(AutoModelForCausalLM.from_pretrained(model_path), "base", {})
    batcher, is_removing, may_go_on = Batcher(model, MAX_BATCH_SIZE), threading.Event(), threading.Event()

    def drop(_: object) -> None:
        is_removing.set()
        may_go_on.wait(60)

    monkeypatch.setattr(model, "drop_unnamed", drop)
    batcher.start()
    try:
        batcher.change(lambda _: None)
        assert is_removing.wait(60)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(batcher.submit, list).result(timeout=10) == []
            may_go_on.set()
    finally:
        may_go_on.set()
        batcher.stop()


def test_a_request_that_makes_the_model_fail_fails_alone(
    server: Running, alone: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = server.model.generate

    def failing(adapters: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if (input_ids == 77).any():
            raise RuntimeError("out of memory")
        return generate(adapters, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(server.model, "generate", failing)
    prompts = [[1, 2], [77, 78], [3, 4]]
    expected = [expected_tokens(alone, "gated", prompt) for prompt in (prompts[0], prompts[2])]
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(server.complete, "gated", prompt) for prompt in prompts]
        assert [found[index].result().choices[0].token_ids for index in (0, 2)] == expected
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            found[1].result()
    with pytest.raises(openai.APIError, match="out of memory"):
        list(server.complete("gated", [77], stream=True))


def test_a_row_that_is_over_does_not_go_beyond_the_models_positions(tokenizer: Any) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    base_model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    asked = [([5] * 60, 4), ([6, 7], 62)]
    expected = [
        base_model.generate(torch.tensor([prompt]), max_new_tokens=number, do_sample=False, pad_token_id=0)[
            0, len(prompt) :
        ]
        for prompt, number in asked
    ]
    with Running(base_model, tokenizer, {}, max_model_len=64) as running, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda question: running.complete("base", *question), asked))
    assert [answer.choices[0].token_ids for answer in found] == [tokens.tolist() for tokens in expected]


def test_requests_that_run_are_told_when_the_server_stops(model_path: Path, tokenizer: Any) -> None:
    with Running(AutoModelForCausalLM.from_pretrained(model_path), tokenizer, {}) as running:
        stream = running.complete("base", [1], 100_000, stream=True)
        next(stream)
    with pytest.raises(openai.APIError, match="The server is stopping"):
        list(stream)
    assert not running.batcher.is_alive
    with pytest.raises(StoppedError, match="stopping"):
        running.batcher.change(lambda model: model.unload("joint"))


def test_the_command_serves_adapters_from_a_directory_and_the_hub_until_it_is_stopped(
    model_path: Path, paths: dict[str, Path], alone: Reference, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "peft_prefix_plus.cli", "serve", "--engine", "transformers", "--port", str(port)]
    command += ["--model", str(model_path), "--max-model-len", "40", "--api-key", "secret"]
    command += ["--adapter", f"menu={paths['gated']}", "--adapter", "remote=user/remote"]
    with running_hub({"token-of-user": "user"}) as hub:
        push(paths["mlp"], hub, "user/remote")
        environment = {**os.environ, **hub.environment(tmp_path)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            try:
                client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
                wait_until(lambda: process.poll() is not None or can_connect(port), 120)
                assert {model.id for model in client.models.list()} == {"menu", "remote", str(model_path)}
                prompt = list(tokens_of("hello", model_path))
                for name, form in (("menu", "gated"), ("remote", "mlp")):
                    extra = {"ignore_eos": True, "return_token_ids": True}
                    answer = client.completions.create(
                        model=name, prompt="hello", max_tokens=12, temperature=0, extra_body=extra
                    )
                    assert answer.choices[0].token_ids == expected_tokens(alone, form, prompt)
                with pytest.raises(openai.BadRequestError, match="40 tokens"):
                    client.completions.create(model="menu", prompt="hello", max_tokens=36)
            finally:
                process.send_signal(signal.SIGINT)
                _, printed = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in printed, printed


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_model_is_loaded_so_and_not_moved(
    model_path: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    from peft_prefix_plus.cli import loading, serving
    from peft_prefix_plus.serving import transformers_server

    asked: dict[str, Any] = {}
    served: list[AdaptedModel] = []
    load_plain = AutoModelForCausalLM.from_pretrained

    def load(name: str, **options: Any) -> Any:
        asked.update(options)
        model = load_plain(name)
        monkeypatch.setattr(model, "to", lambda *_: pytest.fail("transformers refuses to move some quantized models"))
        return model

    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers_server, "serve", lambda model, *_, **__: served.append(model))
    settings = serving.ServingSettings(
        model=str(model_path), engine="transformers", adapter=[f"menu={paths['decoupled']}"]
    )
    options: Any = {f"load_in_{bits}bit": True}
    serving.serve(settings, serving.TransformersSettings(**options))
    quantization = asked["quantization_config"]
    assert (quantization.load_in_4bit, quantization.load_in_8bit) == (bits == 4, bits == 8)
    assert set(served[0].adapters) == {"menu"}


def tokens_of(text: str, model_path: Path) -> list[int]:
    return list(AutoTokenizer.from_pretrained(model_path)(text)["input_ids"])


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_options_of_one_engine_are_refused_for_the_other(model_path: Path) -> None:
    from peft_prefix_plus.cli.errors import CommandError
    from peft_prefix_plus.cli.serving import ServingSettings, TransformersSettings, serve

    with pytest.raises(CommandError, match="--max-batch-size is an option of --engine transformers"):
        serve(ServingSettings(model="m"), TransformersSettings(max_batch_size=2))
    with pytest.raises(ValueError, match="no arguments after --, got '--dtype'"):
        ServingSettings(model="m", engine="transformers", arguments=["--dtype"])
    for key in ("", "clé", "a key", "key\n"):
        with pytest.raises(ValueError, match="`api_key` must be printable ASCII"):
            TransformersSettings(api_key=key)
    assert TransformersSettings(api_key="sk-0_A~!").api_key == "sk-0_A~!"
    with pytest.raises(ValueError, match="contradict each other"):
        TransformersSettings(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(CommandError, match="'menu' cannot be served"):
        adapter = [f"menu={model_path}"]
        serve(ServingSettings(model=str(model_path), engine="transformers", adapter=adapter), TransformersSettings())
