"""
The web app of the engine transformers: the base model and its adapters as models of an OpenAI-compatible server.

The event loop reads requests and writes answers. The model runs in the thread of a [`Batcher`].
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from .adapted_model import AdaptedModel, LoadedAdapter
from .adapter_files import adapter_folder
from .batcher import Batcher, StoppedError
from .decoding import LOWEST_TEMPERATURE, Progress, Row, Sampling, processors_of
from .openai_protocol import (
    Answers,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    LoadRequest,
    RefusedError,
    UnloadRequest,
    error_content,
    loading_forbidden,
    unknown_adapter,
    unservable_adapter,
)
from .text_stream import TextStream


logger = logging.getLogger(__name__)

COMPLETION_TOKENS = 16
"""The default of `max_tokens` for completions, as in OpenAI's API."""

CHAT_TOKENS = 2048
"""The default of `max_tokens` for chats, if the length of texts has no limit."""


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """
    The limits and permissions of an app.

    Attributes:
        max_model_len (`int`, *optional*): The most tokens of a prompt and its answer; `None` if there is no limit.
        may_load (`bool`, defaults to `False`): Whether clients may load and unload adapters.
        api_key (`str`, *optional*): The key that clients must send; `None` if they need none.
    """

    max_model_len: int | None = None
    may_load: bool = False
    api_key: str | None = None


