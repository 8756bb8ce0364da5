"""What a model's attention modules are: finding them, running the model once to see the shapes, queries, keys and rotations that
they really have, and choosing those that an adapter prefixes. May import `attention` and the encoders' shapes; nothing in here
knows of adapters."""
