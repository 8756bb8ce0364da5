"""
Adapters as models of vLLM's OpenAI-compatible server.

vLLM loads this through its entry-point group `vllm.endpoint_plugins`, if the environment variable `VLLM_PLUGINS` names `prefix_plus`.
A request whose `model` is an adapter's name becomes one to the base model that names the adapter's prefix, and the answer names the
adapter again. It runs behind the server's own check of API keys.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ModelCard
from vllm.logger import init_logger

from .connector import PARAMETER
from .openai_protocol import LoadRequest, RefusedError, UnloadRequest
from .store import Entry, PrefixStore


if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.engine.protocol import EngineClient


logger = init_logger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

GENERATING = ("/v1/completions", "/v1/chat/completions")
"""Where a request with an adapter's name is answered."""

TOKENIZING = ("/tokenize", "/detokenize")
"""Where the adapter's name stands for the base model."""


class Adapters:
    """
    The adapters of a running server.

    Args:
        engine_client (`EngineClient`): vLLM's engine.
        state (`Any`): The server's state.
    """

    def __init__(self, engine_client: EngineClient, state: Any) -> None:
        config = engine_client.vllm_config
        extra: dict[str, Any] = {}
        if config.kv_transfer_config is not None:
            extra = config.kv_transfer_config.kv_connector_extra_config
        if "store" not in extra:
            raise ValueError(
                "The plugin prefix_plus of vLLM needs PrefixConnector in --kv-transfer-config; see `prefix-plus serve`."
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
        """The name by which the server knows the base model."""
        return str(self._state.openai_serving_models.base_model_paths[0].name)

    async def load(self, name: str, path: str) -> Entry:
        """
        Let a name stand for an adapter.

        Raises:
            ValueError: If it cannot be served. Everything is as before then.
        """
        if not name or self._state.openai_serving_models.is_base_model(name):
            raise ValueError(
                f"An adapter cannot be named {name!r}, as the base model or not at all. Choose another name."
            )
        async with self._changing:
            key_values = await asyncio.to_thread(self._fold, path)
            return self.store.add(name, key_values, path)

    def _fold(self, path: str) -> Any:
        from .folding import fold, served_model  # imports transformers' model: only where adapters are loaded

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
        """Add the routes, and what maps names."""
        app.add_middleware(NamesToPrefixes)
        app.get("/v1/models")(show_models)
        app.post("/v1/load_prefix_adapter")(load_prefix_adapter)
        app.post("/v1/unload_prefix_adapter")(unload_prefix_adapter)

    async def init_state(self, engine_client: EngineClient, state: Any, args: Namespace) -> None:
        """Find the adapters' folder."""
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
        return _not_allowed()
    try:
        entry = await adapters.load(body.name, body.path)
    except Exception as error:  # noqa: BLE001
        # whatever a broken file raises, the server goes on
        logger.warning("The adapter %r is refused: %s", body.path, error)
        return _error(f"The adapter cannot be served. {error}", HTTPStatus.BAD_REQUEST)
    return JSONResponse({"name": body.name, "form": entry.form, "num_cached_tokens": entry.num_cached_tokens})


async def unload_prefix_adapter(body: UnloadRequest, request: Request) -> JSONResponse:
    """Handle POST /v1/unload_prefix_adapter."""
    adapters: Adapters = request.app.state.prefix_plus
    if not adapters.may_load:
        return _not_allowed()
    try:
        adapters.store.remove(body.name)
    except KeyError:
        return _error(f"There is no adapter named {body.name!r}.", HTTPStatus.NOT_FOUND)
    return JSONResponse({"name": body.name})


def _not_allowed() -> JSONResponse:
    return _error(
        "Adapters cannot be loaded or unloaded while this server runs. Start it with --may-load if its clients may.",
        HTTPStatus.FORBIDDEN,
    )


def _error(message: str, status: HTTPStatus) -> JSONResponse:
    error = create_error_response(message, err_type=status.phrase.replace(" ", "") + "Error", status_code=status)
    return JSONResponse(error.model_dump(), status_code=status)


class NamesToPrefixes:
    """
    The ASGI middleware that takes adapters' names for models.

    Args:
        app: The application behind it.
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
        if entry is None:  # another model, or nothing that can be read: vLLM's to answer
            await self.app(scope, _replaying(content, receive), send)
            return
        assert isinstance(name, str)
        body["model"] = adapters.base_name
        if path in GENERATING:
            try:
                _add_prefix(body, entry)
                await self._check_length(scope, path, body, len(content), entry, adapters.max_model_len)
            except RefusedError as error:
                await _error(str(error), HTTPStatus.BAD_REQUEST)(scope, receive, send)
                return
            send = _naming(send, adapters.base_name, name)
        await self.app(*_with_body(scope, json.dumps(body).encode(), receive), send)

    async def _check_length(
        self, scope: Message, path: str, body: dict[str, Any], size: int, entry: Entry, max_model_len: int
    ) -> None:
        """
        Raise if a prompt leaves no room for the prefix. What is short in bytes is short in tokens and is not looked at.

        Raises:
            RefusedError: With the numbers.
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
        """How many tokens each prompt of a request has, told by the server itself."""
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
"""What a chat template may add to a request, in bytes; a longer one only costs a clear message in rare cases."""

TOKENIZED = (
    "prompt",
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "tools",
)
"""The fields of a request that make its prompt."""


def _add_prefix(body: dict[str, Any], entry: Entry) -> None:
    """Let a request name a prefix, or raise if it asks for what a prefix does not have."""
    parameters = body.get("kv_transfer_params")
    body["kv_transfer_params"] = {**(parameters if isinstance(parameters, dict) else {}), PARAMETER: entry.digest}
    if not entry.num_cached_tokens:
        return  # the whole prompt is computed
    asks_for_prompt = body.get("prompt_logprobs") is not None or (
        body.get("echo") and body.get("logprobs") is not None
    )
    if asks_for_prompt:
        raise RefusedError(
            "There are no log-probabilities of a prompt behind an adapter's prefix: leave out `prompt_logprobs`, and `echo` with "
            "`logprobs`."
        )
    if body.get("prompt_embeds") is not None:
        raise RefusedError("An adapter's prefix needs a prompt of tokens: leave out `prompt_embeds`.")


def _naming(send: Send, base: str, name: str) -> Send:
    """
    Let an answer name the adapter.

    Both are written as JSON without spaces, and inside a string a quote is escaped: the bytes can be nothing else.
    """
    before, after = (f'"model":{json.dumps(each)}'.encode() for each in (base, name))
    start: Message = {}

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)  # its length is known only with the body
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
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _replaying(content: bytes, receive: Receive) -> Receive:
    """Receive a body that has been read, and then what comes after it."""
    waiting = [content]

    async def replay() -> Message:
        return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

    return replay


def _with_body(scope: Message, content: bytes, receive: Receive) -> tuple[Message, Receive]:
    headers = [pair for pair in scope["headers"] if pair[0].lower() != b"content-length"]
    headers.append((b"content-length", str(len(content)).encode()))
    return {**scope, "headers": headers}, _replaying(content, receive)


async def _answer(app: Any, scope: Message, content: bytes) -> bytes:
    """Ask the application itself."""
    answer = b""

    async def receive() -> Message:
        await asyncio.Event().wait()  # there is no client to go away
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal answer
        answer += message.get("body", b"")

    await app(*_with_body(scope, content, receive), send)
    return answer
