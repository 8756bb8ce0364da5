"""`prefix-plus serve`: an OpenAI-compatible server of a model and its adapters."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from .errors import check_numbers, shown_as_command_error


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
    engine: str = field(default="vllm", metadata={"help": "What computes: vllm."})
    host: str = field(default="127.0.0.1", metadata={"help": "The address to listen at."})
    port: int = field(default=8000, metadata={"help": "The port to listen at."})
    may_load: bool = field(
        default=False,
        metadata={"help": "Let clients load adapters from any path, and unload them, while the server runs."},
    )
    arguments: list[str] = field(
        default_factory=list,
        metadata={
            "help": "After --: further arguments of the engine's server.",
            "is_argument": True,
            "is_repeatable": True,
        },
    )

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {self.engine!r}.")
        check_numbers(self, 1, "port", at_most=65535)
        named_adapters(self.adapter)


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


def serve(settings: ServingSettings) -> None:
    """
    Serve until the server stops.

    Args:
        settings (`ServingSettings`): What to serve, where.

    Raises:
        CommandError: If something cannot be served.
        SystemExit: With the server's status, if it is not 0.
    """
    status = ENGINES[settings.engine](settings)
    if status:
        sys.exit(status)


def _serve_by_vllm(settings: ServingSettings) -> int:
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


ENGINES = {"vllm": _serve_by_vllm}
"""What serves, by the name of the engine: each returns its server's exit status."""
