"""
Training a prefix, beyond what a Trainer does: groups of parameters, and the distillation of documents. May import
everything but `cli`; nothing but `cli` imports it.
"""
