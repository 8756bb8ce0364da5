"""How much of what attention gives comes from a prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .measuring import Attended, mean_over_queries


def prefix_contribution(model: nn.Module, adapter_name: str | None = None, **inputs: Any) -> dict[str, torch.Tensor]:
    """
    Measure how much of each head's output comes from the prefix, in one forward of the model without gradients and dropout.

    The output of attention is a sum, of what the prefix gives, `p`, and what the real tokens give, `x`. Per head, the contribution
    is the mean over the real queries of

        ‖p‖ / (‖p‖ + ‖x‖)

    It is 0 where the prefix gives nothing, 1/2 where both give as much, and 1 where all comes from the prefix. With λ the prefix's
    share of a joint softmax ([`prefix_attention_mass`]), p and x are

        decoupled:  silu(cap(s · Q P_Kᵀ)) P_V              Attention(Q, K, V)
        joint:      λ · softmax(s · Q P_Kᵀ) P_V            (1 - λ) · Attention(Q, K, V)
        gated:      tanh(gate) · softmax(s · Q P_Kᵀ) P_V   Attention(Q, K, V)

    With several active adapters p is the sum of what they give, or with `adapter_name` what this one does; x is what the real
    tokens give. x is computed as the output less what all prefixes give. Where the model's dtype is a short one, the contribution is
    right to about the precision of that dtype.

    Real are the queries that `attention_mask` does not mark as padding; in the decoder of an encoder-decoder model, those
    that `decoder_attention_mask` does not. Without a mask all are, and so are those of modules that read no text (of a
    vision tower).

    Args:
        model (`nn.Module`): A model with an adapter, of any form.
        adapter_name (`str`, *optional*): One of the active adapters; `None` means all of them together.
        inputs: The model's inputs. A cache among them is added to, as in any forward.

    Returns:
        `dict[str, torch.Tensor]`: By the attention module's name in the base model, the contribution in each query head, shape
        (query_heads,), on the CPU. It has the modules with an active prefix that the forward reaches.

    Raises:
        ValueError: If there is no active prefix, the adapter is not active, a mask does not tell which queries are real, or
            `adapter_names` gives the rows adapters of their own.

    Example:

    ```py
    >>> import torch
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, prefix_contribution

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig(num_virtual_tokens=10))
    >>> prefix_contribution(model, input_ids=torch.tensor([[5, 6, 7]]))  # before training
    {'model.layers.0.self_attn': tensor([0., 0., 0., 0.]), 'model.layers.1.self_attn': tensor([0., 0., 0., 0.])}

    ```
    """
    return mean_over_queries(_contribution, model, adapter_name, inputs)


def _contribution(attended: Attended) -> torch.Tensor:
    """The contribution to each query's output, (batch, query_heads, tokens); where nothing is given, 0."""
    given = torch.stack([part.output() for part in attended.measured]).sum(dim=0)
    of_real = attended.output.double() - given
    for other in attended.others:
        of_real = of_real - other.output()
    size = given.norm(dim=-1)
    return torch.where(size == 0.0, size, size / (size + of_real.norm(dim=-1)))
