"""What training with a prefix needs beyond a Trainer: groups of parameters, and the distillation of documents. May import everything but `cli`; nothing but `cli` imports it."""
