"""
How well PREFIX_PLUS learns, against LoRA, PREFIX_TUNING, CARTRIDGE and prompt tuning.

At about equal numbers of trainable parameters and equal steps, each method runs with every learning rate of its own grid, and with
the best one for two more seeds (for the order of the training data, and for the method's own start).

On a real model (bfloat16, frozen), measured by loss, BLEU or exact match, forgetting, time and memory:

    python benchmarks/quality.py --model .cache/smollm2 --data .cache/e2e
    python benchmarks/quality.py --model .cache/smollm2 --data .cache/e2e --task e2e --methods default LoRA --seeds 1
    python benchmarks/quality.py --model HuggingFaceTB/SmolLM2-360M --task names --device cuda --workers 1

`make real-model` makes the model in .cache/smollm2. The tasks: e2e (attributes of a restaurant into a sentence), labels (an attribute's
value in a sentence; both from the E2E NLG files in --data), names (names of territories and languages in 12 languages).

Without --model, on a small model that trains itself from scratch, measured by loss; no downloads, about an hour on 2 cores:

    python benchmarks/quality.py
    python benchmarks/quality.py --task table
    python benchmarks/quality.py --scale large --device cuda --workers 1

Every result is a file of its own under --output, so that a benchmark that is broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import quality_data
import quality_real
import quality_real_tasks
import quality_small
from quality_runs import silence


REAL_DEFAULTS = {
    "data": Path(".cache/e2e"),
    "methods": [""],
    "rates": None,
    "steps": 120,
    "tokens": 20,
    "dtype": "bfloat16",
}
"""The options of the benchmark on a real model, which the small one does not have, and what they are if not given."""

SMALL_DEFAULTS = {"scale": "small"}
"""The same of the benchmark on the small model."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the Hub; without it, the small model")
    parser.add_argument("--task", "--tasks", nargs="+", dest="tasks", metavar="TASK", help="the tasks; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="trainings at the same time, a thread each"
    )
    parser.add_argument("--output", type=Path, help="where results go; quality-output, or a folder in it by default")
    real = parser.add_argument_group("on a real model")
    real.add_argument("--data", type=Path, help="folder with devset.csv and testset_w_refs.csv of E2E NLG; .cache/e2e")
    real.add_argument("--methods", nargs="+", metavar="PART", help="those with one of these in their names; all")
    real.add_argument("--rates", nargs="+", type=float, help="learning rates of all methods; each has its own")
    real.add_argument("--steps", type=int, help="of a training; 120")
    real.add_argument("--tokens", type=int, help="of the prefix, which the other methods' sizes follow; 20")
    real.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="of the base model; bfloat16")
    small = parser.add_argument_group("on the small model")
    small.add_argument("--scale", choices=quality_data.SCALES, help="small")
    options = parser.parse_args(arguments)

    own, other = (REAL_DEFAULTS, SMALL_DEFAULTS) if options.model else (SMALL_DEFAULTS, REAL_DEFAULTS)
    for name in other:
        if getattr(options, name) is not None:
            condition = "only without" if options.model else "only with"
            parser.error(f"--{name} is {condition} --model.")
    for name, default in own.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    tasks = list(quality_real_tasks.TASKS if options.model else quality_data.TASKS)
    options.tasks = options.tasks or tasks
    for task in options.tasks:
        if task not in tasks:
            place = "on a real model" if options.model else "without --model"
            parser.error(f"there is no task {task!r} {place}. There are: {', '.join(tasks)}.")
    if options.model:
        try:
            options.methods = quality_real.chosen_methods(options.methods)
            quality_real.check(options)
        except (ValueError, OSError) as error:
            parser.error(str(error))
    if options.output is None:
        options.output = Path("quality-output")
        if options.model:
            options.output /= os.path.basename(os.path.abspath(options.model))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    silence()
    options.output.mkdir(parents=True, exist_ok=True)
    benchmark = quality_real if options.model else quality_small
    benchmark.main(options)


if __name__ == "__main__":
    main()
