"""
What must hold for any configuration, model and sequence of adapters, tried on drawn examples.

A few in `make test`, the same ones every time; many new ones in `make test-soak`. A failure prints how to repeat it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from models import (
    ARCHITECTURES,
    INLINE_MODELS,
    adapter_parameters,
    assert_unchanged,
    loss_of,
    main_output,
    output_of,
    state_of,
    task_inputs,
    tiny_model,
    token_ids,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from peft_prefix_plus import PrefixPlusConfig


COMMON: dict[str, Any] = dict(deadline=None, suppress_health_check=list(HealthCheck))
FAST: dict[str, Any] = dict(COMMON, derandomize=True, database=None)
SOAK: dict[str, Any] = dict(COMMON, print_blob=True)

TASKS = {"t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "modernbert": "TOKEN_CLS"}
LOOKED_UP = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", *TASKS]
WRITTEN_OUT = ["GPT-J", "Bloom"]


def task_of(name: str) -> str:
    return TASKS.get(name, "CAUSAL_LM")


def base_model(name: str, implementation: str | None = None) -> Any:
    """The same model every time, in evaluation mode."""
    if name in WRITTEN_OUT:
        torch.manual_seed(0)
        return INLINE_MODELS[name]().eval()
    return tiny_model(name, task_of(name), implementation)


@st.composite
def config_fields(draw: Callable[..., Any], layers: tuple[int, ...] = (0, -1)) -> dict[str, Any]:
    """Fields of a configuration that is valid."""
    form = draw(st.sampled_from(["joint", "gating", "decoupled"]))
    starts = [True, False, "random", "activations"] + (["zero"] if form == "joint" else [])
    fields = {
        "num_virtual_tokens": draw(st.integers(1, 4)),
        "reparameterization": draw(st.sampled_from(["none", "linear", "mlp"])),
        "sharing": draw(st.sampled_from(["none", "input", "projection", "all"])),
        "encoder_dim": draw(st.integers(1, 6)),
        "position_free": draw(st.sampled_from([None, False])),
        "prefix_scaling": draw(st.sampled_from([None, 1.0, 4.0])),
        "layers_to_transform": draw(st.none() | st.lists(st.sampled_from(layers), min_size=1, unique=True)),
        "init_weights": draw(st.sampled_from(starts)),
    }
    if form != "joint":
        fields[form] = True
    if fields["reparameterization"] == "mlp":
        fields["encoder_hidden_size"] = draw(st.none() | st.integers(1, 6))
        fields["encoder_activation"] = draw(st.sampled_from(["tanh", "gelu", "silu"]))
    return fields


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums, in terms of the largest number."""
    assert output.isfinite().all()
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4 * max(1.0, float(expected.abs().max())))


# ---------------------------------------------------------------------------------------------- one adapter, any model


def check_an_adapter(name: str, fields: dict[str, Any], seed: int) -> None:
    """All that one adapter on one model must do."""
    base, inputs = base_model(name), task_inputs(task_of(name))
    without_labels = {key: value for key, value in inputs.items() if key != "labels"}
    if task_of(name) == "SEQ_2_SEQ_LM":
        without_labels["decoder_input_ids"] = inputs["labels"]
    before, base_output = state_of(base), output_of(base, **without_labels)
    torch.manual_seed(seed)
    model = get_peft_model(base, PrefixPlusConfig(task_type=task_of(name), **fields)).eval()
    output = output_of(model, **without_labels)
    assert torch.equal(output_of(model, **without_labels), output), "the same again"

    with model.disable_adapter():
        assert torch.equal(output_of(model, **without_labels), base_output), "without the adapter it is the base model"

    check_rows(model, name, without_labels, output)
    if task_of(name) == "CAUSAL_LM":
        check_cache(model, without_labels["input_ids"], output)
    check_gradients(model, inputs)
    check_copies(model, name, without_labels, output)

    assert torch.equal(output_of(model, **without_labels), output), "nothing of this has changed it"
    assert model.unload() is base
    base.requires_grad_(True)
    assert_unchanged(base, before)
    assert torch.equal(output_of(base, **without_labels), base_output)


