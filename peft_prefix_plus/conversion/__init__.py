"""Turning an adapter into another form with the same outputs: its reparameterization dropped (flatten), or PEFT's PREFIX_TUNING.
What cannot be exact is refused. May import everything but `insight`, `serving` and `cli`; nothing but `insight`, `serving` and `cli`
imports it."""
