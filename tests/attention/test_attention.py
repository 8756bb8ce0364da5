"""The attention itself: both ways of computing it against the formula in float64."""

from __future__ import annotations

import types

import pytest
import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

from peft_prefix_plus.attention import AttentionCall, Prefix, dispatch
from peft_prefix_plus.attention.config_view import ConfigView


BATCH, HEADS, KV_HEADS, DIM, LENGTH = 2, 4, 2, 8, 5

# float32 sums of a few hundred products of numbers around 1 keep about six digits; bfloat16 keeps about three.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def formula(query, key, value, prefixes, scale, visible, bias=None):
    """softmax(s · Q [P_K ; K]ᵀ + mask) [P_V ; V] in float64; `visible` is (batch, tokens, kv_tokens), bool."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    for prefix in reversed(prefixes):
        key = torch.cat([prefix.key.double().expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix.value.double().expand(batch, -1, -1, -1), value], dim=2)
    columns = []
    for prefix in prefixes:
        length = prefix.key.shape[1]
        sees = torch.ones(batch, length, dtype=torch.bool) if prefix.mask is None else prefix.mask
        columns.append(sees[:, None, :].expand(-1, tokens, -1))
    visible = torch.cat([*columns, visible], dim=-1)
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2) * scale
    if bias is not None:
        scores[..., -bias.shape[-1] :] += bias.double()
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    return (scores.softmax(-1) @ value.repeat_interleave(groups, dim=1)).transpose(1, 2)


class Attention(torch.nn.Module):
    """As much of an attention module as an attention function sees, with given prefixes."""

    def __init__(self, implementation, prefixes, is_causal=True):
        super().__init__()
        self.config = ConfigView(types.SimpleNamespace(_attn_implementation=implementation), "prefix_plus")
        self.num_key_value_groups = HEADS // KV_HEADS
        self.is_causal = is_causal
        joined = None
        if prefixes:
            mask = prefixes[0].mask
            joined = Prefix(torch.cat([p.key for p in prefixes], 1), torch.cat([p.value for p in prefixes], 1), mask)
        self.prefix_plus = _Layer(lambda key, value: (joined and joined.to(key, value), ()))

    def attend(self, query, key, value, mask=None, **kwargs):
        return dispatch.prefix_attention(self, query, key, value, mask, **kwargs)


class _Layer(torch.nn.Module):
    """As much of a [`PrefixPlusLayer`] as the dispatch sees: a child module with these two attributes."""

    def __init__(self, forward):
        super().__init__()
        self.forward, self.eager_attention = forward, eager_attention_forward


def tensors(tokens=7, kv_tokens=None, key_dim=DIM, value_dim=DIM, dtype=torch.float32, prefixes=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    kv_tokens = tokens if kv_tokens is None else kv_tokens
    query = normal(BATCH, tokens, HEADS, key_dim).transpose(1, 2)
    key = normal(BATCH, KV_HEADS, kv_tokens, key_dim)
    value = normal(BATCH, KV_HEADS, kv_tokens, value_dim)
    made = [
        Prefix(normal(KV_HEADS, LENGTH + i, key_dim), normal(KV_HEADS, LENGTH + i, value_dim)) for i in range(prefixes)
    ]
    return query, key, value, made


def causal(tokens, kv_tokens):
    offset = kv_tokens - tokens
    return torch.ones(tokens, kv_tokens, dtype=torch.bool).tril(offset).expand(BATCH, -1, -1)


def additive(visible, dtype=torch.float32):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


@pytest.fixture(params=["fused", "concatenated"])
def way(request, monkeypatch):
    """Each way of computing sdpa attention, and proof that it is the one that ran."""
    called = []
    if request.param == "concatenated":
        monkeypatch.setattr(dispatch, "why_concatenate", lambda *args: "the test")
    for name in ("fused_attention", "concatenated_attention"):
        original = getattr(dispatch, name)

        def spy(*args, original=original, name=name, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(dispatch, name, spy)
    yield request.param
    assert set(called) == {f"{request.param}_attention"}


SDPA_CASES = {
    "causal, no mask": ({}, lambda dtype: None, lambda: causal(7, 7)),
    "bidirectional, no mask": ({"is_causal": False}, lambda dtype: None, lambda: torch.ones(BATCH, 7, 7).bool()),
    "a bool mask": ({}, lambda dtype: padded(7, 7)[:, None], lambda: padded(7, 7)),
    "a mask shared by the rows": ({}, lambda dtype: causal(7, 7)[:1, None], lambda: causal(7, 7)),
    "an additive mask": ({}, lambda dtype: additive(padded(7, 7), dtype)[:, None], lambda: padded(7, 7)),
    "-inf in the mask": (
        {},
        lambda dtype: torch.zeros(BATCH, 1, 7, 7, dtype=dtype).masked_fill(~padded(7, 7)[:, None], -torch.inf),
        lambda: padded(7, 7),
    ),
}


def padded(tokens, kv_tokens):
    """A causal mask whose first row is padded on the left: its first queries see no real token at all."""
    visible = causal(tokens, kv_tokens).clone()
    visible[0, :, :2] = False
    return visible


@pytest.mark.parametrize("case", SDPA_CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prefixes", [1, 2])
def test_sdpa_with_a_prefix_is_the_formula(way, case, dtype, prefixes):
    kwargs, make_mask, make_visible = SDPA_CASES[case]
    query, key, value, made = tensors(dtype=dtype, prefixes=prefixes)
    output, _ = Attention("sdpa", made).attend(query, key, value, make_mask(dtype), scaling=0.3, **kwargs)
    expected = formula(query, key, value, made, 0.3, make_visible())
    assert output.dtype == dtype and output.is_contiguous()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=TOLERANCE[dtype] * 3)


@pytest.mark.parametrize("tokens, kv_tokens", [(1, 1), (1, 9), (4, 9)])
def test_queries_after_cached_keys_are_the_formula(way, tokens, kv_tokens):
    query, key, value, made = tensors(tokens, kv_tokens)
    mask = None if tokens == 1 else causal(tokens, kv_tokens)[:, None]
    output, _ = Attention("sdpa", made).attend(query, key, value, mask, scaling=0.3)
    expected = formula(query, key, value, made, 0.3, causal(tokens, kv_tokens))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def test_the_unused_rest_of_a_static_cache_is_not_seen(way):
    query, key, value, made = tensors(4, 9)
    output, _ = Attention("sdpa", made).attend(query, key, value, None, scaling=0.3)
    expected = formula(query, key[:, :, :4], value[:, :, :4], made, 0.3, causal(4, 4))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("key_dim, value_dim", [(12, 8), (8, 8)])
def test_values_may_be_narrower_than_keys(way, key_dim, value_dim):
    query, key, value, made = tensors(key_dim=key_dim, value_dim=value_dim)
    output, _ = Attention("sdpa", made).attend(query, key, value, None)
    expected = formula(query, key, value, made, key_dim**-0.5, causal(7, 7))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def test_rows_may_see_parts_of_the_prefix(way):
    query, key, value, (prefix,) = tensors()
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 2:] = False
    made = [Prefix(prefix.key, prefix.value, mask)]
    for attention_mask, visible in ((None, causal(7, 7)), (padded(7, 7)[:, None], padded(7, 7))):
        output, _ = Attention("sdpa", made).attend(query, key, value, attention_mask, scaling=0.3)
        expected = formula(query, key, value, made, 0.3, visible)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def assert_gradients(attend, leaves, expected):
    """The gradients of `attend(*leaves)`, in float64, are those of what is expected, and finite differences agree."""
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    gradients = torch.autograd.grad((attend(*leaves) * weights).sum(), leaves)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)
    assert torch.autograd.gradcheck(attend, leaves, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("value_dim", [DIM, DIM - 2])
def test_gradients_are_the_formulas(way, masked, by_row, value_dim):
    query, key, value, (prefix,) = tensors(dtype=torch.float64, value_dim=value_dim)
    leaves = [tensor.contiguous().requires_grad_() for tensor in (query, key, value, prefix.key, prefix.value)]
    visible = padded(7, 7) if masked else causal(7, 7)
    mask = visible[:, None] if masked else None
    prefix_mask = torch.tensor([[True] * LENGTH, [True, False] * 2 + [False]]) if by_row else None

    def attend(query, key, value, prefix_key, prefix_value):
        made = [Prefix(prefix_key, prefix_value, prefix_mask)]
        return Attention("sdpa", made).attend(query, key, value, mask, scaling=0.3)[0]

    expected = formula(*leaves[:3], [Prefix(*leaves[3:], prefix_mask)], 0.3, visible)
    assert_gradients(attend, leaves, expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_gradients_in_low_precision_are_close_to_the_formulas(way, dtype, tolerance):
    query, key, value, (prefix,) = tensors(tokens=64, dtype=dtype)
    low = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value, prefix.key, prefix.value)]
    high = [tensor.detach().double().requires_grad_() for tensor in low]
    output, _ = Attention("sdpa", [Prefix(*low[3:])]).attend(*low[:3], None, scaling=0.3)
    expected = formula(*high[:3], [Prefix(*high[3:])], 0.3, causal(64, 64))
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((output * weights.to(dtype)).sum(), low)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * weights).sum(), high), strict=True):
        # relative to the largest entry: sums over 64 tokens are larger than 1
        assert (gradient.double() - reference).abs().max() <= tolerance * reference.abs().max().clamp(min=1)


def test_only_the_gradients_asked_for_are_computed(way):
    query, key, value, (prefix,) = tensors()
    prefix.key.requires_grad_()
    output, _ = Attention("sdpa", [prefix]).attend(query, key, value)
    output.sum().backward()
    assert prefix.key.grad is not None and prefix.value.grad is None and query.grad is None


def test_the_attention_can_be_used_twice_in_one_graph(way):
    query, key, value, (prefix,) = tensors(dtype=torch.float64)
    prefix.key.requires_grad_()

    def twice(prefix_key):
        attention = Attention("sdpa", [Prefix(prefix_key, prefix.value)])
        once = attention.attend(query, key, value)[0].transpose(1, 2)
        return attention.attend(once, key, value)[0]

    assert torch.autograd.gradcheck(twice, [prefix.key], atol=1e-6)


EAGER_CASES = {
    "no mask": (lambda: None, lambda: torch.ones(BATCH, 7, 7).bool()),
    "an additive mask": (lambda: additive(padded(7, 7))[:, None], lambda: padded(7, 7)),
}


@pytest.mark.parametrize("case", EAGER_CASES)
@pytest.mark.parametrize("prefixes", [1, 2])
def test_eager_with_a_prefix_is_the_formula_and_returns_its_weights(case, prefixes):
    make_mask, make_visible = EAGER_CASES[case]
    query, key, value, made = tensors(prefixes=prefixes)
    output, weights = Attention("eager", made).attend(query, key, value, make_mask(), scaling=0.3)
    expected = formula(query, key, value, made, 0.3, make_visible())
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    length = sum(prefix.key.shape[1] for prefix in made)
    assert weights.shape == (BATCH, HEADS, 7, length + 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, HEADS, 7))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_relative_position_bias_is_zero_for_the_prefix(implementation):
    query, key, value, made = tensors()
    bias = torch.randn(1, HEADS, 7, 7)
    mask = padded(7, 7)[:, None]
    if implementation == "eager":
        # eager functions with a bias add it to the mask themselves; transformers' T5 does so in its own file
        from transformers.models.t5.modeling_t5 import eager_attention_forward as attend

        module = Attention(implementation, made)
        module.prefix_plus.eager_attention = attend
        key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
        made = [Prefix(*(tensor.repeat_interleave(2, dim=0) for tensor in (made[0].key, made[0].value)))]
        module = Attention(implementation, made)
        module.prefix_plus.eager_attention = attend
        module.num_key_value_groups = 1
        output, _ = module.attend(query, key, value, additive(mask), scaling=0.3, position_bias=bias)
    else:
        output, _ = Attention(implementation, made).attend(query, key, value, mask, scaling=0.3, position_bias=bias)
    expected = formula(query, key, value, made, 0.3, padded(7, 7), bias)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def test_without_a_prefix_the_base_implementation_is_called_as_it_is():
    query, key, value, _ = tensors()
    module = Attention("sdpa", [])
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.equal(module.attend(query, key, value)[0], expected.transpose(1, 2))


@pytest.mark.parametrize("name", ["made_up", None])
def test_an_implementation_whose_mask_is_not_known_is_an_error(name):
    query, key, value, made = tensors()
    with pytest.raises(ValueError, match=r"made_up|''.*'sdpa'"):
        Attention(name, made).attend(query, key, value)


def is_fused(implementation="sdpa", **kwargs):
    """Whether a call with these arguments is computed by the fused way."""
    query, key, _, (prefix,) = tensors()
    call = AttentionCall(implementation, eager_attention_forward, None, query, key, None, None, prefix, query, kwargs)
    return dispatch.why_concatenate(call) is None


@pytest.mark.parametrize(
    "argument",
    [
        {"output_attentions": True},
        {"dropout": 0.1},
        {"position_bias": torch.zeros(1)},
        {"softcap": 30.0},
        {"s_aux": torch.zeros(HEADS)},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_the_fused_way_is_left_where_it_would_differ(argument):
    assert not is_fused(**argument)


def test_the_fused_way_is_for_sdpa_alone():
    assert is_fused("sdpa") and not is_fused("eager")


@pytest.mark.parametrize(
    "arguments",
    [{"output_attentions": False}, {"dropout": 0.0}, {"position_bias": None}, {"softcap": None}, {"scaling": 2.0}],
    ids=str,
)
def test_arguments_that_ask_for_nothing_leave_the_fused_way(arguments):
    assert is_fused(**arguments)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_with_torch_jit_takes_the_concatenating_way(monkeypatch):
    def refuse(*args):
        raise AssertionError("the fused way was traced")

    query, key, value, made = tensors(7)
    module = Attention("sdpa", made)

    def attend(query, key, value):
        return module.attend(query, key, value, scaling=0.3)[0]

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "fused_attention", refuse)
        traced = torch.jit.trace(attend, (query, key, value), check_trace=False)
    query, key, value, _ = tensors(11, seed=1)
    expected = formula(query, key, value, made, 0.3, causal(11, 11))
    torch.testing.assert_close(traced(query, key, value).double(), expected, rtol=0, atol=1e-5)


def test_autocast_is_followed_as_sdpa_follows_it(way):
    query, key, value, made = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = Attention("sdpa", made).attend(query, key, value, None, scaling=0.3)
    assert output.dtype == torch.bfloat16
    expected = formula(query, key, value, made, 0.3, causal(7, 7))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-2)


def window(tokens, kv_tokens, size):
    """A causal sliding window: a query sees `size` keys, itself the last of them."""
    offset = kv_tokens - tokens
    ones = torch.ones(tokens, kv_tokens, dtype=torch.bool)
    return (ones.tril(offset) & ~ones.tril(offset - size)).expand(BATCH, -1, -1)


@pytest.fixture
def flash(monkeypatch):
    """In the place of flash attention's kernel, what it promises, in float64; the calls are noted."""
    calls = []

    def kernel(query, key, value, attention_mask, query_length, is_causal, softmax_scale, sliding_window, **kwargs):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        calls.append((attention_mask, sliding_window, kwargs["attn_implementation"]))
        tokens, kv_tokens = query.shape[2], key.shape[2]
        visible = causal(tokens, kv_tokens) if is_causal else torch.ones(BATCH, tokens, kv_tokens).bool()
        if sliding_window is not None and kv_tokens > sliding_window:
            visible = visible & window(tokens, kv_tokens, sliding_window)
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, :].bool()
        return formula(query, key, value, [], softmax_scale, visible[: len(query)]).to(query.dtype)

    from transformers.integrations import flash_attention

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda query, module: None)
    return calls


