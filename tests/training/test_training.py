"""Training: gradients, memory, checkpointing, the Trainer, and going on from a saved adapter."""

from __future__ import annotations

import json

import pytest
import torch
from models import (
    EACH_COMBINATION,
    SCALING_SIZE,
    adapter_parameters,
    loss_of,
    output_of,
    prefix_layers,
    prefixed,
    task_inputs,
    tiny_model,
    token_ids,
)
from peft import PeftModel
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments


EACH_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
INPUTS = task_inputs("CAUSAL_LM")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("gating", [False, True])
@EACH_IMPLEMENTATION
@EACH_COMBINATION
def test_adapter_parameters_and_no_others_get_gradients(reparameterization, sharing, implementation, gating):
    model = prefixed(
        tiny_model(implementation=implementation),
        reparameterization=reparameterization,
        sharing=sharing,
        gating=gating,
        encoder_activation="gelu",
    )
    adapter = adapter_parameters(model)

    loss_of(model, **INPUTS).backward()

    for name, gradient in gradients(model).items():
        if name in adapter:
            assert gradient.abs().max() > 0, name
            assert gradient.isfinite().all(), name
        elif "prefix_plus_scaling" in name:
            assert torch.equal(gradient, torch.zeros(SCALING_SIZE)), name
        else:
            assert gradient is None, name


def test_a_closed_gate_opens_in_training():
    model = prefixed(tiny_model(), gating=True, init_weights=True)

    loss_of(model, **INPUTS).backward()

    gates = {name: parameter for name, parameter in adapter_parameters(model).items() if "gate" in name}
    assert len(gates) == 3
    assert all(gate.grad.abs().max() > 0 for gate in gates.values())


# Architectures that do not leave float64 on the way: no RMSNorm, no float32 softmax.
GRADIENT_CASES = [
    ("starcoder2", "CAUSAL_LM", {}),
    ("starcoder2", "CAUSAL_LM", {"gating": True}),
    ("starcoder2", "CAUSAL_LM", {"reparameterization": "linear", "sharing": "projection"}),
    ("starcoder2", "CAUSAL_LM", {"reparameterization": "mlp", "sharing": "input", "prefix_scaling": 0.5}),
    ("starcoder2", "CAUSAL_LM", {"reparameterization": "mlp", "sharing": "all", "layers_to_transform": [1]}),
    ("gpt2", "CAUSAL_LM", {"reparameterization": "linear", "sharing": "none"}),
    ("bart", "SEQ_2_SEQ_LM", {}),
    ("bert", "TOKEN_CLS", {}),
]


@pytest.mark.parametrize(("architecture", "task_type", "fields"), GRADIENT_CASES, ids=str)
def test_gradients_are_the_derivatives_of_the_output(architecture, task_type, fields):
    base = tiny_model(architecture, task_type, dtype=torch.float64)
    model = prefixed(base, num_virtual_tokens=2, **{"encoder_dim": 2, **fields})
    adapter = adapter_parameters(model)
    inputs = task_inputs(task_type, batch=1, tokens=4)
    inputs.pop("labels")
    if task_type == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = token_ids(1, 3)
    assert {parameter.dtype for parameter in adapter.values()} == {torch.float64}

    def output(*values: torch.Tensor) -> torch.Tensor:
        tensors = dict(zip(adapter, values, strict=True))
        return torch.func.functional_call(model, tensors, kwargs=inputs).logits

    values = tuple(parameter.detach().clone().requires_grad_() for parameter in adapter.values())
    assert torch.autograd.gradcheck(output, values, fast_mode=True)


def count_saved_tensors(model: torch.nn.Module, until: torch.nn.Module) -> tuple[int, int]:
    """Run a model; count the tensors kept for backward before and after a submodule is entered."""
    counts, entered = [0, 0], []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        counts[bool(entered)] += 1
        return tensor

    handle = until.register_forward_pre_hook(lambda module, arguments: entered.append(module))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, **INPUTS)
    handle.remove()
    return counts[0], counts[1]


