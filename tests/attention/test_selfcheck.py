"""Kernels are tried before they are used: a wrong one is found, named once and replaced by the reference."""

from __future__ import annotations

import threading
import time
import types
import warnings

import pytest
import torch
from models import output_of, prefixed, tiny_model, token_ids
from test_attention import DIM, Attention, causal, formula, tensors
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peft_prefix_plus.attention import dispatch, kernels, selfcheck


CPU = torch.device("cpu")


class WrongOutput(kernels.CpuFlashKernel):
    def forward(self, *args):
        output, lse, state = super().forward(*args)
        return output * 1.1, lse, state


class WrongLogSumExp(kernels.CpuFlashKernel):
    """To base 2, as some kernels compute it inside."""

    def forward(self, *args):
        output, lse, state = super().forward(*args)
        return output, lse / 0.6931, state


class NotANumber(kernels.CpuFlashKernel):
    def forward(self, *args):
        output, lse, state = super().forward(*args)
        return output.index_fill(2, torch.tensor([0]), float("nan")), lse, state


class SeesPadding(kernels.CpuFlashKernel):
    def forward(self, query, key, value, mask, is_causal, scale):
        return super().forward(query, key, value, None, is_causal, scale)


class SeesTheFuture(kernels.CpuFlashKernel):
    def forward(self, query, key, value, mask, is_causal, scale):
        return super().forward(query, key, value, mask, False, scale)


class WrongGradient(kernels.CpuFlashKernel):
    def backward(self, *args):
        grad_query, grad_key, grad_value = super().backward(*args)
        return grad_query, -grad_key, grad_value


class Raises(kernels.CpuFlashKernel):
    def forward(self, *args):
        raise TypeError("_flash() got an unexpected keyword argument 'scale'")


class RaisesInBackward(kernels.CpuFlashKernel):
    def backward(self, *args):
        raise RuntimeError("no kernel image is available")


BROKEN = {
    WrongOutput: "gives another output",
    WrongLogSumExp: "gives another output",
    NotANumber: "gives another output .* off by nan",
    SeesPadding: "gives another output",
    SeesTheFuture: "gives another output",
    WrongGradient: "gives another gradient of the keys",
    Raises: "raises TypeError: .*unexpected keyword argument 'scale'",
    RaisesInBackward: "raises RuntimeError: no kernel image",
}


@pytest.fixture
def install(monkeypatch):
    """Have a process in which nothing has been tried, and these kernels for the CPU."""
    monkeypatch.setattr(selfcheck, "_verdicts", {})

    def choose(*classes):
        monkeypatch.setattr(kernels, "KERNELS", {"cpu": tuple(each() for each in classes)})

    choose(kernels.CpuFlashKernel)
    return choose


@pytest.fixture
def trials(install, monkeypatch):
    """The kinds that were tried."""
    kinds = []
    outcome = selfcheck._outcome
    monkeypatch.setattr(selfcheck, "_outcome", lambda kind: kinds.append(kind) or outcome(kind))
    return kinds


def attend(tokens=7, requires_grad=False, **kwargs):
    """Attention with a prefix, and what it must be."""
    query, key, value, made = tensors(tokens)
    query.requires_grad_(requires_grad)
    output, _ = Attention("sdpa", made).attend(query, key, value, scaling=0.3, **kwargs)
    return output, formula(query, key, value, made, 0.3, causal(tokens, tokens)), query


