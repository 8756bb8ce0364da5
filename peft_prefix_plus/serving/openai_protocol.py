"""
The part of the OpenAI protocol that `transformers_app` speaks: requests, answers and errors, as vLLM's server has them.

What a request asks for and the server cannot do is refused by name; nothing is passed over in silence.
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
    """What `/v1/load_prefix_adapter` takes: the adapter's name, and its directory or repository on the Hub."""

    name: str
    path: str


class UnloadRequest(Body):
    """What `/v1/unload_prefix_adapter` takes."""

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
"""Fields that this server has no other values for than these, which ask for nothing."""

WITHOUT_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user")
"""Fields that say something about the client."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(Body):
    """What requests of both kinds have. `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and `return_token_ids` are vLLM's, and mean the same."""

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
                raise ValueError(f"`{name}` = {_shortened(value)} is not supported by this server. Leave it out.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is for streams only. Leave it out, or set `stream` to true.")
        if any(not stop for stop in self.stop_strings):
            raise ValueError("`stop` has an empty string. Leave it out.")
        return self

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """What `/v1/completions` takes."""

    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, of which each gets an answer."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class Message(BaseModel):
    """A message of a conversation. What else it has is the chat template's."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return it as chat templates take it, with its parts as one text."""
        message = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            message["content"] = "\n".join(part.text for part in self.content)
        return message


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatRequest(GenerationRequest):
    """What `/v1/chat/completions` takes."""

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


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


class RefusedError(Exception):
    """
    A request that cannot be answered.

    Args:
        message (`str`): What was found, what was expected, what to do.
        status (`HTTPStatus`): The answer's status.
        param (`str`, *optional*): The field that is wrong.
    """

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param


def error_content(message: str, status: HTTPStatus, param: str | None = None) -> dict[str, Any]:
    """Return an error as clients expect it."""
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
        """Return the one answer to a request without a stream."""
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
        """Return the chunks that a stream begins with."""
        if not self._is_chat:
            return []
        return [
            self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, [], None)])
            for index in range(self._num_choices)
        ]

    def piece(self, index: int, text: str, token_ids: list[int], reason: str | None) -> dict[str, Any]:
        """Return a chunk with some text."""
        content: dict[str, Any] = {"delta": {"content": text}} if self._is_chat else {"text": text}
        return self._chunk([self._choice(index, content, token_ids, reason)])

    def endings(self, num_tokens: int) -> list[dict[str, Any]]:
        """Return the chunks that a stream ends with."""
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
