"""
The commands of `prefix-plus`: train and distill an adapter, generate with it, serve it, convert it, inspect it, count parameters, run the
demo or another program.

The command starts in `peft_prefix_plus_cli.py`, beside the package. May import everything; nothing imports it.
"""

from peft_prefix_plus_cli import main


__all__ = ["main"]
