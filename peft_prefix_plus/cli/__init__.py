"""The command `prefix-plus`: train an adapter, generate with it, serve it, convert it, look into it, count parameters, see a demo."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence


EXTRA_PACKAGES = ("rich", "tokenizers", "typer")
"""What the extra `cli` installs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command and exit.

    Args:
        arguments (`Sequence[str]`, *optional*): The command line after the command's name; `None` means `sys.argv`'s.

    Raises:
        SystemExit: With 0 if all went well, 1 after an error that the user can mend, 2 after one in the options.
    """
    try:
        from .app import app
        from .errors import CommandError
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_PACKAGES:
            raise
        sys.exit(
            f"Error: the command prefix-plus needs the package {error.name}, which is not installed. Install what it "
            'needs by: pip install "peft-prefix-plus[cli]"'
        )
    # transformers 5.23 renames what PEFT 0.21 and older versions of transformers know by this name only
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing(_enable)?` is deprecated", FutureWarning)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="prefix-plus")
    except CommandError as error:
        sys.exit(f"Error: {error}")
