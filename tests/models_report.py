"""Test every architecture of tests/test_models.py and write what came out to docs/models.md."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import MAPPINGS, UNBUILDABLE, cases


TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "models.md"

TITLES = {
    "CAUSAL_LM": "Causal language models",
    "SEQ_2_SEQ_LM": "Sequence-to-sequence models",
    "SEQ_CLS": "Sequence classification",
}

HEAD = """# Models

<!-- Written by `make test-models` (python tests/models_report.py). Do not edit. -->

Every architecture in transformers' auto mappings, tested on a tiny random model of it with transformers
{transformers} and torch {torch}: wrap it, check that the adapter changes the output, that disabled it is the base model bit
for bit, that a row of a batch does not depend on the others, generate greedily with a cache and compare with forwards over
the whole text, save, unload (the base model bit for bit), load and compare the logits, and take a training step in which
every adapter parameter gets a gradient. A prefix that reads unrotated queries reads the same wherever the text begins. A model that is *refused* raises a `ValueError` before anything is changed.

`make test-models` repeats all of it and writes this page.

| | tested | pass | refused |
|---|---|---|---|
{summary}

Modules with a prefix call transformers' attention interface, or compute attention themselves in a way that is followed
(see [the method](method.md)). Other mixers of hybrid models (state spaces, convolutions, linear attention) stay untouched.
"""

FIXED = """
## At fixed positions

Here `position_free=None` comes to `False` ([why](method.md#positions)): the rotation of queries cannot be undone, because

| Model | of this |
|---|---|
"""

PARTIAL = """
## Attention that stays without a prefix

In these models, which pass, some modules that their names call attention have no prefix: those of vision and audio towers,
which `target_modules` names, and attention in another form (over local blocks), of which adding the adapter warns.

| Model | without a prefix | with a prefix |
|---|---|---|
"""


def main() -> int:
    """Run the tests, write the page if all passed, and return pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.jsonl"
        os.environ["MODELS_REPORT"] = str(path)
        options = ["-m", "not soak", "-n", "auto", "-p", "no:warnings", "--tb=short", *sys.argv[1:]]
        status = int(pytest.main([str(TESTS / "probing" / "test_models.py"), "-k", "an_architecture", *options]))
        results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if status == 0:
        PAGE.write_text(page(results), encoding="utf-8")
    return status


def page(results: list[dict[str, Any]]) -> str:
    """The page docs/models.md."""
    order = {(case.task_type, case.class_name): index for index, case in enumerate(cases())}
    results = sorted(results, key=lambda result: order[result["case"][0], result["case"][2]])
    summary = []
    for task_type, title in TITLES.items():
        outcomes = [result["outcome"] for result in results if result["case"][0] == task_type]
        summary.append(f"| {title} | {len(outcomes)} | {outcomes.count('passed')} | {outcomes.count('refused')} |")
    text = HEAD.format(
        transformers=transformers.__version__, torch=torch.__version__.partition("+")[0], summary="\n".join(summary)
    )
    text += refused_section(results) + untested_section() + fixed_section(results) + PARTIAL
    rows = {
        f"| `{result['case'][2]}` | {code_list(result['detail']['others'])} | {code_list(result['detail']['prefixed'])} |"
        for result in results
        if result["outcome"] == "passed" and result["detail"]["others"]
    }
    text += "\n".join(sorted(rows)) + "\n"
    for task_type, title in TITLES.items():
        passed = [
            result["case"][2] for result in results if result["case"][0] == task_type and result["outcome"] == "passed"
        ]
        text += f"\n## {title} that pass\n\n{code_list(sorted(passed, key=str.lower))}\n"
    return text


def refused_section(results: list[dict[str, Any]]) -> str:
    rows = {
        result["case"][2]: re.sub(r"\s+", " ", result["detail"]).replace("|", "\\|")
        for result in results
        if result["outcome"] == "refused"
    }
    table = "\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(rows.items()))
    return f"\n## Refused\n\n| Model | its error |\n|---|---|\n{table}\n"


def fixed_section(results: list[dict[str, Any]]) -> str:
    rows = {
        f"| `{result['case'][2]}` | {'; '.join(result['detail']['obstacles'])} |"
        for result in results
        if result["outcome"] == "passed" and result["detail"]["obstacles"]
    }
    return FIXED + "\n".join(sorted(rows)) + "\n"


def untested_section() -> str:
    mapped = {name for mapping in MAPPINGS.values() for name in mapping.values()}
    table = "\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(UNBUILDABLE.items()) if name in mapped)
    return f"\n## Not tested\n\n| Model | because it |\n|---|---|\n{table}\n"


def code_list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    sys.exit(main())
