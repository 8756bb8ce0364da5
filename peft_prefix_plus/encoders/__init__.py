"""
The reparameterizations: each is a class that turns an adapter's parameters into the prefix (P_K, P_V) of one attention
module. May import nothing of the package.
"""

from .base import ENCODERS, KVShape, NotTrained, PrefixEncoder, Scaling, make_encoder, untrained_parameters
from .direct import DirectEncoder, LogEncoder, TokenEncoder
from .projected import SHARED_PARTS, LinearEncoder, MLPEncoder, ProjectedEncoder, VirtualTokens


__all__ = [
    "ENCODERS",
    "SHARED_PARTS",
    "DirectEncoder",
    "KVShape",
    "LinearEncoder",
    "LogEncoder",
    "MLPEncoder",
    "NotTrained",
    "PrefixEncoder",
    "ProjectedEncoder",
    "Scaling",
    "TokenEncoder",
    "VirtualTokens",
    "make_encoder",
    "untrained_parameters",
]