def check_rows(model: Any, name: str, inputs: dict[str, Any], output: torch.Tensor) -> None:
    """A row is what it is alone, and what is padded on its right makes no difference."""
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, 2), value=5)
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    if task_of(name) != "SEQ_CLS":  # some read the last token, which is then another
        padded = output_of(model, **{**inputs, "input_ids": ids, "attention_mask": mask})
        assert_close(padded[:, : output.shape[1]], output)
    alone = {key: value[1:] for key, value in inputs.items()}
    assert_close(output_of(model, **alone), output[1:])


def check_cache(model: Any, ids: torch.Tensor, output: torch.Tensor) -> None:
    """A text read in parts is the text read at once."""
    with torch.no_grad():
        first = model(input_ids=ids[:, :4], use_cache=True)
        assert first.past_key_values.get_seq_length() == 4, "the cache holds real tokens only"
        rest = [
            model(input_ids=ids[:, index : index + 1], past_key_values=first.past_key_values).logits
            for index in range(4, ids.shape[1])
        ]
    assert_close(torch.cat([first.logits, *rest], dim=1), output)


def check_gradients(model: Any, inputs: dict[str, Any]) -> None:
    """All that is trained gets a gradient, and a finite one; nothing else gets one."""
    loss_of(model, **inputs).backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    model.zero_grad()


