"""How much attention a prefix draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .measuring import Attended, active_adapters, layers_to_measure, mean_over_queries


def prefix_attention_mass(model: nn.Module, adapter_name: str | None = None, **inputs: Any) -> dict[str, torch.Tensor]:
    """
    Measure how much attention the prefix draws, in one forward of the model without gradients and dropout.

    A decoupled prefix draws none: [`prefix_contribution`] measures all forms alike.

    Per head, the mass is the mean over the real queries of what the softmax gives to the prefix's positions,

        mean_q exp(lse_P - lse)

    with lse_P the log-sum-exp of a query's scores over the prefix, and lse that over all. It is computed from the scores
    of a chunk of queries at a time, in float32 at least; where the attention returns its weights (eager), from those. A
    prefix with a gate has a softmax of its own, and all of that is on the prefix: its mass is `|tanh(gate)|`, the factor that
    its attention is added with.

    Real are the queries that `attention_mask` does not mark as padding; in the decoder of an encoder-decoder model, those
    that `decoder_attention_mask` does not. Without a mask all are, and so are those of modules that read no text (of a
    vision tower).

    Args:
        model (`nn.Module`): A model with an adapter.
        adapter_name (`str`, *optional*): One of the active adapters; `None` means all of them together.
        inputs: The model's inputs. A cache among them is added to, as in any forward.

    Returns:
        `dict[str, torch.Tensor]`: By the attention module's name in the base model, the mass of each query head, shape
        (query_heads,), on the CPU. It has the modules with an active prefix that the forward reaches.

    Raises:
        ValueError: If there is no active prefix, the adapter is not active or decoupled, a mask does not tell which queries are real, or
            `adapter_names` gives the rows adapters of their own.

    Example:

    ```py
    >>> import torch
    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from peft_prefix_plus import PrefixPlusConfig, prefix_attention_mass

    >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> model = get_peft_model(model, PrefixPlusConfig(num_virtual_tokens=10, decoupled=False))
    >>> masses = prefix_attention_mass(model, input_ids=torch.tensor([[5, 6, 7]]))
    >>> {name: tuple(mass.shape) for name, mass in masses.items()}
    {'model.layers.0.self_attn': (4,), 'model.layers.1.self_attn': (4,)}

    ```
    """
    for name, layer in layers_to_measure(model, adapter_name).items():
        decoupled = [each for each in active_adapters(layer, adapter_name) if layer.is_decoupled[each]]
        if decoupled:
            raise ValueError(
                f"Adapter {decoupled[0]!r} is decoupled: its prefix in {name} has no part in a softmax, and so no share of the "
                "attention. Use prefix_contribution, or name another adapter."
            )
    return mean_over_queries(_mass, model, adapter_name, inputs)


def _mass(attended: Attended) -> torch.Tensor:
    """The mass of each query, (batch, query_heads, tokens)."""
    return torch.stack([part.mass() for part in attended.measured]).sum(dim=0)
