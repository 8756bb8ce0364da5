"""Turning an adapter into another form with the same outputs: its reparameterization dropped (flatten), or PEFT's PREFIX_TUNING.
What cannot be exact is refused. May import everything but `insight` and `cli`; nothing but `insight` and `cli` imports it."""
