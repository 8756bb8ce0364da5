"""
Modules that compute attention themselves: facts about single classes, by name, and the test whether a class may be
one.
"""

from __future__ import annotations

import inspect
from functools import cache

from torch import nn


HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
"""What attention modules call the number of their query heads."""

UNSUPPORTED = {
    "BigBirdBlockSparseAttention": (
        "block-sparse attention, which the model itself replaces by another module as soon as an input is short: make the "
        "model with attention_type='original_full'"
    ),
    "BigBirdPegasusBlockSparseAttention": (
        "block-sparse attention, which the model itself replaces by another module as soon as an input is short: make the "
        "model with attention_type='original_full'"
    ),
    "NystromformerSelfAttention": "attention over landmarks, the means of segments, as soon as an input is long",
}
"""Modules whose models are refused, with what is computed there instead of attention over tokens."""

NOT_OVER_TOKENS = {
    "Inkling2BlockAttentionResidual",  # a token's mix of the outputs of earlier layers
}
"""Modules that compute the formula, but not over tokens."""

OTHER_SOFTMAXES = {
    "ConvBertSelfAttention": 1,  # over the kernel of its convolution
}
"""How many softmaxes a module takes beside that of attention."""

ALIBI = {"BloomAttention", "FalconAttention", "MptAttention"}
"""
Modules whose ALiBi bias counts a key's position from the start or the end of the text. The paper (arXiv 2108.12409) counts
from the query, a difference that the softmax does not see: it is the same for a query's every key. A prefix sees it. It is
put at no distance from any query, which is to say, at that of the query itself, the nearest of the keys that it may see.
"""


@cache
def may_compute_attention(module_class: type[nn.Module]) -> bool:
    """Whether a class's own functions compute a softmax. [`InlineAttention`] decides whether it is attention's."""
    if module_class.__name__ in NOT_OVER_TOKENS:
        return False
    names = {"softmax", "Softmax", "scaled_dot_product_attention"}
    own_classes = [
        cls for cls in module_class.__mro__ if cls is not object and not cls.__module__.startswith("torch.")
    ]
    functions = [
        inspect.unwrap(item) for cls in own_classes for item in vars(cls).values() if inspect.isfunction(item)
    ]
    return any(names.intersection(function.__code__.co_names) for function in functions)
