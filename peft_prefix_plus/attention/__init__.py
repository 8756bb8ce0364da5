"""Attention with a prefix. Nothing in here knows of PEFT. May import nothing of the package."""

from .base import attend_as_base, attention_family, eager_attention_function
from .call import AttentionCall, AttentionOutput
from .config_view import ConfigView, model_config, reads_implementation, set_config
from .dispatch import prefix_attention
from .holder import PrefixHolder
from .inline import attend_inline, follow, run_under, unfollow
from .inline_classes import UNSUPPORTED, may_compute_attention
from .inline_mode import InlineAttention
from .observed import Observation, Observer, observed_attention
from .prefix import ActivePrefixes, Prefix, concatenated, gathered
from .rotary import POSITIONS, PositionEmbeddings, QueryRotation, find_rotation, has_known_form, position_embeddings_of
from .turned import TurnedPrefixes
from .watching import THREAD, watching


__all__ = [
    "POSITIONS",
    "THREAD",
    "UNSUPPORTED",
    "ActivePrefixes",
    "AttentionCall",
    "AttentionOutput",
    "ConfigView",
    "InlineAttention",
    "Observation",
    "Observer",
    "PositionEmbeddings",
    "Prefix",
    "PrefixHolder",
    "QueryRotation",
    "TurnedPrefixes",
    "attend_as_base",
    "attend_inline",
    "attention_family",
    "concatenated",
    "eager_attention_function",
    "find_rotation",
    "follow",
    "gathered",
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
