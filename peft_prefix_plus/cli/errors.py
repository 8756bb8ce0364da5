"""The errors that the command shows as one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """An error that the user can mend: what was found, what was expected, what to do."""


@contextmanager
def shown_as_command_error(*kinds: type[Exception], while_doing: str = "") -> Iterator[None]:
    """
    Turn exceptions of these kinds into a [`CommandError`].

    Args:
        kinds: The classes of exceptions that the user, not the program, is to mend where this is used.
        while_doing (`str`): What to put before the message, for instance "Cannot load the model".
    """
    try:
        yield
    except kinds as error:
        message = str(error) or type(error).__name__
        raise CommandError(f"{while_doing}: {message}" if while_doing else message) from error
