"""The commands of `prefix-plus`: train an adapter, generate with it, serve it, convert it, look into it, count parameters, see a demo.
`peft_prefix_plus_cli.py`, beside the package, is where the command starts. May import everything; nothing imports it."""

from peft_prefix_plus_cli import main


__all__ = ["main"]