def check_copies(model: Any, name: str, inputs: dict[str, Any], output: torch.Tensor) -> None:
    """A saved adapter gives the same when it is loaded, and with another attention implementation nearly the same."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base_model(name), folder)
        assert torch.equal(output_of(loaded, **inputs), output)
        if "sdpa" in (ARCHITECTURES[name].implementations if name in ARCHITECTURES else ()):
            assert_close(output_of(PeftModel.from_pretrained(base_model(name, "eager"), folder), **inputs), output)


ONE_ADAPTER = given(name=st.sampled_from(LOOKED_UP + WRITTEN_OUT), fields=config_fields(), seed=st.integers(0, 9))


@settings(**FAST, max_examples=15)
@ONE_ADAPTER
def test_an_adapter_does_what_it_must(name, fields, seed):
    check_an_adapter(name, fields, seed)


@pytest.mark.soak
@settings(**SOAK, max_examples=600)
@ONE_ADAPTER
def test_any_adapter_does_what_it_must(name, fields, seed):
    check_an_adapter(name, fields, seed)


# ------------------------------------------------------------------------------------------- many adapters, one model


class Adapters(RuleBasedStateMachine):
    """
    A model whose adapters are added, chosen, trained, saved, loaded, switched off and deleted in any order.

    It is compared with new models that have only the adapters that are active, and never had others.
    """

    NAMES = ("a", "b", "c", "d")
    INPUTS = {"input_ids": token_ids()}

    @initialize(name=st.sampled_from(["llama", "gpt2", "GPT-J"]))
    def start(self, name: str) -> None:
        self.name = name
        self.base = base_model(name)
        self.layers = len(self.base.base_model.layers if name == "llama" else self.base.base_model.h)
        self.before, self.base_output = state_of(self.base), output_of(self.base, **self.INPUTS)
        self.model: Any = None
        self.active: list[str] = []
        self.recorded: dict[str, tuple[PrefixPlusConfig, dict[str, torch.Tensor]]] = {}

    def record(self, name: str) -> None:
        """Remember an adapter's configuration and tensors."""
        state = get_peft_model_state_dict(self.model, adapter_name=name)
        state = {key: tensor.detach().clone() for key, tensor in state.items()}
        self.recorded[name] = (copy.deepcopy(self.model.peft_config[name]), state)

    def expected(self, names: list[str]) -> torch.Tensor:
        """The output of a new model with these adapters, all of them active."""
        model: Any = None
        for name in names:
            config, state = self.recorded[name]
            if model is None:
                model = get_peft_model(base_model(self.name), copy.deepcopy(config), adapter_name=name)
            else:
                model.add_adapter(name, copy.deepcopy(config))
            set_peft_model_state_dict(model, state, adapter_name=name)
        model.base_model.set_adapter(names)
        return output_of(model.eval(), **self.INPUTS)

    def free_names(self) -> list[str]:
        return [name for name in self.NAMES if name not in self.recorded]

    @precondition(lambda self: self.free_names())
    @rule(fields=config_fields(), seed=st.integers(0, 9))
    def add(self, fields: dict[str, Any], seed: int) -> None:
        name = self.free_names()[0]
        if self.name == "GPT-J":
            fields = {**fields, "layers_to_transform": None}  # it has one layer
        config = PrefixPlusConfig(task_type="CAUSAL_LM", **fields)
        given_fields = copy.deepcopy(vars(config))
        torch.manual_seed(seed)
        if self.model is None:
            self.model = get_peft_model(self.base, config, adapter_name=name).eval()
            self.active = [name]
        else:
            self.model.add_adapter(name, config)
            self.model.eval()
        assert given_fields.keys() == vars(config).keys()
        self.record(name)

    @precondition(lambda self: self.recorded)
    @rule(data=st.data())
    def choose(self, data: st.DataObject) -> None:
        self.active = data.draw(st.lists(st.sampled_from(sorted(self.recorded)), min_size=1, unique=True))
        self.model.base_model.set_adapter(self.active)

    @precondition(lambda self: self.recorded)
    @rule()
    def train(self) -> None:
        loss_of(self.model, **self.INPUTS).backward()
        for name in self.active:
            for key, parameter in adapter_parameters(self.model, name).items():
                if parameter.requires_grad:
                    assert parameter.grad is not None and parameter.grad.isfinite().all(), key
                    size = float(parameter.grad.abs().max())
                    parameter.data.add_(parameter.grad, alpha=-0.01 / size if size > 0 else 0.0)
        self.model.zero_grad()
        for name in self.active:
            self.record(name)

    @precondition(lambda self: len(self.recorded) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.recorded)))
        self.model.delete_adapter(name)
        del self.recorded[name]
        self.active = [other for other in self.active if other != name] or self.model.active_adapters
        assert set(self.active) <= set(self.recorded) and len(self.active) >= 1
        assert not adapter_parameters(self.model, name)

    @precondition(lambda self: self.recorded and self.free_names())
    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        name, copied = data.draw(st.sampled_from(sorted(self.recorded))), self.free_names()[0]
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            self.model.load_adapter(f"{folder}/{name}", copied)
        self.record(copied)
        for key, tensor in self.recorded[name][1].items():
            assert torch.equal(self.recorded[copied][1][key], tensor), key

    @precondition(lambda self: len(self.recorded) > 1)
    @rule(data=st.data())
    def mix_rows(self, data: st.DataObject) -> None:
        choices = st.sampled_from([*sorted(self.recorded), "__base__"])
        names = data.draw(st.lists(choices, min_size=2, max_size=2))
        with torch.no_grad():
            mixed = main_output(self.model(**self.INPUTS, adapter_names=names))
        for row, name in enumerate(names):
            expected = self.base_output if name == "__base__" else self.expected([name])
            assert_close(mixed[row], expected[row])

    @precondition(lambda self: self.recorded)
    @rule()
    def unload(self) -> None:
        assert self.model.unload() is self.base
        self.base.requires_grad_(True)
        assert_unchanged(self.base, self.before)
        self.model, self.active, self.recorded = None, [], {}

    @invariant()
    def the_model_is_one_with_the_active_adapters(self) -> None:
        if self.model is None:
            assert torch.equal(output_of(self.base, **self.INPUTS), self.base_output)
            return
        assert list(self.model.active_adapters) == self.active
        assert sorted(self.model.peft_config) == sorted(self.recorded)
        assert_close(output_of(self.model, **self.INPUTS), self.expected(self.active))
        for name, (_, state) in self.recorded.items():
            for key, tensor in get_peft_model_state_dict(self.model, adapter_name=name).items():
                assert torch.equal(tensor, state[key]), f"{key} of adapter {name}"

    @invariant()
    def without_adapters_it_is_the_base_model(self) -> None:
        if self.model is not None:
            with self.model.disable_adapter():
                assert torch.equal(output_of(self.model, **self.INPUTS), self.base_output)


def test_some_sequences_of_adapters():
    run_state_machine_as_test(Adapters, settings=settings(**FAST, max_examples=6, stateful_step_count=12))


@pytest.mark.soak
def test_any_sequence_of_adapters():
    run_state_machine_as_test(Adapters, settings=settings(**SOAK, max_examples=120, stateful_step_count=30))
