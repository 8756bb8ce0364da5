"""`prefix-plus serve`: serve a model and its adapters with an OpenAI-compatible server."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch

from .errors import CommandError, check_numbers, shown_as_command_error
from .loading import (
    DTYPE_HELP,
    EIGHT_BITS_HELP,
    FOUR_BITS_HELP,
    TRUST_HELP,
    Source,
    check_dtype,
    load_model,
    load_tokenizer,
    num_bits,
    num_positions,
)
from .records import prompt_ids


@dataclass(kw_only=True)
class ServingSettings:
    """The options of `prefix-plus serve` for both engines; the help texts describe them."""

    model: str = field(metadata={"help": "The base model: a directory or a name on the Hub."})
    adapter: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=PATH: an adapter, a directory or a name on the Hub, and its name for clients. Repeatable.",
            "is_repeatable": True,
        },
    )
    engine: str = field(
        default="vllm", metadata={"help": "The engine: vllm, or transformers, which serves every form of adapter."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "The address to listen on."})
    port: int = field(default=8000, metadata={"help": "The port to listen on."})
    may_load: bool = field(
        default=False,
        metadata={"help": "Let clients load adapters from any path, and unload them, while the server runs."},
    )
    arguments: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Further arguments for vLLM's server, after --.",
            "is_argument": True,
            "is_repeatable": True,
        },
    )

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {self.engine!r}.")
        check_numbers(self, 1, "port", at_most=65535)
        named_adapters(self.adapter)
        if self.engine != "vllm" and self.arguments:
            raise ValueError(
                f"The engine {self.engine} takes no arguments after --, got {self.arguments[0]!r}. Use its options instead; see --help."
            )


@dataclass(kw_only=True)
class TransformersSettings:
    """The options of the engine transformers; the help texts describe them."""

    max_batch_size: int = field(default=8, metadata={"help": "The most prompts in a batch."})
    max_model_len: int | None = field(
        default=None,
        metadata={"help": "The most tokens of a prompt and its answer. Default: the model's positions."},
    )
    api_key: str | None = field(default=None, metadata={"help": "The key that clients must send."})
    dtype: str = field(default="auto", metadata=DTYPE_HELP)
    revision: str | None = field(default=None, metadata={"help": "The base model's branch, tag or commit on the Hub."})
    trust_remote_code: bool = field(default=False, metadata=TRUST_HELP)
    load_in_4bit: bool = field(default=False, metadata=FOUR_BITS_HELP)
    load_in_8bit: bool = field(default=False, metadata=EIGHT_BITS_HELP)

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        num_bits(self.load_in_4bit, self.load_in_8bit)
        check_numbers(self, 1, "max_batch_size")
        if self.max_model_len is not None:
            check_numbers(self, 2, "max_model_len")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ValueError(
                "`api_key` must be printable ASCII characters without spaces, because clients encode others in different ways. "
                "Give another key, or leave it out."
            )


def named_adapters(adapters: list[str]) -> dict[str, str]:
    """
    Parse adapters of the form NAME=PATH.

    Args:
        adapters (`list[str]`): The adapters.

    Returns:
        `dict[str, str]`: The paths by name.

    Raises:
        ValueError: If one has another form, or a name occurs twice.
    """
    named: dict[str, str] = {}
    for adapter in adapters:
        name, separator, path = adapter.partition("=")
        if not (name and separator and path):
            raise ValueError(f"`adapter` must be NAME=PATH, got {adapter!r}.")
        if name in named:
            raise ValueError(f"`adapter` has the name {name!r} twice, for {named[name]} and {path}. Rename one.")
        named[name] = path
    return named


def serve(settings: ServingSettings, transformers_settings: TransformersSettings) -> None:
    """
    Serve until the server stops.

    Args:
        settings (`ServingSettings`): The options of both engines.
        transformers_settings (`TransformersSettings`): The options of the engine transformers.

    Raises:
        CommandError: If the model or an adapter cannot be served, or an option belongs to the other engine.
        SystemExit: With the server's exit status, if it is not 0.
    """
    if settings.engine != "transformers":
        _require_defaults(transformers_settings)
    status = ENGINES[settings.engine](settings, transformers_settings)
    if status:
        sys.exit(status)


def _require_defaults(settings: TransformersSettings) -> None:
    for each in fields(settings):
        if getattr(settings, each.name) != each.default:
            raise CommandError(
                f"--{each.name.replace('_', '-')} is an option of --engine transformers. Give the arguments of vLLM's "
                "server after --."
            )


def _serve_by_vllm(settings: ServingSettings, _: TransformersSettings) -> int:
    from ..serving import vllm_server

    with shown_as_command_error(Exception, while_doing="Cannot serve"):
        return vllm_server.serve(
            settings.model,
            named_adapters(settings.adapter),
            settings.host,
            settings.port,
            settings.may_load,
            settings.arguments,
        )


def _serve_by_transformers(settings: ServingSettings, engine: TransformersSettings) -> int:
    from ..serving import transformers_server

    with shown_as_command_error(Exception, while_doing="Cannot serve"):
        transformers_server.check_installed()
        source = Source(engine.revision, engine.trust_remote_code)
        bits = num_bits(engine.load_in_4bit, engine.load_in_8bit)
        base_model = load_model(settings.model, engine.dtype, source=source, bits=bits)
        tokenizer = load_tokenizer(settings.model, source)
        max_model_len = _max_model_len(base_model, engine.max_model_len)
        if bits is None:  # a quantized model has been loaded to its device, and must not be moved
            base_model = base_model.to("cuda" if torch.cuda.is_available() else "cpu")
        model = transformers_server.load_adapters(base_model, settings.model, named_adapters(settings.adapter))
    transformers_server.serve(
        model,
        tokenizer,
        partial(prompt_ids, tokenizer=tokenizer),
        settings.host,
        settings.port,
        max_batch_size=engine.max_batch_size,
        max_model_len=max_model_len,
        may_load=settings.may_load,
        api_key=engine.api_key,
    )
    return 0


def _max_model_len(model: Any, wanted: int | None) -> int | None:
    """
    Return the most tokens of a text: the number wanted, or else the model's positions.

    Raises:
        CommandError: If the model has fewer positions than wanted.
    """
    limit = num_positions(model)
    if wanted is None:
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and wanted > limit:
        raise CommandError(f"--max-model-len is {wanted}, but the model has {limit} positions. Give at most {limit}.")
    return wanted


ENGINES = {"vllm": _serve_by_vllm, "transformers": _serve_by_transformers}
"""The function of each engine. It serves, and returns the server's exit status."""
