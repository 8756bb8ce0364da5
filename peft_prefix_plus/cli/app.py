"""
The app and its commands, with options from the fields of their settings.

`peft_prefix_plus_cli.COMMANDS` repeats the description of each command, so that `prefix-plus --help` does not need this module.
"""

from __future__ import annotations

from typing import Annotated

import typer
from peft import PeftConfig

from ..config import PrefixPlusConfig
from . import conversion, distillation, generation, inspection, parameters, serving, training
from .demo import DemoSettings, run_demo
from .options import PlainCommand, command
from .running import run_program


app = typer.Typer(rich_markup_mode=None)


@command(
    app,
    {"Training": training.TrainingSettings, "Prefix": PrefixPlusConfig},
    inherited=[PeftConfig],
    has_config_file=True,
)
def train(settings: training.TrainingSettings, config: PrefixPlusConfig) -> None:
    """Train a prefix for a frozen model, and save it as an adapter."""
    training.train(settings, config)
    print(f"The adapter is in {settings.output}.")


@command(
    app,
    {"Distillation": distillation.DistillationSettings, "Prefix": distillation.DocumentPrefixConfig},
    inherited=[PeftConfig],
)
def distill(settings: distillation.DistillationSettings, config: distillation.DocumentPrefixConfig) -> None:
    """Train a prefix to replace a document in the context, and save it as an adapter."""
    distillation.distill_document(settings, config)
    print(f"The adapter is in {settings.output}.")


@command(app, {"Options": generation.GenerationSettings})
def generate(settings: generation.GenerationSettings) -> None:
    """Complete prompts with an adapter."""
    generation.generate(settings)


@command(app, {"Options": serving.ServingSettings, "With --engine transformers": serving.TransformersSettings})
def serve(settings: serving.ServingSettings, transformers_settings: serving.TransformersSettings) -> None:
    """Serve a model and its adapters with an OpenAI-compatible server, each adapter as a model with its own name."""
    serving.serve(settings, transformers_settings)


@command(app, {"Options": conversion.ConversionSettings})
def convert(settings: conversion.ConversionSettings) -> None:
    """Convert an adapter to another format with the same output: PEFT's, AdapterHub's, or keys and values."""
    title = conversion.convert(settings)
    print(f"The {title} is in {settings.output}.")


@command(app, {"Options": parameters.CountingSettings})
def params(settings: parameters.CountingSettings) -> None:
    """Count the trainable parameters of every reparameterization and sharing, without a model's weights."""
    parameters.params(settings)


@command(app, {"Options": inspection.InspectionSettings})
def inspect(settings: inspection.InspectionSettings) -> None:
    """Show the size of the prefix in each layer of an adapter and, with data, how much it contributes."""
    inspection.inspect(settings)


@command(app, {"Options": DemoSettings})
def demo(settings: DemoSettings) -> None:
    """Train a small language model, or load one, and train a prefix for table-to-text."""
    run_demo(settings)


@app.command(
    name="run", cls=PlainCommand, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    program: Annotated[str, typer.Argument(help="A Python file, or a command that a Python package installs.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The program's arguments.")] = None,
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is a module, as after python -m.")] = False,
) -> None:
    """Run another Python program with the method known to PEFT."""
    run_program(program, arguments or [], module)