def assert_right(output, expected):
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", BROKEN)
@pytest.mark.parametrize("training", [False, True])
def test_a_broken_kernel_is_named_once_and_the_reference_used(install, kernel, training):
    install(kernel)
    with pytest.warns(UserWarning, match=BROKEN[kernel]) as caught:
        results = [attend(requires_grad=training) for _ in range(3)]
    (warning,) = caught
    for part in (kernel.__name__, "cpu", "torch.float32", f"torch {torch.__version__}", selfcheck.SWITCH):
        assert part in str(warning.message)

    for output, expected, query in results:
        assert_right(output, expected)
        if training:
            gradients = [torch.autograd.grad(each.sum(), query, retain_graph=True)[0] for each in (output, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_the_next_kernel_takes_the_place_of_a_broken_one(install, monkeypatch):
    install(WrongGradient, kernels.CpuFlashKernel)
    monkeypatch.setattr(dispatch, "concatenated_attention", lambda *args, **kwargs: pytest.fail("not the fused way"))
    with pytest.warns(UserWarning, match="WrongGradient"):
        assert_right(*attend()[:2])


def test_a_whole_model_with_a_broken_kernel_gives_what_it_gives_without(install):
    model = prefixed(tiny_model(), task_type="CAUSAL_LM")
    inputs = {"input_ids": token_ids()}
    expected = output_of(model, **inputs)
    install(WrongLogSumExp)
    selfcheck._verdicts.clear()
    with pytest.warns(UserWarning, match="WrongLogSumExp") as caught:
        torch.testing.assert_close(output_of(model, **inputs), expected, rtol=1e-4, atol=1e-5)
    assert len(caught) == 1


def test_a_kernel_that_is_not_there_is_left_out_silently(install):
    class NotOffered(Raises):
        def is_offered(self, *args):
            return False

    install(NotOffered)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(*attend()[:2])


def test_a_kernel_is_tried_once_for_each_dtype_and_width_of_heads(trials):
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            for width in (8, 16):
                query, key, value, made = tensors(key_dim=width, value_dim=width, dtype=dtype)
                for tokens in (1, 7):
                    Attention("sdpa", made).attend(query[:, :, :tokens], key, value)
    kinds = [(kind.device, kind.dtype, kind.head_dim) for kind in trials]
    assert kinds == [(CPU, dtype, width) for dtype in (torch.float32, torch.bfloat16) for width in (8, 16)]


def test_the_trial_can_be_switched_off(install, monkeypatch):
    monkeypatch.setenv(selfcheck.SWITCH, "0")
    install(WrongOutput)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, expected, _ = attend()
    assert (output - expected).abs().max() > 1e-2


def test_a_trial_is_cheap(install):
    """By the processor's time, which other programs do not change."""
    seconds = []
    for _ in range(7):
        selfcheck._verdicts.clear()
        start = time.process_time()
        assert selfcheck.is_proven(kernels.CpuFlashKernel, CPU, torch.float32, 64)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


# -------------------------------------------------------------------------------------- what the caller does not see


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_a_users_modes_see_no_trial(trials, mode):
    seen = []
    for _ in range(2):
        with mode() as running:
            attend()
        seen.append(running.seen)
    assert len(trials) == 1
    assert seen[0] == seen[1] != []


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad, autocast])
def test_a_trial_changes_no_state_and_needs_none(trials, context):
    def state():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_dtype(),
        )

    random_state = torch.get_rng_state()
    with context():
        before = state()
        query, key, value, made = tensors()
        output, _ = Attention("sdpa", made).attend(query, key, value, scaling=0.3)
        assert state() == before
    assert len(trials) == 1
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(output.double(), formula(query, key, value, made, 0.3, causal(7, 7)), rtol=0, atol=3e-2)


@pytest.mark.parametrize("name", ["default device", "default dtype", "saved tensors hooks"])
def test_a_trial_is_right_under_what_the_caller_has_set(trials, name):
    if name == "default device":
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert selfcheck.is_proven(kernels.CpuFlashKernel, CPU, torch.float32, DIM)
    elif name == "default dtype":
        torch.set_default_dtype(torch.float64)
        try:
            assert selfcheck.is_proven(kernels.CpuFlashKernel, CPU, torch.float32, DIM)
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
        ):
            assert selfcheck.is_proven(kernels.CpuFlashKernel, CPU, torch.float32, DIM)
        assert packed == []


def test_many_threads_try_a_kernel_once(trials):
    barrier = threading.Barrier(8)
    outputs = [None] * 8

    def run(index):
        barrier.wait()
        outputs[index] = attend()[:2]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(outputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trials) == 1
    for output, expected in outputs:
        assert_right(output, expected)


