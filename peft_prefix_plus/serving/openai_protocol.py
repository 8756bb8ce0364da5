"""
The part of the OpenAI protocol that this package implements: requests, answers and errors, in the form of vLLM's server.

A request for something that the server cannot do is refused with an error that names the field. Nothing is ignored silently.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from http import HTTPStatus
from inspect import signature
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticSerializationError
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from ..config import shortened


class Body(BaseModel):
    """The body of a request."""

    @model_validator(mode="after")
    def _refuse_what_is_no_text(self) -> Self:
        try:
            self.model_dump_json()
        except (PydanticSerializationError, UnicodeError):
            raise ValueError(
                "A text has half of a surrogate pair, which is no character. Send valid Unicode."
            ) from None
        return self


class LoadRequest(Body):
    """The body of `/v1/load_prefix_adapter`: the adapter's name, and its directory or repository on the Hub."""

    name: str
    path: str


class UnloadRequest(Body):
    """The body of `/v1/unload_prefix_adapter`."""

    name: str


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields that this server does not support, with the values that ask for nothing and are accepted."""

WITHOUT_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user")
"""Fields that are accepted and have no effect: they describe the client."""


class StreamOptions(BaseModel):
    """The field `stream_options`: whether a stream ends with the numbers of tokens."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(Body):
    """
    The fields of both kinds of request. `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and `return_token_ids` are vLLM's
    additions.
    """

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _refuse_the_rest(self) -> GenerationRequest:
        for name, value in (self.model_extra or {}).items():
            is_neutral = any(
                value == neutral
                and isinstance(value, bool) == isinstance(neutral, bool)  # 0 asks for what False does not
                for neutral in NEUTRAL.get(name, ())
            )
            if value is not None and name not in WITHOUT_EFFECT and not is_neutral:
                raise ValueError(f"`{name}` = {shortened(repr(value))} is not supported by this server. Leave it out.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs a stream. Leave it out, or set `stream` to true.")
        if any(not stop for stop in self.stop_strings):
            raise ValueError("`stop` contains an empty string. Leave that out.")
        return self

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list; each gets an answer."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class Message(BaseModel):
    """A message of a conversation. Further fields are passed to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as a dictionary for a chat template, with its parts joined into one text."""
        message = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            message["content"] = "\n".join(part.text for part in self.content)
        return message


class TextPart(BaseModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _refuse_what_is_no_variable(cls, values: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in values or {}:
            if name in NO_VARIABLES:
                raise ValueError(
                    f"`{name}` is no variable of a chat template, and not supported by this server. Leave it out."
                )
        return values


NO_VARIABLES = {*signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {
    "add_generation_prompt",
    "continue_final_message",
    "documents",
}
"""The arguments of a tokenizer that say what to do with a template's text."""


class RefusedError(Exception):
    """
    A request that cannot be answered.

    Args:
        message (`str`): The message for the client.
        status (`HTTPStatus`, defaults to `HTTPStatus.BAD_REQUEST`): The status of the answer.
        param (`str`, *optional*): The name of the wrong field.
    """

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        return error_content(self.message, self.status, self.param)


def loading_forbidden() -> RefusedError:
    """Return the error for clients that load or unload adapters without permission."""
    return RefusedError(
        "This server does not let clients load or unload adapters. Start it with --may-load to allow it.",
        HTTPStatus.FORBIDDEN,
    )


def unknown_adapter(name: str) -> RefusedError:
    """Return the error for unloading an adapter that is not there."""
    return RefusedError(f"There is no adapter named {name!r}.", HTTPStatus.NOT_FOUND, "name")


def unservable_adapter(error: Exception) -> RefusedError:
    """Return the error for loading an adapter that raises an error."""
    return RefusedError(f"The adapter cannot be served. {error}")


def error_content(message: str, status: HTTPStatus, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error, as OpenAI's clients expect it."""
    kind = status.phrase.replace(" ", "").removesuffix("Error") + "Error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status.value}}


class Answers:
    """
    The answers to one request.

    Args:
        request (`GenerationRequest`): The request.
        model (`str`): The name of the model that answers.
        num_prompt_tokens (`Sequence[int]`): The length of each prompt.
    """

    def __init__(self, request: GenerationRequest, model: str, num_prompt_tokens: Sequence[int]) -> None:
        self._is_chat = isinstance(request, ChatRequest)
        self.returns_ids = bool(request.return_token_ids)
        self._includes_usage = request.includes_usage
        self._num_prompt_tokens = sum(num_prompt_tokens)
        self._num_choices = len(num_prompt_tokens)
        self._common = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], token_ids: Sequence[list[int]], reasons: Sequence[str]) -> dict[str, Any]:
        """
        Return the answer to a request without a stream.

        Args:
            texts (`Sequence[str]`): The text for each prompt.
            token_ids (`Sequence[list[int]]`): Its tokens.
            reasons (`Sequence[str]`): Why each text ends.
        """
        choices = []
        for index, text in enumerate(texts):
            content: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            )
            choices.append(self._choice(index, content, token_ids[index], reasons[index]))
        return {
            **self._common,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "choices": choices,
            "usage": self._usage(sum(map(len, token_ids))),
        }

    def beginnings(self) -> list[dict[str, Any]]:
        """Return the first chunks of a stream."""
        if not self._is_chat:
            return []
        return [
            self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, [], None)])
            for index in range(self._num_choices)
        ]

    def piece(self, index: int, text: str, token_ids: list[int], reason: str | None) -> dict[str, Any]:
        """
        Return a chunk with a piece of text.

        Args:
            index (`int`): The index of the prompt.
            text (`str`): The piece.
            token_ids (`list[int]`): Its tokens.
            reason (`str`, *optional*): Why the text ends, in its last piece.
        """
        content: dict[str, Any] = {"delta": {"content": text}} if self._is_chat else {"text": text}
        return self._chunk([self._choice(index, content, token_ids, reason)])

    def endings(self, num_tokens: int) -> list[dict[str, Any]]:
        """Return the last chunks of a stream that has generated this many tokens."""
        return [{**self._chunk([]), "usage": self._usage(num_tokens)}] if self._includes_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices}

    def _choice(self, index: int, content: dict[str, Any], token_ids: list[int], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return {**choice, "token_ids": token_ids} if self.returns_ids else choice

    def _usage(self, num_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self._num_prompt_tokens + num_tokens,
        }
