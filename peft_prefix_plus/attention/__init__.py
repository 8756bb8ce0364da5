"""Attention with a prefix. Nothing in here knows of PEFT."""

from .config_view import ConfigView, model_config, reads_implementation, set_config
from .dispatch import attend_as_base, attention_family, eager_attention_function, prefix_attention
from .inline import UNSUPPORTED, InlineAttention, InlineHooks, may_compute_attention, require_complete
from .mass import Observer, observed_attention
from .prefix import Prefix, concatenated
from .reference import AttentionOutput
from .rotary import PositionEmbeddings, QueryRotation, find_rotation, has_known_form, position_embeddings_of


__all__ = [
    "UNSUPPORTED",
    "AttentionOutput",
    "ConfigView",
    "InlineAttention",
    "InlineHooks",
    "Observer",
    "PositionEmbeddings",
    "Prefix",
    "QueryRotation",
    "attend_as_base",
    "attention_family",
    "concatenated",
    "eager_attention_function",
    "find_rotation",
    "has_known_form",
    "may_compute_attention",
    "model_config",
    "observed_attention",
    "position_embeddings_of",
    "prefix_attention",
    "reads_implementation",
    "require_complete",
    "set_config",
]
