"""A reparameterization of one's own is one class: everything that an adapter can do works with it, and nothing else lists it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from models import prefix_config, tiny_model, token_ids
from peft import PeftModel, get_peft_model

import peft_prefix_plus as package
from peft_prefix_plus.config import Reparameterization
from peft_prefix_plus.encoders import ENCODERS, LinearEncoder, PrefixEncoder


TOKENS = token_ids(2, 6)


@pytest.fixture
def squared() -> Iterator[type[PrefixEncoder]]:
    """A reparameterization whose projection reads P' times its absolute value."""

    class SquaredEncoder(LinearEncoder, reparameterization="squared"):
        def features(self) -> torch.Tensor:
            produced = super().features()
            return produced * produced.abs()

        def norm_of_features(self, width: int) -> float:
            return (
                3.0 / width
            ) ** 0.5  # of P', the square of a number has the mean 1 / width and its fourth power 3 / width²

    yield SquaredEncoder
    del ENCODERS["squared"]


def adapted(sharing: str = "projection") -> PeftModel:
    config = prefix_config(reparameterization="squared", sharing=sharing, encoder_dim=8, init_weights=False)
    return get_peft_model(tiny_model(), config)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_the_types_know_the_names_of_this_package() -> None:
    assert get_args(Reparameterization) == tuple(ENCODERS)


@pytest.mark.parametrize("sharing", ["none", "input", "projection", "all"])
def test_it_trains_saves_loads_and_flattens(squared: type[PrefixEncoder], sharing: str, tmp_path: Path) -> None:
    model = adapted(sharing)
    optimizer = torch.optim.AdamW(package.prefix_plus_param_groups(model, lr=0.02, projection_lr=0.01))
    start = logits(model)
    for _ in range(3):
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model)
    assert not torch.allclose(trained, start, atol=1e-3)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    layers = [module for module in loaded.modules() if isinstance(module, package.PrefixPlusLayer)]
    assert layers and all(isinstance(layer.encoder("default"), squared) for layer in layers)
    torch.testing.assert_close(logits(loaded), trained, rtol=0, atol=0)
    package.flatten(loaded)
    assert loaded.peft_config["default"].reparameterization == "none"
    torch.testing.assert_close(logits(loaded), trained)


def test_a_start_from_given_keys_and_values_is_fitted_by_least_squares(squared: type[PrefixEncoder]) -> None:
    model = adapted()
    generator = torch.Generator().manual_seed(0)
    names = package.prefix_key_values(model)
    given = {
        name: tuple(torch.randn(states.shape, generator=generator) for states in pair) for name, pair in names.items()
    }
    residuals = package.initialize_from_key_values(model, given)
    for name, pair in package.prefix_key_values(model).items():
        for found, wanted, residual in zip(pair, given[name], residuals[name], strict=True):
            assert ((found - wanted).norm() / wanted.norm()).item() == pytest.approx(residual, rel=1e-4)
            assert residual < 0.9  # of zeros, it would be 1


def test_it_can_be_pruned(squared: type[PrefixEncoder]) -> None:
    model = adapted("all")
    before = package.prefix_key_values(model)
    package.prune_layers(model, [-1])
    (name,) = package.prefix_key_values(model)
    for found, wanted in zip(package.prefix_key_values(model)[name], before[name], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_its_parameters_are_counted_by_the_command(squared: type[PrefixEncoder]) -> None:
    parameters = pytest.importorskip("peft_prefix_plus.cli.parameters")
    counts = {
        (row.reparameterization, row.sharing): row.trainable
        for row in parameters.count_all(parameters.CountingSettings())
    }
    for sharing in ("none", "input", "projection", "all"):
        assert counts["squared", sharing] == counts["linear", sharing]


def test_a_name_that_no_class_has_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`reparameterization` must be one of 'none', 'log', 'linear', 'mlp', got 'squared'"
    ):
        prefix_config(reparameterization="squared")


def test_a_start_that_cannot_be_fitted_is_refused_and_changes_nothing() -> None:
    class HeldEncoder(PrefixEncoder):
        def __init__(self, encoder: PrefixEncoder) -> None:
            super().__init__(encoder.shape)
            self.held = encoder

        def produce(self) -> tuple[torch.Tensor, torch.Tensor]:
            return self.held.produce()

    model = get_peft_model(tiny_model(), prefix_config(init_weights=False))
    layers = [module for module in model.modules() if isinstance(module, package.PrefixPlusLayer)]
    layers[-1].replace_encoder("default", HeldEncoder(layers[-1].encoder("default")))
    before = package.prefix_key_values(model)
    with pytest.raises(ValueError, match=r"\(HeldEncoder\) cannot be fitted to given keys and values"):
        package.initialize_from_key_values(model, {name: (key + 1, value) for name, (key, value) in before.items()})
    for name, pair in package.prefix_key_values(model).items():
        for found, wanted in zip(pair, before[name], strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