def make_app(
    model: AdaptedModel, batcher: Batcher, tokenizer: Any, encode: Callable[[str], list[int]], settings: AppSettings
) -> FastAPI:
    """
    Return the app.

    Args:
        model (`AdaptedModel`): The model. The batcher owns it; the app only looks up names.
        batcher (`Batcher`): Runs the model. The app starts and stops it.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        encode (`Callable[[str], list[int]]`): Turns a prompt into tokens.
        settings (`AppSettings`): The limits and permissions.

    Returns:
        `FastAPI`: The app.
    """
    endpoints = _Endpoints(model, batcher, tokenizer, encode, settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await asyncio.to_thread(batcher.stop)

    app = FastAPI(lifespan=lifespan, title="prefix-plus serve", openapi_url=None)
    authorized = [Depends(endpoints.authorize)]
    app.get("/health")(endpoints.health)
    app.get("/v1/models", dependencies=authorized)(endpoints.show_models)
    app.get("/v1/models/{name:path}", dependencies=authorized)(endpoints.show_model)
    app.post("/v1/completions", dependencies=authorized, response_model=None)(endpoints.complete)
    app.post("/v1/chat/completions", dependencies=authorized, response_model=None)(endpoints.chat)
    app.post("/v1/load_prefix_adapter", dependencies=authorized)(endpoints.load)
    app.post("/v1/unload_prefix_adapter", dependencies=authorized)(endpoints.unload)
    app.exception_handler(RefusedError)(_show_refusal)
    app.exception_handler(StoppedError)(_show_stop)
    app.exception_handler(RequestValidationError)(_show_validation)
    app.exception_handler(HTTPException)(_show_http_error)
    app.exception_handler(Exception)(_show_failure)
    return app


class StoppingServer(uvicorn.Server):
    """
    A server that stops its batcher first, so that running requests end with an error instead of a broken connection.

    Args:
        config (`uvicorn.Config`): The app and its address.
        batcher (`Batcher`): The app's batcher.
    """

    def __init__(self, config: uvicorn.Config, batcher: Batcher) -> None:
        super().__init__(config)
        self._batcher = batcher

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the batcher, then the server."""
        await asyncio.to_thread(self._batcher.stop)
        await super().shutdown(sockets)


class _Endpoints:
    """The app's endpoints."""

    def __init__(
        self,
        model: AdaptedModel,
        batcher: Batcher,
        tokenizer: Any,
        encode: Callable[[str], list[int]],
        settings: AppSettings,
    ) -> None:
        self._model = model
        self._batcher = batcher
        self._tokenizer = tokenizer
        self._decoder = copy.deepcopy(tokenizer)  # for the batcher's thread: tokenizers are not safe for threads
        self._encode = encode
        self._settings = settings
        self._created = int(time.time())
        self._defaults = model.base_model.generation_config
        self._device = model.base_model.device
        self._vocabulary = model.base_model.get_input_embeddings().num_embeddings

    async def authorize(self, request: Request) -> None:
        """Raise unless a request has the API key."""
        key = self._settings.api_key
        given = request.headers.get("authorization", "")
        if key is not None and not secrets.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise RefusedError(
                "The API key is missing or wrong. Send the header `Authorization: Bearer KEY`.",
                HTTPStatus.UNAUTHORIZED,
            )

    async def health(self) -> Response:
        """Handle GET /health."""
        return Response(status_code=HTTPStatus.OK if self._batcher.is_alive else HTTPStatus.SERVICE_UNAVAILABLE)

    async def show_models(self) -> dict[str, Any]:
        """Handle GET /v1/models: the base model and the adapters."""
        models = {self._model.base_name: self._model.base, **self._model.adapters}
        return {"object": "list", "data": [self._card(name, adapter) for name, adapter in models.items()]}

    async def show_model(self, name: str) -> dict[str, Any]:
        """Handle GET /v1/models/NAME."""
        return self._card(name, self._find(name))

    def _card(self, name: str, adapter: LoadedAdapter) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "peft-prefix-plus",
            "root": adapter.source,
            "parent": None if adapter is self._model.base else self._model.base_name,
            "max_model_len": self._settings.max_model_len,
        }

    def _find(self, name: str | None) -> LoadedAdapter:
        try:
            return self._model.find(name)
        except KeyError:
            raise RefusedError(
                f"The model `{name}` does not exist. /v1/models lists the models.", HTTPStatus.NOT_FOUND, "model"
            ) from None

    async def load(self, body: LoadRequest) -> dict[str, Any]:
        """Handle POST /v1/load_prefix_adapter."""
        self._check_may_load()
        try:
            self._model.check_name(body.name)
            folder = await asyncio.to_thread(adapter_folder, body.path)
            await asyncio.wrap_future(self._batcher.change(lambda model: model.load(body.name, folder, body.path)))
        except StoppedError:
            raise
        except Exception as error:
            # whatever a broken file raises, the server goes on
            logger.warning("The adapter %r is refused: %s", body.path, error)
            raise unservable_adapter(error) from error
        return {"name": body.name}

    async def unload(self, body: UnloadRequest) -> dict[str, Any]:
        """Handle POST /v1/unload_prefix_adapter."""
        self._check_may_load()
        try:
            await asyncio.wrap_future(self._batcher.change(lambda model: model.unload(body.name)))
        except KeyError:
            raise unknown_adapter(body.name) from None
        return {"name": body.name}

    def _check_may_load(self) -> None:
        if not self._settings.may_load:
            raise loading_forbidden()

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Handle POST /v1/completions."""
        self._find(body.model)
        prompts = [self._encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
        if not prompts:
            raise RefusedError("`prompt` is an empty list. Give a prompt.", param="prompt")
        return await self._answer(body, request, prompts, body.max_tokens or COMPLETION_TOKENS)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Handle POST /v1/chat/completions."""
        adapter = self._find(body.model)
        prompt = self._conversation(body, adapter)
        num_tokens = body.max_completion_tokens or body.max_tokens
        if num_tokens is None:
            limit = self._settings.max_model_len
            num_tokens = CHAT_TOKENS if limit is None else max(1, limit - len(prompt))
        return await self._answer(body, request, [prompt], num_tokens)

    def _conversation(self, body: ChatRequest, adapter: LoadedAdapter) -> list[int]:
        """Return a conversation's tokens, with the adapter's chat template or else the base model's."""
        template = adapter.chat_template or self._tokenizer.chat_template
        if template is None:
            raise RefusedError(
                "The model's tokenizer has no chat template. Use /v1/completions, or serve an instruction-tuned model."
            )
        try:
            encoded = self._tokenizer.apply_chat_template(
                [message.for_template() for message in body.messages],
                **{
                    "add_generation_prompt": True,
                    **(body.chat_template_kwargs or {}),
                    "chat_template": template,
                    "tokenize": True,
                    "return_dict": True,
                },
            )
        except Exception as error:  # a template can raise anything
            raise RefusedError(f"The chat template refuses the messages: {error}", param="messages") from error
        return list(encoded["input_ids"])

    def _check_prompt(self, prompt: list[int], num_tokens: int) -> None:
        if not prompt:
            raise RefusedError("The prompt has no tokens. Give at least one.", param="prompt")
        if not 0 <= min(prompt) <= max(prompt) < self._vocabulary:
            raise RefusedError(
                f"The prompt has token ids from {min(prompt)} to {max(prompt)}; the model's are 0 to {self._vocabulary - 1}. Use the model's "
                "own tokenizer.",
                param="prompt",
            )
        limit = self._settings.max_model_len
        if limit is not None and len(prompt) + num_tokens > limit:
            raise RefusedError(
                f"This model's maximum context length is {limit} tokens. The prompt has {len(prompt)} tokens and the answer may "
                f"have {num_tokens}. Shorten the prompt, or ask for fewer tokens by `max_tokens`.",
                param="max_tokens",
            )

    def _sampling(
        self, body: GenerationRequest, prompt: list[int], num_tokens: int, ends: Collection[int]
    ) -> Sampling:
        """Return a request's sampling. Fields that it leaves out come from the model's `generation_config`."""

        def first(name: str, default: float) -> Any:
            values = (getattr(body, name), getattr(self._defaults, name, None), default)
            return next(value for value in values if value is not None)

        fields = {
            "temperature": first("temperature", 1.0),
            "top_p": first("top_p", 1.0),
            "top_k": max(0, first("top_k", 0)),
            "min_p": first("min_p", 0.0) or None,
            "repetition_penalty": first("repetition_penalty", 1.0),
        }
        fields["do_sample"] = fields["temperature"] >= LOWEST_TEMPERATURE
        processors = processors_of(self._model.base_model, prompt, num_tokens, ends, fields, self._device)
        return Sampling(processors, not fields["do_sample"], body.seed)

    def _ends(self, body: GenerationRequest) -> frozenset[int]:
        """Return the tokens that end a text."""
        ends = self._defaults.eos_token_id
        if body.ignore_eos or ends is None:
            return frozenset()
        return frozenset(ends if isinstance(ends, Sequence) else [int(ends)])

    async def _answer(
        self, body: GenerationRequest, request: Request, prompts: list[list[int]], num_tokens: int
    ) -> Response:
        for prompt in prompts:
            self._check_prompt(prompt, num_tokens)
        loop = asyncio.get_running_loop()
        progress: asyncio.Queue[Progress] = asyncio.Queue()

        def send(step: Progress) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(progress.put_nowait, step)

        def make_rows() -> list[Row]:
            adapter, ends = self._find(body.model), self._ends(body)
            return [
                Row(
                    adapter,
                    prompt,
                    num_tokens,
                    self._sampling(body, prompt, num_tokens, ends),
                    TextStream(self._decoder, body.stop_strings),
                    ends,
                    send,
                    index,
                )
                for index, prompt in enumerate(prompts)
            ]

        answers = Answers(body, body.model or self._model.base_name, [len(prompt) for prompt in prompts])
        rows = self._batcher.submit(make_rows)
        if body.stream:
            return _Stream(rows, progress, answers)
        return await _whole_answer(rows, progress, answers, request)


