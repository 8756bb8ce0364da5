"""
Training a prefix beyond the Trainer: groups of parameters, and distilling documents. May import everything but `cli`;
nothing but `cli` imports it.
"""
