"""Attention with a prefix in modules that compute attention themselves, without transformers' attention interface.

Older modules compute attention step by step: a product of queries and keys, scaling, biases and masks, a softmax, a
product with the values. While such a module runs, and in it alone, PyTorch passes its operations to
[`InlineAttention`], which follows the scores from the first product to the last. Nothing changes up to the softmax.
There the prefix's own scores, with the same scaling and no bias, join the scores of the real tokens. The product of
the prefix's probabilities and values is added to the last product. The module's own masks, position biases, ALiBi and
cache are not affected.

An operation on the scores that is not known here ends this, and the module cannot have a prefix. The probe finds this
out before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .added import added_attention
from .call import AttentionCall
from .concatenated import concatenated_attention
from .inline_classes import ALIBI, HEAD_COUNTS, OTHER_SOFTMAXES
from .masks import finite_additive
from .observed import Observation, Observer, prefix_probabilities
from .operations import (
    BIASES,
    PROBABILITY_KEEPING,
    PRODUCTS,
    RESHAPES,
    TRANSPOSES,
    operands,
    operation_name,
    scalar_factor,
)
from .prefix import ActivePrefixes, Prefix


PrefixSource = Callable[[torch.Tensor, torch.Tensor], ActivePrefixes]
"""Called with keys (batch, kv_heads, kv_tokens, key_dim) and values: the joint prefix, and those added to it."""


@dataclass(frozen=True)
class Scores:
    """
    Scores of real tokens, followed up to the softmax.

    Attributes:
        query (`torch.Tensor`): Shape (batch, query_heads, tokens, key_dim) or (batch · query_heads, tokens, key_dim).
        key (`torch.Tensor`): The keys, transposed: (batch, kv_heads, key_dim, kv_tokens), or with merged heads.
        scale (`float` or `torch.Tensor`): The factor on the product of the two so far.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: Any


@dataclass(frozen=True)
class Probabilities:
    """
    The result of the softmax over scores.

    Attributes:
        scores (`Scores`): The scores.
        of_prefix (`torch.Tensor`, *optional*): Probabilities of the prefix, (…, tokens, prefix_tokens).
        prefix (`Prefix`, *optional*): The prefix that shares the softmax with the real tokens.
        added (`tuple[Prefix, ...]`): The prefixes that do not share its softmax.
    """

    scores: Scores
    of_prefix: torch.Tensor | None = None
    prefix: Prefix | None = None
    added: tuple[Prefix, ...] = ()


