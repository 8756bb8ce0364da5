"""peft-prefix-plus: prefix tuning for PEFT, without its limits. Importing it registers the method PREFIX_PLUS."""

import importlib
from typing import TYPE_CHECKING, Any

from .adapters.composition import compose
from .adapters.loading import load_adapters
from .attention import prefix_attention
from .config import PrefixPlusConfig
from .conversion.adapterhub import from_adapterhub, to_adapterhub
from .conversion.cartridge import from_cartridge, to_cartridge
from .conversion.flatten import flatten, prefix_key_values
from .conversion.key_values import from_key_values, to_key_values
from .conversion.prefix_tuning import from_prefix_tuning, to_prefix_tuning
from .insight.attention_mass import prefix_attention_mass
from .insight.contribution import prefix_contribution
from .insight.plots import plot_attention_mass, plot_prefix_contribution, plot_prefix_norms, plot_training_curve
from .insight.pruning import LayerSuggestion, prune_layers, suggest_layers
from .layer import PrefixPlusLayer
from .model import PrefixPlusModel
from .probing.examples import example_inputs
from .probing.recording import PROBE_NAME, probe_attention
from .registration import METHOD_NAME, register
from .starting.compaction import AttentionResidual
from .starting.fitting import Residual
from .starting.initialization import initialize_from_key_values, initialize_from_text
from .training.parameter_groups import prefix_plus_param_groups


if TYPE_CHECKING:
    from .training.distill import distill
    from .training.distillation import DistillationTrainer
    from .training.self_study import SelfStudy, Template


__all__ = [
    "AttentionResidual",
    "DistillationTrainer",
    "LayerSuggestion",
    "PrefixPlusConfig",
    "PrefixPlusLayer",
    "PrefixPlusModel",
    "Residual",
    "SelfStudy",
    "Template",
    "compose",
    "distill",
    "example_inputs",
    "flatten",
    "from_adapterhub",
    "from_cartridge",
    "from_key_values",
    "from_prefix_tuning",
    "initialize_from_key_values",
    "initialize_from_text",
    "load_adapters",
    "plot_attention_mass",
    "plot_prefix_contribution",
    "plot_prefix_norms",
    "plot_training_curve",
    "prefix_attention_mass",
    "prefix_contribution",
    "prefix_key_values",
    "prefix_plus_param_groups",
    "prune_layers",
    "suggest_layers",
    "to_adapterhub",
    "to_cartridge",
    "to_key_values",
    "to_prefix_tuning",
]

__version__ = "0.1.0"

register(PrefixPlusConfig, PrefixPlusModel, {METHOD_NAME: prefix_attention, PROBE_NAME: probe_attention})


def __getattr__(name: str) -> Any:
    """Import names that need the Trainer when they are first used: it takes as long to import as everything else."""
    modules = {
        "distill": "distill",
        "DistillationTrainer": "distillation",
        "SelfStudy": "self_study",
        "Template": "self_study",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".training.{modules[name]}", __name__), name)
    globals()[name] = value
    return value
