"""Attention with a prefix. Nothing in here knows of PEFT."""

from .config_view import ConfigView, model_config, reads_implementation, set_config
from .dispatch import base_attention_function, check_implementation, eager_attention_function, prefix_attention
from .prefix import Prefix


__all__ = [
    "ConfigView",
    "Prefix",
    "base_attention_function",
    "check_implementation",
    "eager_attention_function",
    "model_config",
    "prefix_attention",
    "reads_implementation",
    "set_config",
]
