"""What changes a model's adapters is done as a whole or not at all, whenever it is interrupted."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import random
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import output_of, prefix_config, prefixed, tiny_model, token_ids, word_tokenizer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_threads import MODELS

import peft_prefix_plus
from peft_prefix_plus import (
    flatten,
    initialize_from_key_values,
    initialize_from_text,
    prefix_attention_mass,
    prefix_key_values,
    prune_layers,
)


TRACED = tuple(os.path.dirname(module.__file__) + os.sep for module in (peft, peft_prefix_plus))
WEIGHTS = "adapter_model.safetensors"
INTERRUPTS = [KeyboardInterrupt, SystemExit, MemoryError]
LATE = 60
"""Every other interrupt comes in this many last lines: some operations change the model only there."""


class Interrupter:
    """Raises an error before one line, counted from the start, of what PEFT and this package run; without an error, it counts."""

    def __init__(self, line: int = 0, error: type[BaseException] | None = None) -> None:
        self.line, self.error, self.count = line, error, 0

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "call" and not frame.f_code.co_filename.startswith(TRACED):
            return None
        if event == "line":
            self.count += 1
            if self.error is not None and self.count == self.line:
                raise self.error
        return self

    def run(self, call: Callable[[], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(before)


def described(model: Any) -> dict[str, Any]:
    """A model as far as operations on its adapters change it, in a form that models can be compared by."""
    state: dict[str, Any] = {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "configs": {name: type(vars(module).get("config")) for name, module in model.named_modules()},
        "trainable": {name: each.requires_grad for name, each in model.named_parameters()},
        "active": {
            name: (list(module.active_adapters), module.disable_adapters)
            for name, module in model.named_modules()
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
        },
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "adapters": {name: config.to_dict() for name, config in (getattr(model, "peft_config", None) or {}).items()},
    }
    if isinstance(model, PeftModel):
        state["named"] = (model.active_adapter, model.active_adapters, model._adapters_disabled)
    return state


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    tensors = [state["tensors"] for state in (first, second)]
    return (
        all(first[key] == second[key] for key in first if key != "tensors")
        and list(tensors[0]) == list(tensors[1])
        and all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    )


def two_adapters(name: str = "llama") -> Any:
    base = tiny_model() if name == "llama" else MODELS[name]().eval()
    model: Any = prefixed(base, task_type="CAUSAL_LM", reparameterization="mlp", layers_to_transform=[0, 1])
    model.add_adapter("b", prefix_config(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    return model.eval()


def disable_and_enable(model: Any) -> None:
    with model.disable_adapter():
        pass


ON_ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    "add_adapter": lambda model, path: model.add_adapter(
        "new", prefix_config(task_type="CAUSAL_LM", reparameterization="mlp", modules_to_save=["lm_head"])
    ),
    "load_adapter": lambda model, path: model.load_adapter(path, "new", is_trainable=True),
    "load_adapter onto one": lambda model, path: model.load_adapter(path, "b"),
    "set_adapter": lambda model, path: model.set_adapter("b"),
    "delete_adapter": lambda model, path: model.delete_adapter("default"),
    "disable_adapter": lambda model, path: disable_and_enable(model),
    "initialize_from_key_values": lambda model, path: initialize_from_key_values(
        model, {name: (key + 1.0, value) for name, (key, value) in prefix_key_values(model).items()}
    ),
    "flatten": lambda model, path: flatten(model),
    "initialize_from_text": lambda model, path: initialize_from_text(
        model, word_tokenizer(), "w3 w4 w5 w6 w7 w8", adapter_name="b", method="attention"
    ),
    "prefix_attention_mass": lambda model, path: prefix_attention_mass(model, input_ids=token_ids()),
    "prune_layers": lambda model, path: prune_layers(model, [1]),
    "base_model.set_adapter": lambda model, path: model.base_model.set_adapter(["default", "b"]),
    "base_model.delete_adapter": lambda model, path: model.base_model.delete_adapter("b"),
}
ON_BASE: dict[str, Callable[[Any, Path], Any]] = {
    "get_peft_model": lambda base, path: get_peft_model(
        base, prefix_config(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    ),
    "from_pretrained": lambda base, path: PeftModel.from_pretrained(base, path),
}


BETWEEN = {
    *("PeftModel.from_pretrained", "PeftModel.__init__", "PeftModelForCausalLM.__init__"),
    *("BaseTuner._cast_adapter_dtype", "cast_adapter_dtype", "get_peft_model"),
}
"""Where PEFT is between making a model and handing it back, or loading it: an interrupt there leaves an adapter on the base model."""


def strike(make: Callable[[], Any], call: Callable[[Any], Any], times: int, seed: int = 0) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        return make()

    call(fresh())  # what a first run caches, the others need not do
    finished = fresh()
    counter = Interrupter()
    torch.manual_seed(1)
    counter.run(partial(call, finished))
    done = described(finished)
    model = fresh()
    before, expected = described(model), output_of(model, input_ids=token_ids())
    numbers, interrupted = random.Random(seed), 0
    for index in range(times):
        line = numbers.randint(max(1, counter.count - LATE) if index % 2 else 1, counter.count)
        error = INTERRUPTS[index % len(INTERRUPTS)]
        where: list[str] = []
        try:
            torch.manual_seed(1)
            Interrupter(line, error).run(partial(call, model))
        except error as raised:
            traceback = pytest.ExceptionInfo.from_exception(raised).traceback
            where = [entry.frame.code.raw.co_qualname for entry in traceback if str(entry.path).startswith(TRACED)]
        else:  # a run can have fewer lines than the counted one, because of what others have cached
            model = fresh()
            continue
        interrupted += 1
        if same(described(model), before):
            assert torch.equal(output_of(model, input_ids=token_ids()), expected)
            continue
        # else the interrupt came after all was done
        assert same(described(model), done) or where[-1] in BETWEEN, (line, where)
        model = fresh()
    assert interrupted >= times // 3


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    prefixed(tiny_model(), task_type="CAUSAL_LM", modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("operation", ON_ADAPTERS)
def test_an_interrupted_operation_changes_nothing(operation: str, saved: Path) -> None:
    strike(two_adapters, lambda model: ON_ADAPTERS[operation](model, saved), 6)


@pytest.mark.parametrize("operation", ON_BASE)
def test_an_interrupted_first_adapter_leaves_the_base_model(operation: str, saved: Path) -> None:
    strike(tiny_model, lambda base: ON_BASE[operation](base, saved), 6)


def test_an_interrupted_switching_off_leaves_frozen_adapters_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_adapters().requires_grad_(False)
    before, switch_off = described(model), model.base_model.disable_adapter_layers

    def interrupted() -> None:
        switch_off()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.base_model, "disable_adapter_layers", interrupted)
        with pytest.raises(KeyboardInterrupt), model.disable_adapter():
            pass
    assert same(described(model), before)


def test_an_interrupt_leaves_modules_that_write_attention_out(saved: Path) -> None:
    strike(lambda: two_adapters("GPT-J"), lambda model: ON_ADAPTERS["add_adapter"](model, saved), 6)


@pytest.mark.soak
@pytest.mark.parametrize("operation", [*ON_ADAPTERS, *ON_BASE])
def test_operations_interrupted_at_many_moments_change_nothing(operation: str, saved: Path) -> None:
    if operation in ON_BASE:
        strike(tiny_model, lambda base: ON_BASE[operation](base, saved), 300, seed=1)
    else:
        strike(two_adapters, lambda model: ON_ADAPTERS[operation](model, saved), 300, seed=1)


# ------------------------------------------------------------------------------------------------ broken files


def truncate(path: Path) -> None:
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


def write_garbage(path: Path) -> None:
    (path / WEIGHTS).write_bytes(bytes(range(256)) * 8)


def leave_out_weights(path: Path) -> None:
    (path / WEIGHTS).unlink()


def pickle_code(path: Path) -> None:
    (path / WEIGHTS).unlink()
    torch.save({"prefix": print}, path / "adapter_model.bin")


def cut_a_pickle_off(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()
    content = (path / "adapter_model.bin").read_bytes()
    (path / "adapter_model.bin").write_bytes(content[: len(content) // 2])


def leave_out_the_saved_module(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors[next(name for name in tensors if "lm_head" in name)]
    save_file(tensors, path / WEIGHTS)


BROKEN = {
    truncate: "adapter_model.safetensors cannot be read.*SafetensorError",
    write_garbage: "adapter_model.safetensors cannot be read.*SafetensorError",
    leave_out_weights: "has no weights.*adapter_model.safetensors",
    pickle_code: "adapter_model.bin cannot be read.*UnpicklingError",
    cut_a_pickle_off: "adapter_model.bin cannot be read.*UnpicklingError",
    leave_out_the_saved_module: "has no .*lm_head",
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__)
def test_a_broken_file_is_named_and_changes_nothing(spoil: Callable[[Path], None], saved: Path) -> None:
    spoil(saved)
    base, model = tiny_model(), two_adapters()
    states = described(base), described(model)
    expected = output_of(base, input_ids=token_ids()), output_of(model, input_ids=token_ids())
    with pytest.raises(ValueError, match=BROKEN[spoil]):
        PeftModel.from_pretrained(base, saved)
    with pytest.raises(ValueError, match=BROKEN[spoil]):
        model.load_adapter(saved, "new")
    with pytest.raises(ValueError, match=BROKEN[spoil]):
        model.load_adapter(saved, "b")
    assert same(described(base), states[0])
    assert same(described(model), states[1])
    assert torch.equal(output_of(base, input_ids=token_ids()), expected[0])
    assert torch.equal(output_of(model, input_ids=token_ids()), expected[1])


# ------------------------------------------------------------------------------------------------ wrappers


def test_a_copy_of_a_model_changes_itself() -> None:
    model = two_adapters()
    other = copy.deepcopy(model)
    before = described(model)
    other.set_adapter("b")
    other.delete_adapter("default")
    assert same(described(model), before)
    assert list(other.peft_config) == ["b"]
    assert other.active_adapter == "b"


def test_a_deleted_model_is_gone_at_once() -> None:
    model = two_adapters()
    base = weakref.ref(model.get_base_model())
    enabled = gc.isenabled()
    gc.disable()
    try:
        del model
        assert base() is None
    finally:
        if enabled:
            gc.enable()


def test_deleting_the_active_adapter_by_the_tuner_names_another() -> None:
    model = two_adapters()
    model.base_model.delete_adapter("default")
    assert model.active_adapter == "b"
    output_of(model, input_ids=token_ids())


def test_a_model_can_be_pickled_and_still_acts_as_a_whole(tmp_path: Path) -> None:
    model = two_adapters()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert same(described(loaded), described(model))
    loaded.delete_adapter("default")
    assert loaded.active_adapter == "b"
    output_of(loaded, input_ids=token_ids())


def test_signatures_are_those_of_peft() -> None:
    model = two_adapters()
    for name in ("add_adapter", "load_adapter", "set_adapter", "delete_adapter", "disable_adapter", "save_pretrained"):
        expected = list(inspect.signature(getattr(PeftModel, name)).parameters)[1:]
        assert list(inspect.signature(getattr(model, name)).parameters) == expected
