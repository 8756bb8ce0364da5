"""`prefix-plus serve`: an OpenAI-compatible server of a model and its adapters."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch

from .errors import CommandError, check_numbers, shown_as_command_error
from .loading import Source, check_dtype, load_model, load_tokenizer, num_positions
from .records import prompt_ids


@dataclass(kw_only=True)
class ServingSettings:
    """What to serve, where. The fields' help texts say the rest."""

    model: str = field(metadata={"help": "The base model: a directory or a name on the Hub."})
    adapter: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=PATH: an adapter, and the name by which clients ask for it. May be repeated.",
            "is_repeatable": True,
        },
    )
    engine: str = field(
        default="vllm", metadata={"help": "What computes: vllm, or transformers, which takes every form of adapter."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "The address to listen at."})
    port: int = field(default=8000, metadata={"help": "The port to listen at."})
    may_load: bool = field(
        default=False,
        metadata={"help": "Let clients load adapters from any path, and unload them, while the server runs."},
    )
    arguments: list[str] = field(
        default_factory=list,
        metadata={
            "help": "After --: further arguments of vLLM's server.",
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
                f"The engine {self.engine} takes no arguments after --, got {self.arguments[0]!r}. It has options: see --help."
            )


@dataclass(kw_only=True)
class TransformersSettings:
    """How transformers computes. The fields' help texts say the rest."""

    max_batch_size: int = field(default=8, metadata={"help": "The most prompts that are computed together."})
    max_model_len: int | None = field(
        default=None,
        metadata={
            "help": "The most tokens of a prompt and its answer. Without it, as many as the model has positions."
        },
    )
    api_key: str | None = field(default=None, metadata={"help": "The key that clients must give."})
    dtype: str = field(
        default="auto", metadata={"help": "The base model's dtype: auto, float32, bfloat16 or float16."}
    )
    revision: str | None = field(default=None, metadata={"help": "The base model's version on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that lies beside the base model's weights."}
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_numbers(self, 1, "max_batch_size")
        if self.max_model_len is not None:
            check_numbers(self, 2, "max_model_len")
        if self.api_key == "":
            raise ValueError("`api_key` is empty. Leave it out, or give a key.")


def named_adapters(adapters: list[str]) -> dict[str, str]:
    """
    Return paths by name, of adapters given as NAME=PATH.

    Raises:
        ValueError: If one is not, or a name is there twice.
    """
    named: dict[str, str] = {}
    for adapter in adapters:
        name, separator, path = adapter.partition("=")
        if not (name and separator and path):
            raise ValueError(f"`adapter` must be NAME=PATH, got {adapter!r}.")
        if name in named:
            raise ValueError(f"`adapter` names {name!r} twice: {named[name]} and {path}.")
        named[name] = path
    return named


def serve(settings: ServingSettings, transformers_settings: TransformersSettings) -> None:
    """
    Serve until the server stops.

    Args:
        settings (`ServingSettings`): What to serve, where.
        transformers_settings (`TransformersSettings`): How the engine transformers computes.

    Raises:
        CommandError: If something cannot be served.
        SystemExit: With the server's status, if it is not 0.
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
                f"--{each.name.replace('_', '-')} is an option of --engine transformers. What vLLM takes is given after --; "
                "see the arguments of vLLM's server."
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
        base_model = load_model(settings.model, engine.dtype, source=source)
        tokenizer = load_tokenizer(settings.model, source)
        max_model_len = _max_model_len(base_model, engine.max_model_len)
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
    Return the most tokens that a text may have: those wanted, or as many as the model was made for.

    Raises:
        CommandError: If the model has less.
    """
    limit = num_positions(model)
    if wanted is None:
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and wanted > limit:
        raise CommandError(f"--max-model-len is {wanted}, but the model has {limit} positions. Give at most those.")
    return wanted


ENGINES = {"vllm": _serve_by_vllm, "transformers": _serve_by_transformers}
"""What serves, by the name of the engine: each returns its server's exit status."""