def padding_mask():
    mask = torch.ones(BATCH, 9, dtype=torch.long)
    mask[0, :2] = 0
    return mask


@pytest.mark.parametrize("tokens", [1, 4, 9])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_flash_attention_gets_the_prefix_before_its_keys(flash, tokens, masked, is_causal):
    query, key, value, made = tensors(tokens, 9)
    mask = padding_mask() if masked else None
    module = Attention("flash_attention_2", made, is_causal)
    output, _ = module.attend(query, key, value, mask, scaling=0.3)
    visible = causal(tokens, 9) if is_causal else torch.ones(BATCH, tokens, 9).bool()
    if masked:
        visible = visible & mask[:, None, :].bool()
        query_is_real = mask[:, -tokens:].bool()
    else:
        query_is_real = torch.ones(BATCH, tokens).bool()
    expected = formula(query, key, value, made, 0.3, visible)
    torch.testing.assert_close(output.double()[query_is_real], expected[query_is_real], rtol=0, atol=1e-5)
    ((seen_mask, _, implementation),) = flash
    assert implementation == "flash_attention_2"  # the kernel is looked up by the model's own name
    assert seen_mask is None if not masked else seen_mask.shape == (BATCH, 9 + LENGTH)
    assert type(module.config) is ConfigView


def test_flash_attentions_config_is_no_state_of_the_module(flash, monkeypatch):
    """While a kernel runs, another thread may call the same module."""
    from transformers.integrations import flash_attention

    query, key, value, made = tensors()
    module = Attention("flash_attention_2", made)
    view, kernel, seen = module.config, flash_attention._flash_attention_forward, []
    monkeypatch.setattr(
        flash_attention, "_flash_attention_forward", lambda *a, **kw: seen.append(module.config) or kernel(*a, **kw)
    )
    module.attend(query, key, value, None, scaling=0.3)
    assert len(seen) == 1 and seen[0] is view


