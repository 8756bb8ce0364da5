"""What a model's attention modules are: finding them, running the model once to see the shapes, queries, keys and rotations that
they really have, and choosing those that an adapter prefixes. May import `attention`, `config`, `registration` and, for the shapes,
`encoders`; nothing in here knows of adapters."""
