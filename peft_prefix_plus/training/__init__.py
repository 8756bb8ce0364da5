"""What training with a prefix needs beyond a Trainer. May import everything but `cli`; nothing but `cli` imports it."""
