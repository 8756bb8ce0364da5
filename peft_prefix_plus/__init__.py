"""peft-prefix-plus: prefix tuning for PEFT, without its limits. Importing it registers the method PREFIX_PLUS."""

from .attention import prefix_attention
from .config import PrefixPlusConfig
from .conversion import flatten, prefix_key_values
from .fitting import Residual
from .geometry import PROBE_NAME, probe_attention
from .initialization import initialize_from_key_values, initialize_from_text
from .layer import PrefixPlusLayer
from .model import PrefixPlusModel
from .registration import METHOD_NAME, register


__all__ = [
    "PrefixPlusConfig",
    "PrefixPlusLayer",
    "PrefixPlusModel",
    "Residual",
    "flatten",
    "initialize_from_key_values",
    "initialize_from_text",
    "prefix_key_values",
]

__version__ = "0.1.0"

register(PrefixPlusConfig, PrefixPlusModel, {METHOD_NAME: prefix_attention, PROBE_NAME: probe_attention})
