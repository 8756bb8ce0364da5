"""
Adapters as models of vLLM's OpenAI-compatible server.

vLLM loads this plugin through its entry-point group `vllm.endpoint_plugins` if the environment variable `VLLM_PLUGINS` names
`prefix_plus`. A request whose `model` is an adapter is changed into a request to the base model with the adapter's prefix, and the name in
the answer is changed back. The server checks API keys before that.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ModelCard
from vllm.logger import init_logger

from .adapter_files import check_name
from .connector import PARAMETER
from .openai_protocol import (
    LoadRequest,
    RefusedError,
    UnloadRequest,
    loading_forbidden,
    unknown_adapter,
    unservable_adapter,
)
from .store import Entry, PrefixStore


if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.engine.protocol import EngineClient


logger = init_logger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

GENERATING = ("/v1/completions", "/v1/chat/completions")
"""The paths whose answers an adapter can give."""

TOKENIZING = ("/tokenize", "/detokenize")
"""The paths on which an adapter's name means the base model."""


class Adapters:
    """
    The adapters of a running server.

    Args:
        engine_client (`EngineClient`): vLLM's engine.
        state (`Any`): The server's state.

    Raises:
        ValueError: If the engine was started without [`PrefixConnector`].
    """

    def __init__(self, engine_client: EngineClient, state: Any) -> None:
        config = engine_client.vllm_config
        extra: dict[str, Any] = {}
        if config.kv_transfer_config is not None:
            extra = config.kv_transfer_config.kv_connector_extra_config
        if "store" not in extra:
            raise ValueError(
                "vLLM's plugin prefix_plus needs PrefixConnector in --kv-transfer-config. Start the server with prefix-plus serve."
            )
        self.store = PrefixStore(extra["store"])
        self.may_load = bool(extra.get("may_load", False))
        self.max_model_len: int = config.model_config.max_model_len
        self._model_config = config.model_config
        self._state = state
        self._served_model: Any = None
        self._changing = asyncio.Lock()

    @property
    def base_name(self) -> str:
        """The name of the base model in the server."""
        return str(self._state.openai_serving_models.base_model_paths[0].name)

    async def load(self, name: str, path: str) -> Entry:
        """
        Add an adapter to the server. An adapter that had the name loses it.

        Args:
            name (`str`): The name.
            path (`str`): The adapter's directory or repository on the Hub.

        Returns:
            `Entry`: The adapter.

        Raises:
            ValueError: If it cannot be served. Nothing has changed then.
        """
        check_name(name, is_base_name=self._state.openai_serving_models.is_base_model(name))
        async with self._changing:
            key_values = await asyncio.to_thread(self._fold, path)
            return self.store.add(name, key_values, path)

    def _fold(self, path: str) -> Any:
        from .folding import fold, served_model  # imports transformers' models, so only when an adapter is loaded

        if self._served_model is None:
            config = self._model_config
            self._served_model = served_model(
                config.model, self.max_model_len, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        return fold(path, self._served_model)


class EndpointPlugin:
    """vLLM's endpoint plugin `prefix_plus`."""

    name = "prefix_plus"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the middleware."""
        app.add_middleware(NamesToPrefixes)
        app.get("/v1/models")(show_models)
        app.post("/v1/load_prefix_adapter")(load_prefix_adapter)
        app.post("/v1/unload_prefix_adapter")(unload_prefix_adapter)

    async def init_state(self, engine_client: EngineClient, state: Any, args: Namespace) -> None:
        """Attach the [`Adapters`] to the server's state."""
        state.prefix_plus = Adapters(engine_client, state)


async def show_models(request: Request) -> JSONResponse:
    """Handle GET /v1/models: the base model, its LoRA adapters and the prefixes."""
    state = request.app.state
    adapters: Adapters = state.prefix_plus
    shown = await state.openai_serving_models.show_available_models()
    for name, entry in adapters.store.entries().items():
        shown.data.append(
            ModelCard(
                id=name,
                root=entry.source,
                parent=adapters.base_name,
                max_model_len=adapters.max_model_len - entry.num_cached_tokens,
            )
        )
    return JSONResponse(shown.model_dump())


async def load_prefix_adapter(body: LoadRequest, request: Request) -> JSONResponse:
    """Handle POST /v1/load_prefix_adapter."""
    adapters: Adapters = request.app.state.prefix_plus
    if not adapters.may_load:
        return _refusal(loading_forbidden())
    try:
        entry = await adapters.load(body.name, body.path)
    except Exception as error:  # noqa: BLE001
        # whatever a broken file raises, the server goes on
        logger.warning("The adapter %r is refused: %s", body.path, error)
        return _refusal(unservable_adapter(error))
    return JSONResponse({"name": body.name, "form": entry.form, "num_cached_tokens": entry.num_cached_tokens})


async def unload_prefix_adapter(body: UnloadRequest, request: Request) -> JSONResponse:
    """Handle POST /v1/unload_prefix_adapter."""
    adapters: Adapters = request.app.state.prefix_plus
    if not adapters.may_load:
        return _refusal(loading_forbidden())
    try:
        adapters.store.remove(body.name)
    except KeyError:
        return _refusal(unknown_adapter(body.name))
    return JSONResponse({"name": body.name})


def _refusal(error: RefusedError) -> JSONResponse:
    return JSONResponse(error.content, status_code=error.status)


class NamesToPrefixes:
    """
    An ASGI middleware that turns the name of an adapter into the base model's name and a prefix.

    Args:
        app: The application to call.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in GENERATING + TOKENIZING:
            await self.app(scope, receive, send)
            return
        content = await _body(receive)
        adapters: Adapters = scope["app"].state.prefix_plus
        body = _parsed(content)
        name = body.get("model")
        entry = adapters.store.entries().get(name) if isinstance(name, str) else None
        if entry is None:  # another model, or not JSON: vLLM answers
            await self.app(scope, _replaying(content, receive), send)
            return
        assert isinstance(name, str)
        body["model"] = adapters.base_name
        if path in GENERATING:
            try:
                _add_prefix(body, entry)
                await self._check_length(scope, path, body, len(content), entry, adapters.max_model_len)
            except RefusedError as error:
                await _refusal(error)(scope, receive, send)
                return
            send = _naming(send, adapters.base_name, name)
        await self.app(*_with_body(scope, json.dumps(body).encode(), receive), send)

    async def _check_length(
        self, scope: Message, path: str, body: dict[str, Any], size: int, entry: Entry, max_model_len: int
    ) -> None:
        """
        Raise if a prompt leaves no room for the prefix. A request that is short in bytes is short in tokens, so it is not tokenized.

        Raises:
            RefusedError: If it leaves none.
        """
        if size + TEMPLATE_BYTES + entry.num_cached_tokens < max_model_len:
            return
        for num_tokens in await self._prompt_lengths(scope, path, body):
            if num_tokens + entry.num_cached_tokens >= max_model_len:
                raise RefusedError(
                    f"This model's maximum context length is {max_model_len} tokens. The prompt has {num_tokens} and the adapter "
                    f"{entry.num_cached_tokens} virtual tokens, which leaves no room for an answer. Shorten the prompt."
                )

    async def _prompt_lengths(self, scope: Message, path: str, body: dict[str, Any]) -> list[int]:
        """Return the number of tokens of each prompt of a request, from the server's own `/tokenize`."""
        if path == "/v1/chat/completions":
            prompts: list[Any] = [body]
        else:
            prompt = body.get("prompt")
            is_list = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
            prompts = prompt if is_list else [prompt]  # type: ignore[assignment]
        lengths = []
        for prompt in prompts:
            if isinstance(prompt, list):
                lengths.append(len(prompt))
                continue
            question = prompt if isinstance(prompt, dict) else {"prompt": prompt}
            fields = {name: question[name] for name in TOKENIZED if name in question}
            if "add_special_tokens" in body:
                fields["add_special_tokens"] = body["add_special_tokens"]
            inner = {**scope, "path": "/tokenize", "raw_path": b"/tokenize", "root_path": ""}
            answer = _parsed(await _answer(self.app, inner, json.dumps(fields).encode()))
            lengths.append(int(answer.get("count", 0)))  # without a count vLLM refuses the request itself
        return lengths


TEMPLATE_BYTES = 4096
"""
How many bytes a chat template may add to a request. With a longer one, some prompts that are too long get vLLM's message instead.
"""

TOKENIZED = (
    "prompt",
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "tools",
)
"""The fields of a request that determine its prompt."""


def _add_prefix(body: dict[str, Any], entry: Entry) -> None:
    """
    Add a prefix to a request.

    Raises:
        RefusedError: If the request asks for something that cannot be had with a prefix in the cache.
    """
    parameters = body.get("kv_transfer_params")
    body["kv_transfer_params"] = {**(parameters if isinstance(parameters, dict) else {}), PARAMETER: entry.digest}
    if not entry.num_cached_tokens:
        return  # the whole prompt is computed
    asks_for_prompt = body.get("prompt_logprobs") is not None or (
        body.get("echo") and body.get("logprobs") is not None
    )
    if asks_for_prompt:
        raise RefusedError(
            "This adapter gives no log-probabilities of the prompt. Leave out `prompt_logprobs`, and do not combine `echo` and "
            "`logprobs`."
        )
    if body.get("prompt_embeds") is not None:
        raise RefusedError("This adapter needs a prompt of text or tokens. Leave out `prompt_embeds`.")


def _naming(send: Send, base: str, name: str) -> Send:
    """
    Replace the base model's name in an answer with the adapter's.

    The answer is JSON without spaces, and quotes inside of strings are escaped, so these bytes occur only as the field `model`.
    """
    before, after = (f'"model":{json.dumps(each)}'.encode() for each in (base, name))
    start: Message = {}

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)  # its content-length depends on the body
            return
        if message["type"] == "http.response.body":
            body = message.get("body", b"").replace(before, after)
            if start:
                if not message.get("more_body", False):
                    headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
                    start["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
                await send(dict(start))
                start.clear()
            message = {**message, "body": body}
        await send(message)

    return named


# -------------------------------------------------------------------------------------------------------------- ASGI


async def _body(receive: Receive) -> bytes:
    content, more = b"", True
    while more:
        message = await receive()
        content += message.get("body", b"")
        more = message.get("more_body", False)
    return content


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _replaying(content: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that has been read once more, and then continues with the original."""
    waiting = [content]

    async def replay() -> Message:
        return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

    return replay


def _with_body(scope: Message, content: bytes, receive: Receive) -> tuple[Message, Receive]:
    headers = [pair for pair in scope["headers"] if pair[0].lower() != b"content-length"]
    headers.append((b"content-length", str(len(content)).encode()))
    return {**scope, "headers": headers}, _replaying(content, receive)


async def _answer(app: Any, scope: Message, content: bytes) -> bytes:
    """Send a request to the application, and return the body of its answer."""
    answer = b""

    async def receive() -> Message:
        await asyncio.Event().wait()  # no client can disconnect
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal answer
        answer += message.get("body", b"")

    await app(*_with_body(scope, content, receive), send)
    return answer