@EACH_IMPLEMENTATION
@pytest.mark.parametrize("lowest", [1, 2, 3])
def test_nothing_is_kept_for_backward_below_the_lowest_chosen_layer(lowest, implementation):
    model = prefixed(
        tiny_model(implementation=implementation, num_hidden_layers=4), layers_to_transform=list(range(lowest, 4))
    )
    layers = model.base_model.model.model.layers
    needs_gradient = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, arguments: needs_gradient.append(arguments[0].requires_grad))

    below, above = count_saved_tensors(model.train(), layers[lowest].self_attn)

    assert needs_gradient[: lowest + 1] == [False] * (lowest + 1)
    assert needs_gradient[lowest + 1 :] == [True] * (3 - lowest)
    assert below == 0
    assert above > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
@EACH_IMPLEMENTATION
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {}),
        ("llama", {"layers_to_transform": [1]}),
        ("llama", {"reparameterization": "mlp", "sharing": "all"}),
        ("llama", {"reparameterization": "linear", "sharing": "projection", "gating": True}),
        ("gpt2", {}),
        ("t5", {"reparameterization": "mlp", "sharing": "projection"}),
        ("bert", {}),
    ],
    ids=str,
)
def test_gradient_checkpointing_gives_the_same_gradients(architecture, fields, implementation, use_reentrant):
    task_type = {"t5": "SEQ_2_SEQ_LM", "bert": "TOKEN_CLS"}.get(architecture, "CAUSAL_LM")
    inputs = task_inputs(task_type)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        base = tiny_model(architecture, task_type, implementation)
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        # gradients of the prefix itself, so that one tolerance fits all
        model = prefixed(base, task_type=task_type, prefix_scaling=1.0, **fields).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        base.config.dropout = base.config.attention_dropout = 0.0
        recomputed = count_layer_calls(model)
        torch.manual_seed(2)
        loss = loss_of(model, **inputs)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in adapter_parameters(model).items()}, recomputed))

    (plain_loss, plain, plain_calls), (loss, checkpointed, calls) = results
    assert sum(calls.values()) > sum(plain_calls.values())  # it was really recomputed
    torch.testing.assert_close(loss, plain_loss)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)


def count_layer_calls(model: torch.nn.Module) -> dict[str, int]:
    """Count how often each attention module that has a prefix is run."""
    calls: dict[str, int] = {}
    for name, layer in prefix_layers(model).items():

        def count(module, arguments, name=name):
            calls[name] = calls.get(name, 0) + 1

        layer.attention.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize(
    ("fields", "implementation"),
    [
        ({}, "eager"),
        ({"reparameterization": "mlp", "sharing": "all"}, "sdpa"),
        ({"gating": True, "layers_to_transform": [1]}, "sdpa"),
    ],
    ids=str,
)
def test_a_compiled_model_is_the_eager_one(fields, implementation):
    torch.compiler.reset()
    model = prefixed(tiny_model(implementation=implementation, num_hidden_layers=2), **fields)
    plain_loss = loss_of(model, **INPUTS)
    plain_loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}
    model.zero_grad()

    compiled = torch.compile(model, fullgraph=True, backend="eager")
    loss = loss_of(compiled, **INPUTS)
    loss.backward()

    torch.testing.assert_close(loss, plain_loss)
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, plain[name])
    torch.testing.assert_close(output_of(compiled, **INPUTS), output_of(model, **INPUTS))


# ------------------------------------------------------------------------------------------------ the Trainer


