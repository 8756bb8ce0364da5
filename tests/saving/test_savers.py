"""What tools that know nothing of the method do to an adapter: save what is trainable alone, decay it, ask for gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from models import output_of, prefix_layers, prefixed, task_inputs, tiny_model, token_ids
from peft import PeftModel


FORMS = {
    "direct": {},
    **{
        f"{reparameterization}-{sharing}": {"reparameterization": reparameterization, "sharing": sharing}
        for reparameterization, sharing in itertools.product(("linear", "mlp"), ("none", "input", "projection", "all"))
    },
    "gated": {"gating": True},
    "gated-mlp": {"gating": True, "reparameterization": "mlp"},
    "decoupled": {"decoupled": True},
    "decoupled-linear": {"decoupled": True, "reparameterization": "linear"},
    "subset": {"layers_to_transform": [1], "reparameterization": "mlp", "sharing": "all"},
}
EACH_FORM = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a saver keeps that leaves out what is frozen."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@EACH_FORM
def test_what_is_trainable_is_all_that_a_saved_adapter_needs(fields, tmp_path):
    model = prefixed(tiny_model(), prefix_scaling=0.3, **fields)
    expected = output_of(model, input_ids=token_ids())

    fresh = prefixed(tiny_model(), **fields)  # on the measured scale, and with another start
    assert (output_of(fresh, input_ids=token_ids()) - expected).abs().max() > 1e-3
    result = fresh.load_state_dict(trainable(model), strict=False)
    assert not result.unexpected_keys and not any("prefix_plus" in name for name in result.missing_keys)
    assert torch.equal(output_of(fresh, input_ids=token_ids()), expected)

    model.save_pretrained(tmp_path, state_dict=trainable(model))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(output_of(loaded, input_ids=token_ids()), expected)


@EACH_FORM
def test_weight_decay_leaves_the_scale_exactly_what_it_was(fields):
    model = prefixed(tiny_model(), **fields).train()
    layers = list(prefix_layers(model).values())
    before = [layer.encoder("default").scaling.values.clone() for layer in layers]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        sum(states.square().sum() for layer in layers for states in layer.prefix_key_value("default")).backward()
        optimizer.step()

    for layer, factors in zip(layers, before, strict=True):
        scaling = layer.encoder("default").scaling
        assert torch.equal(scaling.values, factors)
        assert (scaling.factors[0] - (1 - 1e-3) ** 200).abs() < 1e-4  # it was decayed


@EACH_FORM
def test_every_parameter_of_an_adapter_gets_a_gradient_from_the_default_start(fields):
    model = prefixed(tiny_model(), init_weights=True, **fields).train()
    inputs = task_inputs("CAUSAL_LM")
    model(**inputs).loss.backward()

    adapter = {name: parameter for name, parameter in model.named_parameters() if "prefix_plus" in name}
    assert adapter and all(parameter.requires_grad for parameter in adapter.values())
    for name, parameter in adapter.items():
        assert parameter.grad is not None, name
        if "prefix_plus_scaling" in name:
            assert not parameter.grad.any(), name