@pytest.mark.parametrize("tokens", [1, 4, 9])
@pytest.mark.parametrize("size", [3, 9, 14])
@pytest.mark.parametrize("masked", [False, True])
def test_a_prefix_is_seen_beyond_flash_attentions_sliding_window(flash, tokens, size, masked):
    query, key, value, made = tensors(tokens, 9)
    mask = padding_mask() if masked else None
    output, _ = Attention("flash_attention_2", made).attend(query, key, value, mask, scaling=0.3, sliding_window=size)
    visible = window(tokens, 9, size)
    if masked:
        visible = visible & mask[:, None, :].bool()
    expected = formula(query, key, value, made, 0.3, visible)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    assert len(flash) == (size >= 9 + LENGTH)  # the kernel itself can be used only while all fits into the window


@pytest.mark.parametrize("by", ["position_ids", "cumulative lengths"])
@pytest.mark.parametrize("size", [None, 2])
def test_every_packed_sequence_sees_the_prefix(flash, by, size):
    query, key, value, made = (tensor[:1] if torch.is_tensor(tensor) else tensor for tensor in tensors(9))
    lengths = [4, 2, 3]
    if by == "position_ids":
        kwargs = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
    else:
        starts = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
        kwargs = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 4, "max_length_k": 4}
    if size is not None:
        kwargs["sliding_window"] = size
    output, _ = Attention("flash_attention_2", made).attend(query, key, value, None, scaling=0.3, **kwargs)
    start = 0
    for length in lengths:
        part = [tensor[:, :, start : start + length] for tensor in (query, key, value)]
        visible = (causal(length, length) if size is None else window(length, length, size))[:1]
        expected = formula(*part, made, 0.3, visible)
        torch.testing.assert_close(output.double()[:, start : start + length], expected, rtol=0, atol=1e-5)
        start += length
    assert flash == []


