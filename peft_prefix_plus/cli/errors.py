"""Errors that the command shows as one line instead of a traceback, and checks of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft_prefix_plus_cli import CommandError


__all__ = ["LARGEST", "PLAIN", "CommandError", "check_numbers", "check_positive", "shown_as_command_error"]


PLAIN = (OSError, ValueError, TypeError, ImportError)
"""Exceptions whose message is clear without the name of their class."""


@contextmanager
def shown_as_command_error(*kinds: type[Exception], while_doing: str = "") -> Iterator[None]:
    """
    Turn exceptions of these kinds into a [`CommandError`].

    Args:
        kinds (`type[Exception]`): The classes of the exceptions that the user can fix.
        while_doing (`str`, defaults to `""`): The beginning of the message, for instance "Cannot load the model".

    Raises:
        CommandError: With the message of the exception.
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
"""The largest value of an option: torch and transformers compute with some of them in 32 bits."""


def check_numbers(settings: Any, at_least: float, *names: str, at_most: float = LARGEST) -> None:
    """
    Raise unless some fields of settings are in a range.

    Args:
        settings: The settings.
        at_least (`float`): The smallest number allowed.
        names (`str`): The names of the fields.
        at_most (`float`, defaults to `LARGEST`): The largest number allowed.

    Raises:
        ValueError: If one is outside of it.
    """
    for name in names:
        value = getattr(settings, name)
        if not value >= at_least:  # also NaN
            raise ValueError(f"`{name}` must be at least {at_least}, got {value}.")
        if value > at_most:
            raise ValueError(f"`{name}` must be at most {at_most}, got {value}.")


def check_positive(settings: Any, *names: str) -> None:
    """
    Raise unless some fields of settings are positive and finite.

    Args:
        settings: The settings.
        names (`str`): The names of the fields.

    Raises:
        ValueError: If one is not.
    """
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be positive and finite, got {value}.")
