"""Tokens become text as they come; the pieces together are the text of all of them, up to the first stop string."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from served import VOCABULARY
from transformers import AutoTokenizer

from peft_prefix_plus.serving.text_stream import TextStream


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_path)


def pieces(tokenizer: Any, tokens: list[int], stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    shown = []
    for token in tokens:
        shown.append(stream.add(token))
        if stream.has_stopped:
            break
    else:
        shown.append(stream.end())
    return shown, stream.has_stopped


def test_pieces_are_the_whole_text_and_no_character_comes_in_parts(tokenizer: Any) -> None:
    text = "Käse für 3 €, 日本語 🎉 and more"
    shown, _ = pieces(tokenizer, tokenizer(text)["input_ids"], [])
    assert "".join(shown) == text and not any("\ufffd" in piece for piece in shown)
    assert len([piece for piece in shown if piece]) == len(text)


def test_bytes_that_are_no_text_are_shown_as_in_the_whole_text(tokenizer: Any) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        tokens = [draw.randrange(VOCABULARY) for _ in range(50)]
        assert "".join(pieces(tokenizer, tokens, [])[0]) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aab", ["ab"], "a"),  # what may begin a stop string is held only as long as it may
        ("ababac", ["abac"], "ab"),
        ("one tw", ["two"], "one tw"),  # and shown at the end
        ("one €uro", ["€u"], "one "),
        ("two", ["two"], ""),
        ("one", [], "one"),
    ],
)
def test_a_text_ends_before_the_first_stop_string(tokenizer: Any, text: str, stop: list[str], expected: str) -> None:
    shown, has_stopped = pieces(tokenizer, tokenizer(text)["input_ids"], stop)
    assert ("".join(shown), has_stopped) == (expected, expected != text)