class Sequences(Dataset):
    """Sixteen sequences to learn by heart."""

    def __init__(self, seed: int = 0) -> None:
        self.ids = token_ids(16, 8, seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def trainer(path, steps: int = 8, stop_at: int | None = None, fields: dict | None = None, **arguments) -> Trainer:
    torch.manual_seed(0)
    model = prefixed(tiny_model(), task_type="CAUSAL_LM", **(fields or {}))
    settings = {
        "output_dir": str(path),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return Trainer(
        model,
        TrainingArguments(**{**settings, **arguments}),
        train_dataset=Sequences(),
        eval_dataset=Sequences(seed=3),
        callbacks=[StopAt(stop_at)] if stop_at else [],
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reparameterization": "mlp", "sharing": "all", "encoder_dropout": 0.2},
        {"reparameterization": "linear", "gating": True, "init_weights": True, "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_resuming_gives_the_loss_curve_of_an_uninterrupted_run(fields, tmp_path):
    whole = trainer(tmp_path / "whole", fields=fields)
    whole.train()
    interrupted = trainer(tmp_path / "interrupted", stop_at=4, fields=fields)
    interrupted.train()
    assert losses(interrupted) == losses(whole)[:4]

    resumed = trainer(tmp_path / "interrupted", fields=fields)
    resumed.train(resume_from_checkpoint=True)

    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 8
    for name, parameter in adapter_parameters(whole.model).items():
        assert torch.equal(adapter_parameters(resumed.model)[name], parameter)
        assert adapter_parameters(resumed.model)[name].requires_grad


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    run = trainer(
        tmp_path,
        steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
    )
    run.train()

    history = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = max(history, key=history.get)
    assert len(set(history.values())) == 3
    assert best != 6
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(history[best], abs=1e-6)


CONTINUE = """
import json, sys
import torch
from models import adapter_parameters, loss_of, output_of, task_inputs, tiny_model
from peft import PeftModel
import peft_prefix_plus

torch.set_num_threads(1)
path, results = sys.argv[1:]
inputs = task_inputs("CAUSAL_LM")
logits = output_of(PeftModel.from_pretrained(tiny_model(), path), **inputs)
model = PeftModel.from_pretrained(tiny_model(), path, is_trainable=True)
optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.5)
losses = []
for _ in range(3):
    loss = loss_of(model, **inputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
torch.save({"logits": logits, "losses": losses}, results)
"""


def test_a_new_process_gets_the_same_logits_and_goes_on_from_the_same_loss(run_in_new_process, tmp_path):
    model = prefixed(tiny_model(), task_type="CAUSAL_LM", reparameterization="mlp")
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.5)
    history = []
    for step in range(5):
        if step == 2:
            model.save_pretrained(tmp_path / "adapter")
            logits = output_of(model, **INPUTS)
        loss = loss_of(model, **INPUTS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())

    run_in_new_process(CONTINUE, tmp_path / "adapter", tmp_path / "results.pt")

    results = torch.load(tmp_path / "results.pt")
    assert torch.equal(results["logits"], logits)
    assert results["losses"] == history[2:]
    assert history[-1] < history[0]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["reparameterization"] == "mlp"


def test_a_saved_adapter_can_be_trained_on_in_this_process(tmp_path):
    prefixed(tiny_model(), task_type="CAUSAL_LM").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)

    loss_of(model, **INPUTS).backward()

    assert all(parameter.grad.abs().max() > 0 for parameter in adapter_parameters(model).values())


@pytest.mark.parametrize("fields", [{}, {"gating": True}, {"position_free": False}], ids=str)
def test_the_transforms_of_torch_func(fields):
    from torch.func import functional_call, grad, vmap

    model = prefixed(tiny_model(), **fields).eval().double()
    parameters = adapter_parameters(model)
    ids = token_ids(3, 7)

    def loss(values, row):
        logits = functional_call(model, values, (row[None],)).logits
        return logits.square().mean()

    values = {name: parameter.detach() for name, parameter in parameters.items()}
    of_rows = vmap(grad(loss), in_dims=(None, 0))(values, ids)
    for row in range(len(ids)):
        model.zero_grad()
        model(ids[row][None]).logits.square().mean().backward()
        found = grad(loss)(values, ids[row])
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(of_rows[name][row], parameter.grad, rtol=1e-6, atol=1e-9)
