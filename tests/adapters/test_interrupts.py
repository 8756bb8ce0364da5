"""Ctrl-C, SystemExit and cancelled tasks in the middle of a call: nothing in the process remembers them."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import prefix_config, prefixed
from test_threads import MODELS, texts

from peft_prefix_plus import prefix_attention_mass
from peft_prefix_plus.adapters.running import RUNNING
from peft_prefix_plus.attention.watching import THREAD


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """A process's own answer to SIGINT, which test runners take away."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGINT, before)


def press_ctrl_c(*args: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def exit_process(*args: Any) -> None:
    raise SystemExit(1)


def cancel_task(*args: Any) -> None:
    raise asyncio.CancelledError


INTERRUPTS: dict[str, tuple[Callable[..., None], type[BaseException]]] = {
    "Ctrl-C": (press_ctrl_c, KeyboardInterrupt),
    "SystemExit": (exit_process, SystemExit),
    "a cancelled task": (cancel_task, asyncio.CancelledError),
}
CALLS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda model: model(input_ids=texts(1)),
    "rows": lambda model: model.eval()(input_ids=texts(1), adapter_names=["default", "__base__"]),
    "generate": lambda model: model.generate(input_ids=texts(0), max_new_tokens=3, pad_token_id=0),
    "add_adapter": lambda model: model.add_adapter("new", prefix_config(task_type="CAUSAL_LM")),
    "prefix_attention_mass": lambda model: prefix_attention_mass(model, input_ids=texts(1)),
}
LAST_OF_ATTENTION = {"GPT-J": "out_proj", "Bloom": "dense", "sdpa": "o_proj"}


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.matmul(query, key.transpose(-1, -2)) / 3.0, dim=-1) @ value


class Bystanders:
    """What else a process computes, with the right answers."""

    def __init__(self, model: Any) -> None:
        self.models = [model, *(MODELS[name]().eval() for name in ("GPT-J", "Bloom"))]
        self.tensors = [torch.randn(2, 4, 5, 8) for _ in range(3)]
        self.expected = self.answers()

    @torch.no_grad()
    def answers(self) -> list[torch.Tensor]:
        return [*(model(input_ids=texts(2)).logits for model in self.models), written_out(*self.tensors)]

    def check(self) -> None:
        assert all(map(torch.equal, self.answers(), self.expected))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("interrupt", INTERRUPTS)
@pytest.mark.parametrize("name", LAST_OF_ATTENTION)
def test_an_interrupted_call_changes_nothing_else(name: str, interrupt: str, call: str) -> None:
    if name == "sdpa" and interrupt != "Ctrl-C":
        pytest.skip("one interrupt is enough where no mode is pushed")
    model: Any = prefixed(MODELS[name]().eval(), task_type="CAUSAL_LM")
    bystanders = Bystanders(model)
    classes = [(type(module), getattr(module, "config", None)) for module in model.modules()]
    strike, error = INTERRUPTS[interrupt]
    paths = tuple(f"{attention}.{LAST_OF_ATTENTION[name]}" for attention in ("attn", "attention"))
    last = [module for path, module in model.named_modules() if path.endswith(paths)][-1]
    handle = last.register_forward_hook(strike)
    with pytest.raises(error):
        CALLS[call](model)
    handle.remove()
    assert [(type(module), getattr(module, "config", None)) for module in model.modules()] == classes
    assert torch.is_grad_enabled()
    assert torch.overrides._len_torch_function_stack() == 0
    assert (THREAD.interface, THREAD.inline) == (None, None)
    assert (RUNNING.rows, RUNNING.memo) == (None, None)
    bystanders.check()


def test_a_mode_that_torch_puts_back_too_late_follows_nothing() -> None:
    """As an interrupted `torch.overrides.handle_torch_function` does, when the interrupt's traceback is freed."""
    model: Any = prefixed(MODELS["GPT-J"]().eval(), task_type="CAUSAL_LM")
    bystanders, modes = Bystanders(model), []
    note = (
        model.get_base_model()
        .transformer.h[0]
        .attn.out_proj.register_forward_hook(lambda *_: modes.append(torch.overrides._get_current_function_mode()))
    )
    model(input_ids=texts(1))
    note.remove()
    torch.overrides._push_mode(modes[0])
    bystanders.models.reverse()  # others first: the model with a prefix takes the mode away
    bystanders.expected = [*reversed(bystanders.expected[:-1]), bystanders.expected[-1]]
    bystanders.check()
    assert torch.overrides._len_torch_function_stack() == 0


class _Struck(BaseException):
    """Raised by a signal at a random moment."""


def strike_at_random(name: str, times: int) -> None:
    model: Any = prefixed(MODELS[name]().eval(), task_type="CAUSAL_LM")
    bystanders = Bystanders(model)
    random_numbers = random.Random(0)

    def handler(*args: Any) -> None:
        raise _Struck

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(times):
            try:
                signal.setitimer(signal.ITIMER_REAL, random_numbers.uniform(1e-3, 2e-2))
                while True:
                    model.generate(input_ids=texts(0), max_new_tokens=2, pad_token_id=0)
            except _Struck:
                torch.set_grad_enabled(True)  # which torch's own `no_grad` forgets if it is struck while it ends
                bystanders.check()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["GPT-J", "Bloom"])
def test_signals_at_random_moments(name: str) -> None:
    strike_at_random(name, 10)


@pytest.mark.soak
@pytest.mark.parametrize("name", MODELS)
def test_signals_at_many_random_moments(name: str) -> None:
    strike_at_random(name, 500)
