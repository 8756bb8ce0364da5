"""Training of a model that is sharded over two processes, with every kind of encoder at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import fsdp_auto_wrap_policy
from sharding import (
    IDS,
    PROCESSES,
    Case,
    adapted,
    assert_same_training,
    base_model,
    loaded,
    logits_of,
    of_one_process,
    optimizer_of,
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
        optimizer = optimizer_of(model)
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


# ------------------------------------------------------------------------------------------------ through accelerate


def as_if_fsdp2(**settings: Any) -> Any:
    """An accelerator that takes the FSDP2 route. Accelerate takes it on accelerators only, though nothing in it needs one."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **settings)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator


def train_with_accelerate(rank: int, folder: Path) -> dict[str, Any]:
    accelerator = as_if_fsdp2(cpu_ram_efficient_loading=True, reshard_after_forward=True)
    model = adapted(CASES["plain"])
    optimizer = optimizer_of(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert [type(layer).__name__ for layer in model.get_base_model().model.layers] == ["FSDPLlamaDecoderLayer"] * 3
    results = train_two_steps(model, optimizer, rows_of(rank), accelerator.backward)
    state_dict = accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(str(folder), state_dict=state_dict, is_main_process=accelerator.is_main_process)
    results["logits"] = logits_of(model)
    return results


def test_training_through_accelerate_from_the_meta_device_is_that_of_one_process(tmp_path):
    pytest.importorskip("accelerate")
    processes = run(train_with_accelerate, tmp_path)

    assert_same_training(processes, of_one_process(CASES["plain"]))
    torch.testing.assert_close(logits_of(loaded(tmp_path)), processes[0]["logits"], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ FSDP1


def train_with_fsdp1(rank: int, folder: Path) -> list[dict[str, Any]]:
    """With each decoder layer wrapped, and with the policy of PEFT, which the Trainer takes."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    results = []
    for policy_of in (lambda model: ModuleWrapPolicy({LlamaDecoderLayer}), fsdp_auto_wrap_policy):
        model: Any = adapted(CASES["plain"])
        model = FullyShardedDataParallel(
            model, auto_wrap_policy=policy_of(model), use_orig_params=True, device_id=torch.device("cpu")
        )
        optimizer = optimizer_of(model)
        found: dict[str, Any] = {"gradients": []}
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=rows_of(rank), labels=rows_of(rank)).loss.backward()
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                found["gradients"].append(copies(model, lambda parameter: parameter.grad))
            optimizer.step()
        with FullyShardedDataParallel.summon_full_params(model):
            found["parameters"] = copies(model, lambda parameter: parameter)
        results.append(found)
    return results


def copies(model: Any, of: Callable[[torch.nn.Parameter], Any]) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters or of something of them, by the name without that of FSDP1's wrappers."""
    return {
        name.replace("_fsdp_wrapped_module.", ""): of(parameter).detach().clone()
        for name, parameter in trainable(model).items()
    }


def test_training_with_fsdp1_is_that_of_one_process(tmp_path):
    expected = of_one_process(CASES["plain"])
    for found in zip(*run(train_with_fsdp1, tmp_path), strict=True):
        assert_same_training(list(found), expected)


# ------------------------------------------------------------------------------------------------ DeepSpeed


def train_with_zero_3(rank: int, folder: Path) -> dict[str, Any]:
    """ZeRO-3, the base model partitioned from its construction on, as transformers does when it loads one."""
    import deepspeed

    # an optional kernel, which would be compiled now
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    config = {
        "train_micro_batch_size_per_gpu": len(IDS) // PROCESSES,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        base = base_model()
    with deepspeed.zero.GatheredParameters(list(base.parameters()), modifier_rank=0):
        for parameter, value in zip(base.parameters(), base_model().parameters(), strict=True):
            parameter.data.copy_(value)
    model = adapted(CASES["plain"], base)
    optimizer = optimizer_of(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    results: dict[str, Any] = {"gradients": []}
    for _ in range(2):
        engine.backward(engine(input_ids=rows_of(rank), labels=rows_of(rank)).loss)
        results["gradients"].append(copies(engine.module, deepspeed.utils.safe_get_full_grad))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(trainable(model).values())):
        results["parameters"] = copies(engine.module, lambda parameter: parameter)
    # as transformers' Trainer saves a PeftModel: what is not trainable is left out
    state_dict = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if rank == 0:
        engine.module.save_pretrained(str(folder), state_dict=state_dict)
    engine.eval()
    with torch.no_grad():
        results["logits"] = engine(input_ids=IDS).logits.clone()
    return results


@pytest.fixture(scope="module")
def with_zero_3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where the adapters were saved, and what each process got."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero3")
    return folder, run(train_with_zero_3, folder)


def test_training_with_zero_3_is_that_of_one_process(with_zero_3):
    _, processes = with_zero_3
    assert_same_training(processes, of_one_process(CASES["plain"]))


def test_what_zero_3_trained_is_saved_whole_though_what_is_frozen_is_left_out(with_zero_3):
    folder, (results, _) = with_zero_3
    torch.testing.assert_close(logits_of(loaded(folder)), results["logits"], rtol=1e-5, atol=1e-5)
