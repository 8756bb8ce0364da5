"""`nn.DataParallel`: the copies of a model that it runs, which have plain tensors in place of parameters."""

from __future__ import annotations

import threading

import pytest
import torch
from models import prefixed, tiny_model, token_ids
from torch import nn


def replicate(model: nn.Module) -> nn.Module:
    """Copy a model as `torch.nn.parallel.replicate` does, which wants GPUs: its steps, on the CPU."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
                replica._former_parameters[name] = getattr(replica, name)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return replicas[model]


FORMS = {
    "default": {},
    "gated": {"gating": True},
    "decoupled": {"decoupled": True},
    "shared": {"reparameterization": "mlp", "sharing": "all"},
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("form", FORMS)
def test_replicas_in_evaluation_compute_what_the_model_does(form, architecture):
    task_type = "SEQ_2_SEQ_LM" if architecture == "t5" else "CAUSAL_LM"
    model = prefixed(tiny_model(architecture, task_type), **FORMS[form]).eval()
    rows = [
        {
            "input_ids": token_ids(seed=seed),
            **({"decoder_input_ids": token_ids(seed=seed + 9)} if task_type[0] == "S" else {}),
        }
        for seed in (0, 1)
    ]
    replicas = [replicate(model) for _ in rows]
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] = replicas[index](**rows[index]).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for index, inputs in enumerate(rows):  # only now: the model keeps what it produced
        with torch.no_grad():
            assert torch.equal(found[index], model(**inputs).logits)


def test_replicas_in_training_pass_gradients_to_the_model():
    model = prefixed(tiny_model(), gating=True).train()
    replicate(model)(input_ids=token_ids(), labels=token_ids()).loss.backward()

    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
