"""Running a function in two processes on the CPU, and the tiny model that the tests of sharding train in them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import GATE_SCALE, joint_config
from peft import PeftModel, get_peft_model
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM


PROCESSES = 2
SECONDS = 240
IDS = torch.arange(3, 35).view(4, 8)
LEARNING_RATE = 0.5

SHARINGS = ("none", "input", "projection", "all")
ADAPTERS = [
    ("none", "none"),
    ("log", "none"),
    *((name, sharing) for name in ("linear", "mlp") for sharing in SHARINGS),
]
"""A reparameterization and a sharing for each adapter: all are active at once, and so are trained in one run."""


@dataclass(frozen=True)
class Case:
    """
    How the adapters are trained.

    Attributes:
        layers: The layers that have prefixes; `None` for all.
        checkpointing: Whether gradient checkpointing is reentrant; `None` for no checkpointing.
        gating: Whether there is a further adapter, one with a gate.
    """

    layers: tuple[int, ...] | None = None
    checkpointing: bool | None = None
    gating: bool = False


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes))


def adapted(case: Case, base: Any = None) -> Any:
    """The tiny Llama with all adapters, the same in every process."""
    model: Any = base_model() if base is None else base
    torch.manual_seed(1)
    if case.checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": case.checkpointing})
    fields: dict[str, Any] = dict(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_dim=4, prefix_scaling=2.0)
    fields["layers_to_transform"] = None if case.layers is None else list(case.layers)
    configs = {
        f"{name}_{sharing}": joint_config(reparameterization=name, sharing=sharing, **fields)
        for name, sharing in ADAPTERS
    }
    if case.gating:
        configs["gated"] = joint_config(gating=True, **fields)
    names = list(configs)
    model = get_peft_model(model, configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    model.base_model.set_adapter(names)
    return model


def loaded(folder: Path) -> Any:
    """The tiny Llama with all adapters that were saved in a folder, in the order in which they are active."""
    names = [f"{name}_{sharing}" for name, sharing in ADAPTERS] + ["gated"] * (folder / "gated").exists()
    model = PeftModel.from_pretrained(base_model(), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, name)
    model.base_model.set_adapter(names)
    return model


def rows_of(rank: int) -> torch.Tensor:
    """A process's part of the batch."""
    return IDS.chunk(PROCESSES)[rank]


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, put together from all processes if it is sharded."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_two_steps(
    model: Any, optimizer: Any, ids: torch.Tensor, backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
) -> dict[str, Any]:
    """Take two steps; return their gradients, and the parameters afterwards."""
    model.train()
    results: dict[str, Any] = {"gradients": []}
    for _ in range(2):
        optimizer.zero_grad()
        backward(model(input_ids=ids, labels=ids).loss)
        results["gradients"].append({name: full(parameter.grad) for name, parameter in trainable(model).items()})
        optimizer.step()
    results["parameters"] = {name: full(parameter) for name, parameter in trainable(model).items()}
    return results


def optimizer_of(model: torch.nn.Module) -> torch.optim.SGD:
    """An optimizer that moves a gate as far as if it were its parameter, which it is `GATE_SCALE` times."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in trainable(model).items():
        groups["prefix_plus_gate" in name].append(parameter)
    rates = {True: LEARNING_RATE / GATE_SCALE**2, False: LEARNING_RATE}
    return torch.optim.SGD([{"params": groups[each], "lr": rates[each]} for each in groups if groups[each]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.clone()


def of_one_process(case: Case) -> dict[str, Any]:
    """What one process gets on the whole batch."""
    model = adapted(case)
    results = train_two_steps(model, optimizer_of(model), IDS)
    return {**results, "logits": logits_of(model)}


def assert_same_training(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Assert that each of the processes got what one process gets on the whole batch."""
    for results in found:
        for step in range(2):
            assert_close(results["gradients"][step], expected["gradients"][step])
        assert_close(results["parameters"], expected["parameters"])
    for name, parameter in found[0]["parameters"].items():
        assert torch.equal(found[1]["parameters"][name], parameter), name


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # the mean over halves of the batch rounds otherwise than the mean over all of it; gradients are of 1e-3 to 1
        assert (found[name] - tensor).abs().max() <= 2e-6 + 1e-4 * tensor.abs().max(), name


def run(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """
    Call `work(rank, folder, *args)` in every process; return what each returned, by rank.

    Raises:
        TimeoutError: After `SECONDS`; the processes are killed.
    """
    processes = torch.multiprocessing.spawn(_enter, (work, str(folder), args), nprocs=PROCESSES, join=False)
    deadline = time.monotonic() + SECONDS
    while not processes.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            raise TimeoutError(f"{work.__name__} did not end in {SECONDS} s; it left {sorted(os.listdir(folder))}")
    return [torch.load(folder / f"results{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def _enter(rank: int, work: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT="29500"
    )  # asked for by accelerate, not used: the group is there
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    torch.save(work(rank, Path(folder), *args), f"{folder}/results{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    # gloo's threads may outlive the group, and an interpreter that ends beside them can hang (pytorch issue 190489)
    os._exit(0)
