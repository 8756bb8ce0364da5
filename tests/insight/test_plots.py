"""What the figures show is what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import prefixed, tiny_model, token_ids
from transformers.trainer_callback import TrainerState

from peft_prefix_plus import (
    plot_attention_mass,
    plot_prefix_contribution,
    plot_prefix_norms,
    plot_training_curve,
    prefix_attention_mass,
    prefix_contribution,
    prefix_key_values,
)


LOG = [
    {"step": 5, "loss": 3.0, "learning_rate": 0.1},
    {"step": 5, "eval_loss": 3.5},
    {"step": 10, "loss": 2.0},
    {"step": 10, "eval_loss": 2.5},
    {"step": 10, "train_loss": 2.5, "train_runtime": 1.0},
]


def cells(axes: Any) -> np.ndarray:
    (image,) = axes.images
    return np.asarray(image.get_array().filled(np.nan))


def row_names(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.parametrize(
    ("measure", "plot", "fields"),
    [
        (prefix_attention_mass, plot_attention_mass, {}),
        (prefix_contribution, plot_prefix_contribution, {"decoupled": True}),
    ],
    ids=["mass", "contribution"],
)
def test_the_heatmap_shows_every_head(measure: Any, plot: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    measured = measure(prefixed(tiny_model(), **fields), input_ids=token_ids())
    figure = plot(measured)
    axes = figure.axes[0]
    assert row_names(axes) == list(measured)
    np.testing.assert_allclose(cells(axes), torch.stack(list(measured.values())).numpy(), rtol=1e-6)
    assert axes.images[0].get_clim() == (0.0, 1.0)
    figure.savefig(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_modules_with_fewer_heads_have_empty_cells() -> None:
    figure = plot_attention_mass({"a": torch.tensor([0.25, 0.5, 0.75]), "b": torch.tensor([1.0])})
    np.testing.assert_array_equal(cells(figure.axes[0]), [[0.25, 0.5, 0.75], [1.0, np.nan, np.nan]])


def test_norms_of_keys_and_values() -> None:
    model = prefixed(tiny_model(), reparameterization="linear", layers_to_transform=[0, 2])
    figure = plot_prefix_norms(model)
    for index, title in enumerate(("keys", "values")):
        axes = figure.axes[index]
        assert axes.get_title() == title
        expected = [
            [np.linalg.norm(pair[index][:, token].numpy()) for token in range(3)]
            for pair in prefix_key_values(model).values()
        ]
        np.testing.assert_allclose(cells(axes), expected, rtol=1e-5)
    assert row_names(figure.axes[0]) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]


@pytest.mark.parametrize("form", ["list", "state", "path", "string"])
def test_the_curves_of_a_training(form: str, tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": LOG}), encoding="utf-8")
    state = {"list": LOG, "state": TrainerState(log_history=LOG), "path": path, "string": str(path)}[form]
    (axes,) = plot_training_curve(state).axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {"training": [[5, 3.0], [10, 2.0]], "evaluation": [[5, 3.5], [10, 2.5]]}


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`masses` is empty"):
        plot_attention_mass({})
    with pytest.raises(ValueError, match="`contributions` is empty"):
        plot_prefix_contribution({})
    with pytest.raises(ValueError, match="1 entries and none with 'step' and 'loss'"):
        plot_training_curve([{"step": 3, "train_loss": 1.0}])
    with pytest.raises(TypeError, match="or a list of dicts, got int"):
        plot_training_curve(3)
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="has no 'log_history'"):
        plot_training_curve(tmp_path / "other.json")
    with pytest.raises(ValueError, match="no PREFIX_PLUS adapter named 'none'"):
        plot_prefix_norms(prefixed(tiny_model()), "none")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "peft-prefix-plus\[plot\]"'):
        plot_attention_mass({"a": torch.ones(2)})
