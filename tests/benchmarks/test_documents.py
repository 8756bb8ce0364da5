"""The benchmark of prefixes in place of a document: its document, and its measure against losses of single rows."""

from __future__ import annotations

import pytest
import torch
from documents import Encoded, answer_loss, gap_closed, prompts
from documents_costs import measure
from documents_text import document, held_out_questions, user_turn
from models import tiny_model


def test_every_question_is_answered_by_the_document():
    questions = held_out_questions()
    assert len({question.question for question in questions}) == len(questions) == 83
    for question in questions:
        assert question.fact.lower() in question.answer.lower()
        assert question.fact.lower() in document().lower()


def test_prompts_name_headings_and_none_of_the_questions():
    assert len(prompts()) == 18
    asked = " ".join(prompts())
    assert not [question for question in held_out_questions() if question.question in asked]


ROWS = [Encoded([3, 4, 5], [6, 7]), Encoded([8, 9], [10, 11, 12]), Encoded([13], [14])]


@pytest.mark.parametrize("context", [[], [20, 21, 22, 23]])
def test_the_loss_is_the_mean_over_the_answers_tokens_after_the_context(context):
    model = tiny_model()
    losses = []
    with torch.no_grad():
        cache = model(torch.tensor([context])).past_key_values if context else None
        for row in ROWS:
            ids = torch.tensor([[*context, *row.prompt, *row.answer]])
            scores = model(ids).logits[0].double().log_softmax(dim=-1)
            first = len(context) + len(row.prompt)
            losses += [-scores[first + index - 1, token] for index, token in enumerate(row.answer)]
    # float32 against float64, and batches against rows
    assert answer_loss(model, ROWS, cache) == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_the_gap_is_closed_by_what_the_loss_has_come_down():
    assert gap_closed(2.0, without=3.0, in_context=1.0) == 0.5
    assert gap_closed(3.0, without=3.0, in_context=1.0) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_costs_what_the_arithmetic_says(dtype, tmp_path, capsys, monkeypatch):
    model = tiny_model(dtype=dtype)
    model.save_pretrained(tmp_path)

    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [5 + len(word) for word in text.split()]}

    model = type(model).from_pretrained(tmp_path).eval()
    document_tokens, question_tokens = (len(text.split()) for text in (document(), user_turn("")))
    rows = measure(model, Tokenizer(), tokens=6, rounds=1)

    heads, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    per_token = 2 * layers * heads * head_dim * dtype.itemsize
    counts = [int(row[1]) for row in rows]
    assert counts[0] - counts[1] == document_tokens and counts[1] == counts[2] == counts[3] >= question_tokens
    for row, count, cached in zip(rows, counts, (0, 0, 6, 0), strict=True):
        assert row[2] == " / ".join([f"{(count + cached) * per_token / 1024:,.1f}"] * 2)
    assert [row[3] for row in rows[:3]] == ["", "", ""]
    in_float32 = 6 * per_token * torch.float32.itemsize // dtype.itemsize
    assert rows[3][3] == " / ".join([f"{in_float32 / 1024:,.1f}"] * 2)
