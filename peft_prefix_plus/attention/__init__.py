"""Attention with a prefix. Nothing in here knows of PEFT. May import nothing of the package."""

from .call import AttentionOutput
from .config_view import ConfigView, model_config, reads_implementation, set_config
from .dispatch import attend_as_base, attention_family, eager_attention_function, prefix_attention
from .inline import UNSUPPORTED, InlineAttention, attend_inline, follow, may_compute_attention, run_under, unfollow
from .observed import Observer, observed_attention
from .prefix import Prefix, concatenated
from .rotary import POSITIONS, PositionEmbeddings, QueryRotation, find_rotation, has_known_form, position_embeddings_of
from .watching import THREAD, watching


__all__ = [
    "POSITIONS",
    "THREAD",
    "UNSUPPORTED",
    "AttentionOutput",
    "ConfigView",
    "InlineAttention",
    "Observer",
    "PositionEmbeddings",
    "Prefix",
    "QueryRotation",
    "attend_as_base",
    "attend_inline",
    "attention_family",
    "concatenated",
    "eager_attention_function",
    "find_rotation",
    "follow",
    "has_known_form",
    "may_compute_attention",
    "model_config",
    "observed_attention",
    "position_embeddings_of",
    "prefix_attention",
    "reads_implementation",
    "run_under",
    "set_config",
    "unfollow",
    "watching",
]