def test_positions_that_only_start_late_are_not_packed(flash):
    query, key, value, made = (tensor[:1] if torch.is_tensor(tensor) else tensor for tensor in tensors(9))
    Attention("flash_attention_2", made).attend(
        query, key, value, None, scaling=1.0, position_ids=torch.arange(5, 14)[None]
    )
    assert len(flash) == 1


@pytest.mark.parametrize("extra", [{"softcap": 5.0}, {"s_aux": torch.randn(HEADS)}], ids=["softcap", "sinks"])
def test_flash_attention_with_a_window_keeps_soft_capping_and_sinks(flash, extra):
    if "softcap" in extra:
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as eager
    else:
        from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager
    query, key, value, made = tensors(9)
    outputs = []
    for implementation, mask in (("flash_attention_2", None), ("eager", additive(window(9, 9, 3))[:, None])):
        module = Attention(implementation, made)
        module.prefix_plus.eager_attention = eager
        if "s_aux" in extra:
            module.sinks = extra["s_aux"]
        kwargs = {**extra, "sliding_window": 3} if implementation != "eager" else extra
        outputs.append(module.attend(query, key, value, mask, scaling=0.3, **kwargs)[0])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)
    assert flash == []


@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention_with_a_prefix_is_the_formula(masked):
    from torch.nn.attention.flex_attention import create_block_mask

    query, key, value, made = tensors(7)
    first = torch.tensor([2, 0]) if masked else torch.tensor([0, 0])
    mask = create_block_mask(
        lambda b, h, q, kv: (kv <= q) & (kv >= first[b]), B=BATCH, H=None, Q_LEN=7, KV_LEN=7, device="cpu"
    )
    output, _ = Attention("flex_attention", made).attend(query, key, value, mask, scaling=0.3)
    expected = formula(query, key, value, made, 0.3, padded(7, 7) if masked else causal(7, 7))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
