"""
The app: its commands, with the options that their settings have. `peft_prefix_plus_cli.COMMANDS` has the first line of each for the
help of `prefix-plus`, which answers without this module.
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
    """Teach a frozen model by a prefix, and save it as an adapter."""
    training.train(settings, config)
    print(f"The adapter is in {settings.output}.")


@command(
    app,
    {"Distillation": distillation.DistillationSettings, "Prefix": distillation.DocumentPrefixConfig},
    inherited=[PeftConfig],
)
def distill(settings: distillation.DistillationSettings, config: distillation.DocumentPrefixConfig) -> None:
    """Teach a prefix what a document in the context does, and save it as an adapter."""
    distillation.distill_document(settings, config)
    print(f"The adapter is in {settings.output}.")


@command(app, {"Options": generation.GenerationSettings})
def generate(settings: generation.GenerationSettings) -> None:
    """Complete prompts with an adapter."""
    generation.generate(settings)


@command(app, {"Options": serving.ServingSettings, "With --engine transformers": serving.TransformersSettings})
def serve(settings: serving.ServingSettings, transformers_settings: serving.TransformersSettings) -> None:
    """Serve a model and its adapters by an OpenAI-compatible server, each adapter as a model of its own name."""
    serving.serve(settings, transformers_settings)


@command(app, {"Options": conversion.ConversionSettings})
def convert(settings: conversion.ConversionSettings) -> None:
    """Turn an adapter into one of another format with the same output: PEFT's, AdapterHub's, or keys and values."""
    title = conversion.convert(settings)
    print(f"The {title} is in {settings.output}.")


@command(app, {"Options": parameters.CountingSettings})
def params(settings: parameters.CountingSettings) -> None:
    """Count the trainable parameters of every reparameterization and sharing; no weights are needed."""
    parameters.params(settings)


@command(app, {"Options": inspection.InspectionSettings})
def inspect(settings: inspection.InspectionSettings) -> None:
    """Show what the prefix in each layer of an adapter is like and, with data, how much attention it draws."""
    inspection.inspect(settings)


@command(app, {"Options": DemoSettings})
def demo(settings: DemoSettings) -> None:
    """Make a small language model, or load one, and teach it table-to-text by a prefix."""
    run_demo(settings)


@app.command(
    name="run", cls=PlainCommand, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    program: Annotated[str, typer.Argument(help="A Python file, or a command that a Python package installs.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The program's arguments.")] = None,
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is a module, as after python -m.")] = False,
) -> None:
    """Run another Python program in which PEFT knows the method."""
    run_program(program, arguments or [], module)
