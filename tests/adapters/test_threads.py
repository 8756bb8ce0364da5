"""Several threads on one model: each gets what it gets alone, whatever the others run."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import prefix_config, prefixed
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_prefix_plus import prefix_attention_mass


VOCABULARY, THREADS = 64, 4
SIZES: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def llama(implementation: str) -> nn.Module:
    config = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, initializer_range=0.3)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation)


def gptj() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    return GPTJForCausalLM(GPTJConfig(**sizes, initializer_range=0.3))


def bloom() -> nn.Module:
    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "eager": lambda: llama("eager"),
    "sdpa": lambda: llama("sdpa"),
    "GPT-J": gptj,
    "Bloom": bloom,
}
SOAK_MODELS = {**MODELS, "flex": lambda: llama("flex_attention")}
FORMS: dict[str, dict[str, Any]] = {
    "joint": {},
    "gated": {"gating": True},
    "decoupled": {"decoupled": True},
    "fixed": {"position_free": False},
}


@pytest.fixture(autouse=True)
def switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run calls at the same time, each in a thread of its own, and return their results."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def texts(index: int) -> torch.Tensor:
    """Another text for each thread, of another length and another number of rows."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(5, VOCABULARY, (1 + index % 2, 3 + 2 * index), generator=generator)


def answers(model: Any, ids: torch.Tensor, rounds: int) -> list[torch.Tensor]:
    """What one user asks of a model, again and again: logits and generated tokens."""
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        return [
            answer
            for _ in range(rounds)
            for answer in (
                model(input_ids=ids).logits,
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options),
            )
        ]


def number_wrong(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]], tolerance: float = 0.0) -> int:
    pairs = [
        (one, other) for mine, own in zip(found, expected, strict=True) for one, other in zip(mine, own, strict=True)
    ]
    return sum(
        one.shape != other.shape or not torch.allclose(one, other, rtol=0.0, atol=tolerance) for one, other in pairs
    )


def check_threads(model: Any, rounds: int, tolerance: float = 0.0) -> None:
    expected = [answers(model, texts(index), 1) * rounds for index in range(THREADS)]
    found = in_threads([lambda index=index: answers(model, texts(index), rounds) for index in range(THREADS)])
    assert number_wrong(found, expected, tolerance) == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_each_thread_gets_its_own_answers(name: str, form: str) -> None:
    check_threads(prefixed(MODELS[name]().eval(), task_type="CAUSAL_LM", **FORMS[form]), rounds=2)


@pytest.mark.soak
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SOAK_MODELS)
def test_each_thread_gets_its_own_answers_for_long(name: str, form: str) -> None:
    # flex attention compiles a kernel anew where shapes have changed: a bare model's logits then differ by 4e-6 as well
    tolerance = 1e-4 if name == "flex" else 0.0
    check_threads(
        prefixed(SOAK_MODELS[name]().eval(), task_type="CAUSAL_LM", **FORMS[form]), rounds=40, tolerance=tolerance
    )


def with_adapters(model: nn.Module, task_type: str, names: Sequence[str]) -> PeftModel:
    for index, name in enumerate(names):
        config = prefix_config(task_type=task_type, num_virtual_tokens=2 + index)
        if index == 0:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)  # type: ignore[operator]
    return model.eval()  # type: ignore[return-value]


def check_rows(model: Any, names: Sequence[str], rounds: int) -> None:
    rows = [[names[(index + row) % len(names)] for row in range(2)] for index in range(THREADS - 1)]
    ids = texts(3)

    def of_rows(adapter_names: list[str] | None) -> list[torch.Tensor]:
        options = {} if adapter_names is None else {"adapter_names": adapter_names}
        with torch.no_grad():
            return [model(input_ids=ids, **options).logits for _ in range(rounds)]

    expected = [of_rows(each) for each in (*rows, None)]
    assert number_wrong([expected[0]], [expected[1]]) == rounds
    calls = [lambda each=each: of_rows(each) for each in (*rows, None)]
    assert number_wrong(in_threads(calls), expected) == 0


@pytest.mark.parametrize("name", MODELS)
def test_rows_have_the_adapters_that_their_own_thread_names(name: str) -> None:
    names = ["a", "b", "c"]
    check_rows(with_adapters(MODELS[name](), "CAUSAL_LM", names), [*names, "__base__"], rounds=6)


def test_saved_modules_follow_the_rows_of_their_own_thread() -> None:
    model = with_adapters(BertForSequenceClassification(BertConfig(**SIZES)), "SEQ_CLS", ["a", "b", "c"])
    with torch.no_grad():
        for index, copied in enumerate(model.get_base_model().classifier.modules_to_save.values()):
            copied.weight.add_(float(index))
    check_rows(model, ["a", "b", "c"], rounds=12)


@pytest.mark.parametrize("name", ["sdpa", "GPT-J"])
def test_a_measure_and_a_new_adapter_leave_other_threads_alone(name: str) -> None:
    model: Any = prefixed(MODELS[name]().eval(), task_type="CAUSAL_LM")
    expected = answers(model, texts(2), 1) * 8

    def look_and_add() -> dict[str, torch.Tensor]:
        for index in range(2):
            model.add_adapter(f"new{index}", prefix_config(task_type="CAUSAL_LM"))
        return prefix_attention_mass(model, "default", input_ids=texts(1))

    def ask() -> list[torch.Tensor]:
        found = answers(model, texts(2), 8)
        assert torch.is_grad_enabled()
        return found

    *found, masses = in_threads([ask, ask, look_and_add])
    assert number_wrong(found, [expected, expected]) == 0
    for module_name, mass in prefix_attention_mass(model, "default", input_ids=texts(1)).items():
        assert torch.equal(masses[module_name], mass)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "Bloom"])
def test_checkpointed_layers_run_again_in_any_thread(name: str, reentrant: bool) -> None:
    """The backward, and with it the forward that it repeats, may run in another thread than the forward did."""
    plain: Any = prefixed(MODELS[name]().train(), task_type="CAUSAL_LM").double()
    checkpointed: Any = copy.deepcopy(plain)
    checkpointed.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    gradients = []
    for model in (plain, checkpointed):
        loss = model(input_ids=texts(2), labels=texts(2)).loss
        in_threads([loss.backward])
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
