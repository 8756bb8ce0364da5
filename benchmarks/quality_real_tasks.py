"""
The tasks of benchmarks/quality.py on a real model.

To add one: write a function that takes the folder of `--data` and returns a `Task`, and list it in `TASKS`.
"""

from __future__ import annotations

import ast
import csv
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sacrebleu
from babel import Locale
from quality_data import LIBRARY, library_files

from peft_prefix_plus.cli.records import Record


class DataError(ValueError):
    """The data of a task is not there, or of another form; the message says what to do."""


@dataclass(frozen=True)
class Score:
    """
    How good the answers are that a model writes.

    Attributes:
        name: Its name, as in the tables.
        of: Takes the answers and the references of each, and returns a number from 0 to 100; higher is better.
    """

    name: str
    of: Callable[[Sequence[str], Sequence[Sequence[str]]], float]


@dataclass(frozen=True)
class Task:
    """
    What to learn.

    Attributes:
        training: The records to draw batches from.
        held_out: The records that the loss is measured on.
        prompts: The prompts that the model answers, each with its references.
        score: What the answers are measured by.
        max_new_tokens: The most tokens of an answer; `None` means those of the longest reference.
    """

    training: list[Record]
    held_out: list[Record]
    prompts: list[tuple[str, list[str]]]
    score: Score
    max_new_tokens: int | None = None


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return sacrebleu's corpus BLEU with all references of each answer."""
    most = max(len(of_answer) for of_answer in references)
    # sacrebleu wants a list of first references, one of second ones, and so on, with None where there is none
    by_rank = [[of_answer[i] if i < len(of_answer) else None for of_answer in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(answers), by_rank).score)


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return sacrebleu's chrF with the one reference of each answer."""
    return float(sacrebleu.corpus_chrf(list(answers), [[reference for (reference,) in references]]).score)


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the percentage of answers that are one of their references."""
    right = sum(answer in of_answer for answer, of_answer in zip(answers, references, strict=True))
    return 100 * right / len(answers)


BLEU, CHRF, EXACT_MATCH = Score("BLEU", bleu), Score("chrF", chrf), Score("exact match in %", exact_match)


# ----------------------------------------------------------------------------------------------------------- E2E NLG

E2E_SOURCE = "github.com/tuetschek/e2e-dataset (its devset.csv and testset_w_refs.csv)"

ATTRIBUTES = ("eatType", "food", "priceRange", "customer rating", "area", "familyFriendly")

ABSENT = "not mentioned"


def read_e2e(data: Path, name: str) -> list[dict[str, str]]:
    """
    Read a file of the E2E NLG challenge: rows with `mr`, a restaurant's attributes, and `ref`, a sentence with them.

    Raises:
        DataError: If there is no such file, or if it has other columns.
    """
    path = data / name
    if not path.is_file():
        raise DataError(f"{path} does not exist. --data must be a folder with the files of {E2E_SOURCE}.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"mr", "ref"} <= rows[0].keys():
        found = ", ".join(map(repr, rows[0])) if rows else "no rows"
        raise DataError(f"{path} must have the columns 'mr' and 'ref', found {found}. Get it from {E2E_SOURCE}.")
    return rows


def e2e(data: Path) -> Task:
    """Attributes of a restaurant into a sentence: 480 references for the loss, 70 attribute lists for the score."""
    shuffler = random.Random(0)
    training, test = read_e2e(data, "devset.csv"), read_e2e(data, "testset_w_refs.csv")
    references: dict[str, list[str]] = {}
    for row in test:
        references.setdefault(row["mr"], []).append(row["ref"])
    inputs = list(references)
    shuffler.shuffle(inputs)
    held_out = [Record(f"{row['mr']}\n", row["ref"]) for row in test]
    shuffler.shuffle(held_out)
    return Task(
        [Record(f"{row['mr']}\n", row["ref"]) for row in training],
        held_out[:480],
        [(f"{mr}\n", references[mr]) for mr in inputs[:70]],
        BLEU,
        max_new_tokens=70,
    )


def labels(data: Path) -> Task:
    """The value of one attribute in a sentence, or that it is not mentioned: 400 sentences about other restaurants."""
    shuffler = random.Random(0)
    rows = read_e2e(data, "devset.csv")

    def ask(row: dict[str, str]) -> Record:
        attribute = shuffler.choice(ATTRIBUTES)
        values = dict(re.findall(r"(?:^|, )([^,\[\]]+)\[([^\]]*)\]", row["mr"]))
        return Record(f"{row['ref']}\n{attribute}:", f" {values.get(attribute, ABSENT)}")

    inputs = sorted({row["mr"] for row in rows})
    shuffler.shuffle(inputs)
    held_out_inputs = set(inputs[: len(inputs) // 5])
    shuffler.shuffle(rows)
    training = [ask(row) for row in rows if row["mr"] not in held_out_inputs]
    held_out = [ask(row) for row in [row for row in rows if row["mr"] in held_out_inputs][:400]]
    return Task(training, held_out, questions(held_out), EXACT_MATCH)


def questions(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Return the prompts of records whose completions are the only right answers."""
    return [(record.prompt, [record.completion.strip()]) for record in records]


