"""
Where a prefix starts: its scale, the quiet start, and starts from given keys and values or from a text. Reads the
measurements of `probing` and fills encoders; only the functions that users call know about adapters. May import
`encoders`, `layer`, `probing` and `adapters`."""