class InlineAttention(TorchFunctionMode):
    """
    Follows the scores through the operations of one forward of one module, and lets prefixes take part.

    Args:
        module (`nn.Module`): The module.
        source (`PrefixSource`, *optional*): Where prefixes come from. Without it, what is computed stays the same.
        observe (`Observer`, *optional*): Told what the prefixes give.

    Attributes:
        attended (`list`): For every computation of attention that was followed to its end, the queries (batch,
            query_heads, tokens, key_dim), keys (batch, kv_heads, kv_tokens, key_dim), values, and the factor on the
            scores.
        num_softmaxes (`int`): How many softmaxes were computed.
        lost_at (`list[str]`): The operations at which scores could not be followed further.
        is_over (`bool`): Whether the forward has ended. From then on nothing is followed.
    """

    def __init__(self, module: nn.Module, source: PrefixSource | None = None, observe: Observer | None = None) -> None:
        super().__init__()
        self.module = module
        self.source = source
        self.observe = observe
        self.attended: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]] = []
        self.num_softmaxes = 0
        self.lost_at: list[str] = []
        self.is_over = False
        # by id, with the tensors themselves: an id must not be given to another tensor meanwhile
        self._followed: dict[int, tuple[torch.Tensor, Scores | Probabilities]] = {}
        self._factors: dict[int, tuple[torch.Tensor, Any]] = {}

    def is_complete(self) -> bool:
        """Whether the module computed attention once, and nothing else with a softmax."""
        others = OTHER_SOFTMAXES.get(type(self.module).__name__, 0)
        return len(self.attended) == 1 and self.num_softmaxes == 1 + others

    def obstacle(self) -> str:
        """Why the module's attention, if it has any, could not be followed."""
        if self.lost_at:
            return f"its products go through {', '.join(dict.fromkeys(self.lost_at))}"
        return f"of its softmaxes, {self.num_softmaxes} in all, {len(self.attended)} are of the attention formula"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_over:
            return func(*args, **kwargs)
        name = operation_name(func)
        if name in PRODUCTS:
            return self._product(name, func, args, kwargs)
        if name == "softmax":
            return self._softmax(func, args, kwargs)
        if name == "scaled_dot_product_attention":
            return self._scaled_dot_product_attention(func, *args, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            sources = {id(item): item for item in (*args, *kwargs.values()) if id(item) in self._followed}
            if len(sources) == 1:
                return self._follow(name, func, args, kwargs, next(iter(sources.values())), result)
            self._keep_factor(name, args, result)
        return result

    # ------------------------------------------------------------------------------------------------ following

    def _remember(self, tensor: torch.Tensor, state: Scores | Probabilities) -> None:
        self._followed[id(tensor)] = (tensor, state)

    def _follow(
        self, name: str, func: Any, args: Any, kwargs: Any, source: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """Record what the result of an operation on scores or probabilities is, if it is still one of them."""
        state = self._followed[id(source)][1]
        has_their_keys = result.shape[-1:] == source.shape[-1:]  # a maximum over all of them has no dims
        if result is source:
            del self._followed[id(source)]
        if isinstance(state, Probabilities):
            if name == "dropout" and args and args[0] is source:
                if state.of_prefix is not None:
                    # with the same scaling, and a choice of its own, as each probability has
                    state = replace(state, of_prefix=func(state.of_prefix, *args[1:], **kwargs))
                self._remember(result, state)
            elif name in PROBABILITY_KEEPING and has_their_keys:
                self._remember(result, state)
        elif has_their_keys and result.numel() == source.numel():
            factor = scalar_factor(name, args)
            if factor is not None:
                self._remember(result, replace(state, scale=state.scale * factor))
            elif name in BIASES or name in RESHAPES:
                self._remember(result, state)
            elif name not in TRANSPOSES:  # as is done to products that are no scores: the output
                self.lost_at.append(name)
        elif name not in TRANSPOSES:
            self.lost_at.append(name)
        return result

    def _keep_factor(self, name: str, args: Any, result: torch.Tensor) -> None:
        """Some modules scale the keys instead of the scores: remember the number that a tensor was multiplied with."""
        entry = self._factors.get(id(args[0])) if args else None
        factor = scalar_factor(name, args)
        if factor is not None:
            self._factors[id(result)] = (result, factor if entry is None else entry[1] * factor)
        elif entry is not None and (name in RESHAPES or name in TRANSPOSES):
            self._factors[id(result)] = (result, entry[1])

    # ------------------------------------------------------------------------------------------------ the formula

    def _product(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        left, right = operands(name, args, kwargs)
        if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
            return result
        state = self._followed.get(id(left), (None, None))[1]
        if isinstance(state, Probabilities):
            return self._attend(state, right, result)
        is_parameter = isinstance(left, nn.Parameter) or isinstance(right, nn.Parameter)
        if left.dim() == right.dim() == result.dim() and left.dim() in (3, 4) and not is_parameter:
            factor = self._factors.get(id(right), (None, 1.0))[1]
            self._remember(result, Scores(left, right, kwargs.get("alpha", 1.0) * factor))
        return result

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute the softmax over the scores of [P ; X], and return the probabilities of X."""
        self.num_softmaxes += 1
        scores, *rest = args if args else (kwargs.pop("input"),)
        state = self._followed.get(id(scores), (None, None))[1]
        dim = kwargs.get("dim", rest[0] if rest else None)
        if not isinstance(state, Scores) or dim not in (-1, scores.dim() - 1):
            return func(scores, *rest, **kwargs)
        key = self._heads_apart(state.key).transpose(-1, -2)
        prefix, added = (None, ()) if self.source is None else self.source(key, key)
        of_prefix = None
        if prefix is None:
            of_real = func(scores, *rest, **kwargs)
        else:
            prefix_scores = self._prefix_scores(state, prefix, scores)
            length = prefix_scores.shape[-1]
            of_all = func(torch.cat([prefix_scores, scores], dim=-1), *rest, **kwargs)
            of_prefix, of_real = of_all[..., :length], of_all[..., length:]
        self._remember(of_real, Probabilities(state, of_prefix, prefix, added))
        return of_real

    def _prefix_scores(self, state: Scores, prefix: Prefix, scores: torch.Tensor) -> torch.Tensor:
        """s · Q P_Kᵀ, (…, tokens, prefix_tokens), in the shape and dtype of the real tokens' scores."""
        query = self._heads_apart(state.query)
        prefix_scores = query @ prefix.key.to(query.dtype).transpose(-1, -2) * state.scale
        if type(self.module).__name__ in ALIBI:
            bias = (
                scores.reshape(*query.shape[:-1], scores.shape[-1])
                - query @ self._heads_apart(state.key) * state.scale
            )
            prefix_scores = prefix_scores + _largest_bias(bias)
        if prefix.mask is not None:
            prefix_scores = prefix_scores + finite_additive(prefix.mask, prefix_scores.dtype)[:, None, None, :]
        return prefix_scores.to(scores.dtype).reshape(*scores.shape[:-1], prefix.length)

    def _attend(self, state: Probabilities, value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add the prefix's part to the product of probabilities and real values."""
        query, key = self._heads_apart(state.scores.query), self._heads_apart(state.scores.key).transpose(-1, -2)
        self.attended.append((query, key, self._heads_apart(value), state.scores.scale))
        probabilities, added = None, []
        if state.prefix is not None and state.of_prefix is not None:
            probabilities = state.of_prefix.reshape(*query.shape[:-1], state.of_prefix.shape[-1])
            attended = probabilities @ state.prefix.value.to(probabilities.dtype)
            output = output + attended.to(output.dtype).reshape(output.shape)
        for each in state.added:
            attended = added_attention(query, each.to(query, value), state.scores.scale).transpose(1, 2)
            output = output + attended.to(output.dtype).reshape(output.shape)
            added.append((each, attended))
        if self.observe is not None and (probabilities is not None or added):
            by_heads = output.reshape(*query.shape[:-1], -1)
            self.observe(Observation(by_heads, state.prefix, probabilities, tuple(added)))
        return output

    def _scaled_dot_product_attention(
        self,
        func: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The formula in one call, (batch, heads, tokens, dim): with a prefix, by concatenation."""
        self.num_softmaxes += 1
        self.attended.append((query, key, value, query.shape[-1] ** -0.5 if scale is None else scale))
        prefix, added_prefixes = (None, ()) if self.source is None else self.source(key, value)
        probabilities, added = None, []

        def attend(module: nn.Module, *tensors: torch.Tensor | None, is_causal: bool = False) -> Any:
            return func(*tensors, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **kwargs), None

        if prefix is None:
            output = attend(self.module, query, key, value, attn_mask, is_causal=is_causal)[0]
        else:
            if attn_mask is not None and attn_mask.is_floating_point() and type(self.module).__name__ in ALIBI:
                attn_mask = attn_mask - _largest_bias(attn_mask)  # so that the prefix's bias of zero is the largest
            options = {"is_causal": is_causal}
            call = AttentionCall("sdpa", func, self.module, query, key, value, attn_mask, prefix, query, options)
            output = concatenated_attention(lambda *tensors, **_: attend(*tensors), call)[0]
            if self.observe is not None:
                probabilities = prefix_probabilities(query, key, prefix, query, attn_mask, is_causal, scale)
        for each in added_prefixes:
            attended = added_attention(query, each, scale).transpose(1, 2)
            output = output + attended
            added.append((each, attended))
        if self.observe is not None and (prefix is not None or added):
            self.observe(Observation(output, prefix, probabilities, tuple(added)))
        return output

    def _heads_apart(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring (batch · heads, …) to (batch, heads, …)."""
        if tensor.dim() == 4:
            return tensor
        counts = (getattr(self.module, name, None) for name in HEAD_COUNTS)
        heads = next((count for count in counts if isinstance(count, int)), 1)
        return tensor.unflatten(0, (-1, heads))


def _largest_bias(bias: torch.Tensor) -> torch.Tensor:
    """The largest bias of each query's keys (…, tokens, 1), and zero where a query sees none."""
    largest = bias.detach().amax(dim=-1, keepdim=True)
    return largest.masked_fill(largest < torch.finfo(bias.dtype).min / 2, 0.0)
