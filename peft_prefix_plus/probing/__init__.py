"""
A model's attention modules: finding them, running the model once to observe their actual shapes, queries, keys and
rotations, and choosing the ones that an adapter prefixes. May import `attention`, `config`, `registration` and, for
the shapes, `encoders`; nothing in here knows of adapters."""
