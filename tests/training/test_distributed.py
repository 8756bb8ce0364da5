"""Data-parallel training over two processes on the CPU."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from sharding import IDS, rows_of, run
from transformers import LlamaConfig, LlamaForCausalLM

from peft_prefix_plus import PrefixPlusConfig


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
    step(input_ids=rows, labels=rows).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def work(rank, folder, sharing):
    """One of two processes: two steps on its half of the rows; the gradients of the second."""
    model = adapted(sharing)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(STEPS):  # an unused parameter would make the second step an error
        gradients = train(model, parallel, rows_of(rank))
    return gradients


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("sharing", ["none", "all"])
def test_data_parallel_gradients_are_those_of_one_process(tmp_path, sharing):
    processes = run(work, tmp_path, sharing)
    model = adapted(sharing)
    expected = train(model, model, IDS)
    for found in processes:
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # the mean over halves rounds otherwise than the mean over all rows
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
