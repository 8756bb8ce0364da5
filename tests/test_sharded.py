"""Training of a model that is sharded over two processes, with every kind of encoder at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharding import (
    LEARNING_RATE,
    PROCESSES,
    Case,
    adapted,
    assert_same_training,
    loaded,
    logits_of,
    of_one_process,
    rows_of,
    run,
    train_two_steps,
    trainable,
)

from peft_prefix_plus.attention import dispatch


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

CASES = {
    "plain": Case(gating=True),
    "subset-reentrant": Case(layers=(0, 2), checkpointing=True),
    "subset-checkpointing": Case(layers=(1, 2), checkpointing=False),
}


def shard(model: Any) -> None:
    """Each decoder layer and the rest, as FSDP2's documentation says."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train_with_fsdp2(rank: int, folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    calls = count_fused_calls()
    results = {}
    for name, case in CASES.items():
        model = adapted(case)
        shard(model)
        optimizer = torch.optim.SGD(trainable(model).values(), lr=LEARNING_RATE)
        results[name] = train_two_steps(model, optimizer, rows_of(rank))
        assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
        state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(str(folder / name), state_dict=state_dict)
        results[name]["logits"] = logits_of(model)
        model.reshard()
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.mul_(2.0)
        results[name]["logits of doubled"] = logits_of(model)
    assert calls, "the fused attention function was not called"
    return results


def count_fused_calls() -> list[None]:
    """A list that grows with each call of the fused attention function."""
    calls: list[None] = []
    fused_attention = dispatch.fused_attention

    def counted(*args: Any) -> torch.Tensor:
        calls.append(None)
        return fused_attention(*args)

    dispatch.fused_attention = counted
    return calls


@pytest.fixture(scope="module")
def with_fsdp2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where the adapters were saved, and what each process got, by case: to start processes takes seconds."""
    folder = tmp_path_factory.mktemp("fsdp2")
    return folder, run(train_with_fsdp2, folder)


@pytest.mark.parametrize("name", CASES)
def test_training_with_fsdp2_is_that_of_one_process(with_fsdp2, name):
    _, processes = with_fsdp2
    assert_same_training([results[name] for results in processes], of_one_process(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_what_fsdp2_trained_is_saved_whole(with_fsdp2, name):
    folder, (results, _) = with_fsdp2
    model = loaded(folder / name)

    torch.testing.assert_close(logits_of(model), results[name]["logits"], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.mul_(2.0)
    torch.testing.assert_close(logits_of(model), results[name]["logits of doubled"], rtol=1e-5, atol=1e-5)