async def _steps(num_rows: int, progress: asyncio.Queue[Progress]) -> AsyncIterator[Progress]:
    """
    Yield the messages of rows until all are over.

    Raises:
        RefusedError: If one fails.
    """
    while num_rows:
        step = await progress.get()
        if step.error is not None:
            raise RefusedError(step.error, HTTPStatus.INTERNAL_SERVER_ERROR)
        num_rows -= step.finish_reason is not None
        yield step


class _Stream(StreamingResponse):
    """A stream of server-sent events. When it ends, the rows do, also if the client has left before the first event."""

    def __init__(self, rows: Sequence[Row], progress: asyncio.Queue[Progress], answers: Answers) -> None:
        super().__init__(_events(len(rows), progress, answers), media_type="text/event-stream")
        self._rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for row in self._rows:
                row.cancel()


async def _events(num_rows: int, progress: asyncio.Queue[Progress], answers: Answers) -> AsyncIterator[str]:
    """Yield the server-sent events of a stream."""
    num_tokens = 0
    try:
        for chunk in answers.beginnings():
            yield _event(chunk)
        async for step in _steps(num_rows, progress):
            num_tokens += len(step.token_ids)
            if step.text or step.finish_reason is not None or answers.returns_ids:
                yield _event(answers.piece(step.index, step.text, step.token_ids, step.finish_reason))
        for chunk in answers.endings(num_tokens):
            yield _event(chunk)
    except RefusedError as error:  # too late for a status
        yield _event(error_content(error.message, error.status))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _whole_answer(
    rows: Sequence[Row], progress: asyncio.Queue[Progress], answers: Answers, request: Request
) -> Response:
    """Return the answer when it is complete. If the client leaves before, cancel the rows."""
    collecting = asyncio.ensure_future(_collect(rows, progress, answers))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([collecting, leaving], return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            return JSONResponse(collecting.result())
        return Response(status_code=499)  # nobody reads it
    finally:
        leaving.cancel()
        collecting.cancel()
        for row in rows:
            row.cancel()


async def _collect(rows: Sequence[Row], progress: asyncio.Queue[Progress], answers: Answers) -> dict[str, Any]:
    texts = [""] * len(rows)
    token_ids: list[list[int]] = [[] for _ in rows]
    reasons = [""] * len(rows)
    async for step in _steps(len(rows), progress):
        texts[step.index] += step.text
        token_ids[step.index] += step.token_ids
        reasons[step.index] = step.finish_reason or ""
    return answers.whole(texts, token_ids, reasons)


async def _left(request: Request) -> None:
    """Wait until a request's client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _show_refusal(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse(error.content, status_code=error.status)


async def _show_stop(_request: Request, error: Exception) -> Response:
    status = HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse(error_content(str(error), status), status_code=status)


async def _show_validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"`{place}`: {first['msg']}" if place else str(first["msg"]).removeprefix("Value error, ")
    content = error_content(message, HTTPStatus.BAD_REQUEST, place or None)
    return JSONResponse(content, status_code=HTTPStatus.BAD_REQUEST)


async def _show_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    return JSONResponse(error_content(str(error.detail), status), status_code=status)


async def _show_failure(_request: Request, error: Exception) -> Response:
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return JSONResponse(error_content(f"{type(error).__name__}: {error}", status), status_code=status)