def test_running_out_of_memory_says_nothing_of_the_kernel(install, monkeypatch):
    outcome = selfcheck._outcome

    def run_out(kind):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(selfcheck, "_outcome", run_out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(*attend()[:2])
    assert selfcheck._verdicts == {}
    monkeypatch.setattr(selfcheck, "_outcome", outcome)
    assert selfcheck.is_proven(kernels.CpuFlashKernel, CPU, torch.float32, DIM)


def test_an_interrupted_trial_is_repeated(install, monkeypatch):
    outcome = selfcheck._outcome

    def interrupt(kind):
        raise KeyboardInterrupt

    monkeypatch.setattr(selfcheck, "_outcome", interrupt)
    with pytest.raises(KeyboardInterrupt):
        attend()
    assert selfcheck._verdicts == {}
    monkeypatch.setattr(selfcheck, "_outcome", outcome)
    assert_right(*attend()[:2])
    assert list(selfcheck._verdicts.values()) == [True]


def test_nothing_is_tried_while_a_cuda_graph_is_captured(trials, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not selfcheck.is_proven(kernels.CudaFlashKernel, torch.device("cuda", 0), torch.bfloat16, 64)
    assert trials == [] and selfcheck._verdicts == {}


# ------------------------------------------------------------------------------------------------------ in a trace


class Recorder:
    """A backend of torch.compile that keeps the graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph


def operations(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("kernel", [kernels.CpuFlashKernel, WrongLogSumExp])
@pytest.mark.parametrize("dynamic", [None, True])
def test_what_is_compiled_first_is_tried_beside_the_trace(trials, install, kernel, dynamic):
    torch.compiler.reset()
    install(kernel)
    query, key, value, made = tensors()
    module = Attention("sdpa", made)
    recorder = Recorder()
    compiled = torch.compile(
        lambda *inputs: module.attend(*inputs, scaling=0.3)[0], fullgraph=True, backend=recorder, dynamic=dynamic
    )
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = compiled(query, key, value)
    assert_right(output, formula(query, key, value, made, 0.3, causal(7, 7)))
    assert len(trials) == 1
    is_broken = kernel is WrongLogSumExp
    assert [kernel.__name__ in str(each.message) for each in caught if each.category is UserWarning] == [
        True
    ] * is_broken
    (graph,) = recorder.graphs
    names = operations(graph)
    assert sum("flash_attention_for_cpu" in name for name in names) == (0 if is_broken else 2)
    assert len(names) < 40  # of one attention, and not of a trial's eight


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_holds_no_kernel_so_none_is_tried(trials, strict):
    query, key, value, made = tensors()

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention("sdpa", made)

        def forward(self, query, key, value):
            return self.attention.attend(query, key, value, scaling=0.3)[0]

    with torch.no_grad():
        program = torch.export.export(Module(), (query, key, value), strict=strict)
    assert not trials
    assert not any("flash_attention_for_cpu" in str(node.target) for node in program.graph.nodes)
    assert_right(program.module()(query, key, value), formula(query, key, value, made, 0.3, causal(7, 7)))


# ------------------------------------------------------------------------------------------- kernels of other devices

OTHER_KERNELS = [kernels.CudaFlashKernel, kernels.CudaEfficientKernel, kernels.XpuFlashKernel]


@pytest.mark.parametrize("kernel", OTHER_KERNELS)
@pytest.mark.parametrize("tokens", [1, 35])
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_of_other_devices_call_operators_that_there_are(kernel, tokens, masked):
    """On meta tensors, PyTorch checks the arguments of its operators, and says the shapes of the results."""
    if masked and kernel is not kernels.CudaEfficientKernel:
        pytest.skip("takes no mask")
    half = dict(dtype=torch.bfloat16, device="meta")
    query, key, value = torch.empty(2, 4, tokens, 64, **half), *(torch.empty(2, 2, 35, 64, **half) for _ in range(2))
    mask = torch.empty(2, 1, tokens, 35, **half) if masked else None
    is_causal = tokens > 1 and not masked
    assert kernel().supports(query, key, mask, is_causal)
    output, lse, state = kernel().forward(query, key, value, mask, is_causal, 0.3)
    assert output.shape == query.shape and lse.shape == (2, 4, tokens)
    gradients = kernel().backward(output, query, key, value, mask, is_causal, 0.3, output, lse, state)
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize("kernel", OTHER_KERNELS)
def test_kernels_of_other_devices_are_not_offered_here(kernel):
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("there is such a device")
    query, key, value, _ = tensors(key_dim=64, value_dim=64, dtype=torch.bfloat16)
    assert not kernel().is_offered(query, key, value)


class EfficientOperators:
    """The operators of memory-efficient attention as they are on CUDA and ROCm, by the formula: as many heads everywhere."""

    def __init__(self, lse_alignment):
        self.lse_alignment = lse_alignment
        self.kv_heads = set()

    def _scores(self, query, key, bias, is_causal, scale):
        assert query.shape[:2] == key.shape[:2]
        self.kv_heads.add((query.shape[2], key.shape[1]))
        scores = query @ key.transpose(-1, -2) * scale
        if bias is not None:
            assert bias.shape == scores.shape and bias.stride(-1) == 1 and bias.dtype == query.dtype
            assert all(stride % 16 == 0 for stride in bias.stride()[:-1])
            scores = scores + bias
        is_later = torch.ones(scores.shape[-2:]).triu(1).bool()
        return scores.masked_fill(is_later, -torch.inf) if is_causal else scores

    def _scaled_dot_product_efficient_attention(
        self, query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
    ):
        scores = self._scores(query, key, attn_bias, is_causal, scale)
        lse = scores.logsumexp(-1)
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % self.lse_alignment), value=float("nan"))
        return scores.softmax(-1) @ value, lse, torch.tensor(0), torch.tensor(0)

    def _scaled_dot_product_efficient_attention_backward(
        self,
        grad_output,
        query,
        key,
        value,
        bias,
        output,
        lse,
        seed,
        offset,
        dropout,
        wanted,
        is_causal=False,
        *,
        scale,
    ):
        assert lse.shape == (*query.shape[:2], query.shape[2] + -query.shape[2] % self.lse_alignment)
        assert grad_output.shape == output.shape == query.shape
        weights = (self._scores(query, key, bias, is_causal, scale) - lse[..., : query.shape[2], None]).exp()
        delta = (grad_output * output).sum(-1, keepdim=True)
        grad_scores = weights * (grad_output @ value.transpose(-1, -2) - delta) * scale
        return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad_output, None


@pytest.mark.parametrize("alignment", [32, 1], ids=["cuda", "rocm"])
def test_the_memory_efficient_kernel_passes_its_trial_by_the_formula(monkeypatch, alignment):
    operators = EfficientOperators(alignment)
    monkeypatch.setattr(kernels, "aten", operators)
    monkeypatch.setattr(kernels.CudaEfficientKernel, "lse_alignment", alignment)
    monkeypatch.setattr(kernels.CudaEfficientKernel, "is_offered", lambda self, *inputs: True)
    kind = selfcheck._Kind(kernels.CudaEfficientKernel, CPU, torch.float32, 8)
    assert selfcheck._outcome(kind) is True
    # for a single query, keys and values are not repeated for the heads of a group
    heads, kv_heads = selfcheck.HEADS, selfcheck.KV_HEADS
    assert operators.kv_heads == {(35, heads), (5, heads), (heads // kv_heads, kv_heads)}


@pytest.mark.parametrize("alignment", [32, 1])
def test_an_operator_with_another_alignment_of_its_log_sum_exp_fails_its_trial(monkeypatch, alignment):
    monkeypatch.setattr(kernels, "aten", EfficientOperators(alignment))
    monkeypatch.setattr(kernels.CudaEfficientKernel, "lse_alignment", 33 - alignment)
    monkeypatch.setattr(kernels.CudaEfficientKernel, "is_offered", lambda self, *inputs: True)
    kind = selfcheck._Kind(kernels.CudaEfficientKernel, CPU, torch.float32, 8)
    assert isinstance(selfcheck._run_in_thread(kind), AssertionError)


def flash_operators():
    """The operators of flash attention on CUDA, ROCm and XPU, by the CPU's."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def attend(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        output, lse = forward(query, key, value, dropout_p, is_causal, scale=scale)
        return output, lse, None, None, query.shape[2], key.shape[2], torch.tensor(0), torch.tensor(0), None

    def differentiate(
        grad, query, key, value, output, lse, cum_q, cum_k, max_q, max_k, dropout, is_causal, seed, offset, *, scale
    ):
        assert lse.is_contiguous() and (max_q, max_k) == (query.shape[2], key.shape[2])
        return backward(grad, query, key, value, output, lse, dropout, is_causal, scale=scale)

    return types.SimpleNamespace(
        _scaled_dot_product_flash_attention=attend, _scaled_dot_product_flash_attention_backward=differentiate
    )


@pytest.mark.parametrize("kernel", [kernels.CudaFlashKernel, kernels.XpuFlashKernel])
def test_the_flash_kernel_passes_its_trial_by_the_cpus_operator(monkeypatch, kernel):
    monkeypatch.setattr(kernels, "aten", flash_operators())
    monkeypatch.setattr(kernel, "is_offered", lambda self, *inputs: True)
    assert selfcheck._outcome(selfcheck._Kind(kernel, CPU, torch.bfloat16, 64)) is True