# -------------------------------------------------------------------------------------------------------------- names

LANGUAGES = ("de", "fr", "es", "it", "pl", "tr", "fi", "nl", "pt", "sv", "cs", "hu")


def names(data: Path) -> Task:
    """Names of territories and languages in 12 languages, from the CLDR: 400 names of others than those of the training."""
    shuffler = random.Random(0)
    english = Locale("en")
    records = [
        (code, Record(f"{name} in {english.languages[language]}:", f" {translation}"))
        for language in LANGUAGES
        for kind in ("territories", "languages")
        for code, name in getattr(english, kind).items()
        if (translation := getattr(Locale(language), kind).get(code))
        if not code.isdigit() and translation != name and len(name) < 25
    ]
    codes = sorted({code for code, _ in records})
    shuffler.shuffle(codes)
    held_out_codes = set(codes[: len(codes) // 5])
    held_out = [record for code, record in records if code in held_out_codes]
    shuffler.shuffle(held_out)
    training = [record for code, record in records if code not in held_out_codes]
    return Task(training, held_out[:400], questions(held_out[:400]), EXACT_MATCH)


# --------------------------------------------------------------------------------------------------------- docstrings


def docstrings(data: Path) -> Task:
    """The docstring of a function of Python's standard library, by its signature: 300 of modules that are held out."""
    shuffler = random.Random(0)
    by_module: dict[str, list[Record]] = {}
    for path in library_files():
        module = ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix(".__init__")
        by_module[module] = [
            Record(f"def {module}.{signature}:\n", docstring)
            for signature, docstring in documented(ast.parse(path.read_bytes()))
            if 200 <= len(docstring) <= 800
        ]
    modules = list(by_module)
    shuffler.shuffle(modules)
    held_out_modules = modules[: len(modules) // 3]
    held_out = [record for module in held_out_modules for record in by_module.pop(module)]
    shuffler.shuffle(held_out)
    training = [record for records in by_module.values() for record in records]
    return Task(training, held_out[:300], questions(held_out[:50]), CHRF, max_new_tokens=150)


def documented(node: ast.AST, scope: str = "") -> Iterator[tuple[str, str]]:
    """Yield the signature and the docstring of each function and method that has one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from documented(child, f"{scope}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and (docstring := ast.get_docstring(child)):
            yield f"{scope}{child.name}({ast.unparse(child.args)})", docstring


TASKS: dict[str, Callable[[Path], Task]] = {"e2e": e2e, "labels": labels, "names": names, "docstrings": docstrings}
"""The tasks by name; each is made of the folder of `--data`."""
