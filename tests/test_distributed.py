"""Data-parallel training over two processes on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_prefix_plus import PrefixPlusConfig


IDS = torch.arange(3, 35).view(4, 8)
STEPS = 2


def adapted(sharing):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    config = PrefixPlusConfig(
        reparameterization="mlp", sharing=sharing, encoder_dim=6, init_weights=False, layers_to_transform=[1, 2]
    )
    return get_peft_model(model, config)


def train(model, step, rows):
    model.zero_grad()
    step(input_ids=IDS[rows], labels=IDS[rows]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def work(rank, sharing, folder):
    """One of two processes: two steps on its half of the rows; the gradients of the second go to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = adapted(sharing)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(STEPS):  # an unused parameter would make the second step an error
        gradients = train(model, parallel, slice(2 * rank, 2 * rank + 2))
    torch.save(gradients, f"{folder}/gradients{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("sharing", ["none", "all"])
def test_data_parallel_gradients_are_those_of_one_process(tmp_path, sharing):
    torch.multiprocessing.spawn(work, (sharing, str(tmp_path)), nprocs=2)
    model = adapted(sharing)
    expected = train(model, model, slice(None))
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients{rank}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # the mean over halves rounds otherwise than the mean over all rows
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
