"""Where a prefix starts: its scale, the quiet start, and starts from given keys and values or from a text. Reads what `probing` has
measured and fills encoders; of the adapters, only the functions that users call know. May import `encoders`,
`layer`, `probing` and `adapters`."""
