"""
Converting an adapter to another form with the same outputs: without its reparameterization (flatten), as PEFT's
PREFIX_TUNING or CARTRIDGE, as one of AdapterHub, or as a file of keys and values. Conversions that cannot be exact are
refused. May import everything but `insight`, `serving` and `cli`; nothing but `insight`, `serving` and `cli` imports it.
"""
