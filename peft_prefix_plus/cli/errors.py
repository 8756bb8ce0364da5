"""The errors that the command shows as one line instead of a traceback."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft_prefix_plus_cli import CommandError


__all__ = ["LARGEST", "PLAIN", "CommandError", "check_numbers", "check_positive", "shown_as_command_error"]


PLAIN = (OSError, ValueError, TypeError, ImportError)
"""Exceptions whose message says enough without the name of their class."""


@contextmanager
def shown_as_command_error(*kinds: type[Exception], while_doing: str = "") -> Iterator[None]:
    """
    Turn exceptions of these kinds into a [`CommandError`].

    Args:
        kinds: The classes of exceptions that the user, not the program, is to fix where this is used.
        while_doing (`str`): What to put before the message, for instance "Cannot load the model".
    """
    try:
        yield
    except CommandError:
        raise
    except kinds as error:
        message = str(error) if isinstance(error, PLAIN) else f"{type(error).__name__}: {error}".removesuffix(": ")
        message = message or type(error).__name__
        raise CommandError(f"{while_doing}: {message}" if while_doing else message) from error


LARGEST = 2**31 - 1
"""The largest number that an option takes: what computes with them does so in 32 or 64 bits."""


def check_numbers(settings: Any, at_least: float, *names: str, at_most: float = LARGEST) -> None:
    """
    Raise unless numbers of some settings are in a range.

    Args:
        settings: The settings.
        at_least (`float`): The smallest number allowed.
        names: The names of the fields.
        at_most (`float`): The largest number allowed.

    Raises:
        ValueError: If one is not.
    """
    for name in names:
        value = getattr(settings, name)
        if not value >= at_least:  # NaN neither
            raise ValueError(f"`{name}` must be at least {at_least}, got {value}.")
        if value > at_most:
            raise ValueError(f"`{name}` must be at most {at_most}, got {value}.")


def check_positive(settings: Any, *names: str) -> None:
    """
    Raise unless numbers of some settings are positive and finite.

    Raises:
        ValueError: If one is not.
    """
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be positive and finite, got {value}.")
