"""What a trained prefix does: the attention that falls on it, what it contributes, which layers need theirs, and plots. Looks at models
and never changes what they compute. May import everything but `cli`; nothing but `cli` imports it."""
