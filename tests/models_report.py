"""Test every architecture that tests/tiny_models.py and tests/beyond_text.py name, and write what came out to docs/models.md."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import beyond_text
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

Modules with a prefix call transformers' attention interface, or compute attention themselves in a way that the package can follow
(see [the method](method.md)). Other mixers of hybrid models (state spaces, convolutions, linear attention) stay untouched.
"""

FIXED = """
## At fixed positions

Here `position_free=None` resolves to `False` ([why](method.md#positions)): the rotation of queries cannot be undone, because

| Model | of this |
|---|---|
"""

BEYOND_TEXT = """
{title}

Architectures of the auto mappings for sound, images, video, time series and text with any of them, which the mappings above do not
have. Each is built tiny from its config class and tested in the same way, but for generation, on one row: the adapter changes
the output, disabled and unloaded it is the base model bit for bit, a gradient from all that the model returns reaches every
adapter parameter, and the adapter is loaded as it was saved. Those marked * are not run by the tests: their adapter is added,
saved and loaded.

| | tested | pass | refused |
|---|---|---|---|
{summary}
"""

BEYOND_TEXT_TITLE = "## Beyond text"

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
        files = [str(TESTS / "probing" / name) for name in ("test_models.py", "test_beyond_text.py")]
        status = int(pytest.main([*files, "-k", "an_architecture", *options]))
        results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if status == 0:
        of_text = [result for result in results if result["case"][0] in TITLES]
        others = [result for result in results if result["case"][0] not in TITLES]
        PAGE.write_text(page(of_text) + beyond_text_section(others), encoding="utf-8")
    return status


def page(results: list[dict[str, Any]]) -> str:
    """The page docs/models.md, as far as it is about text."""
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


def beyond_text_section(results: list[dict[str, Any]]) -> str:
    """What came out for models whose first input is no text, or more than text."""
    of_class = {result["case"][2]: result for result in results}
    summary, passed = [], ""
    for group, group_cases in beyond_text.cases().items():
        tested = [of_class[case.class_name] for case in group_cases if case.class_name in of_class]
        good = [result for result in tested if result["outcome"] == "passed"]
        summary.append(f"| {group} | {len(tested)} | {len(good)} | {len(tested) - len(good)} |")
        names = [f"`{result['case'][2]}`{'' if result['detail']['is_run'] else '*'}" for result in good]
        passed += f"\n### {group} that pass\n\n{', '.join(sorted(names, key=str.lower))}\n"
    text = BEYOND_TEXT.format(title=BEYOND_TEXT_TITLE, summary="\n".join(summary))
    text += refused_section(results).replace("\n## Refused", "\n### Refused beyond text")
    rows = "\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(beyond_text.UNBUILDABLE.items()))
    text += f"\n### Not tested beyond text\n\n| Model | because it |\n|---|---|\n{rows}\n"
    return text + passed


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
