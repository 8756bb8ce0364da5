"""Attention as the base model computes it."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .call import AttentionFunction, AttentionOutput
from .config_view import with_model_config


def attend_as_base(
    module: Any, *args: Any, implementation: str | None, eager: AttentionFunction, **kwargs: Any
) -> AttentionOutput:
    """Call an attention implementation as the base model would; `eager` is the function in the module's own file."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)  # type: ignore[arg-type]
    if implementation is not None and is_flash_attention_requested(requested_attention_implementation=implementation):
        module = with_model_config(module)  # flash attention looks its kernel up by the name in the config
    return function(module, *args, **kwargs)


def attention_family(name: str | None) -> str:
    """
    Return the family of attention implementations that a name belongs to. Their masks differ.

    - `"eager"`: an additive mask; without one, all is seen.
    - `"sdpa"`: a bool or additive mask; without one, a causal module's queries see the keys up to their own.
    - `"flash"`: a 2-D mask of padding; the rest is derived from lengths (see [`FlashMask`]).
    - `"flex"`: a block mask.

    Raises:
        ValueError: If the name belongs to none, because its mask format is unknown.
    """
    name = (name or "").removeprefix("paged|")
    if name in ("eager", "sdpa"):
        return name
    if name == "flex_attention":
        return "flex"
    if is_flash_attention_requested(requested_attention_implementation=name):
        return "flash"
    raise ValueError(
        f"PREFIX_PLUS cannot add a prefix to the attention implementation {name!r}: how it reads its mask is not known. "
        "Use 'sdpa', 'eager', 'flex_attention' or a flash attention, for instance model.set_attn_implementation('sdpa')."
    )


def eager_attention_function(module_class: type[nn.Module]) -> AttentionFunction:
    """
    Return the eager attention function in the file of an attention module's class, which the class falls back on. A
    few classes have none and use only the functions that transformers registers; for these, the returned function
    raises a `ValueError`.
    """
    forward = inspect.unwrap(module_class.forward)
    for name in forward.__code__.co_names:
        if name.endswith("eager_attention_forward"):
            return forward.__globals__[name]
    return partial(_no_eager_attention, module_class.__name__)


def _no_eager_attention(name: str, *args: Any, **kwargs: Any) -> AttentionOutput:
    raise ValueError(f'{name} has no eager attention. Load the model with attn_implementation="sdpa".')
