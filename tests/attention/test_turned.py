"""Prefixes that decoding turns to the position of its query, all layers' at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import prefixed, tiny_model, token_ids
from test_position_free import MODELS

from peft_prefix_plus.attention.turned import TurnedPrefixes


MAKERS = {**{name: make for name, (make, *_) in MODELS.items()}, "gemma3, two bases": lambda: tiny_model("gemma3")}
FORMS: dict[str, dict[str, Any]] = {"joint": {}, "gated": {"gating": True}, "decoupled": {"decoupled": True}}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each prefix that a decoding step asks for, whether a turned one was found."""
    results: list[bool] = []
    at = TurnedPrefixes.at

    def noted(*args: Any) -> Any:
        turned = at(*args)
        results.append(turned is not None)
        return turned

    monkeypatch.setattr(TurnedPrefixes, "at", noted)
    return results


def decoded(model: Any, ids: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that a model goes on with, and the logits that it chose them by."""
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    output = model.generate(input_ids=ids, return_dict_in_generate=True, output_logits=True, **options, **inputs)
    return output.sequences, torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MAKERS)
def test_decoding_gives_what_reading_the_text_at_once_gives(name: str, form: str, found: list[bool]) -> None:
    torch.manual_seed(0)
    model = prefixed(MAKERS[name]().double().eval(), task_type="CAUSAL_LM", position_free=True, **FORMS[form])
    sequences, logits = decoded(model, token_ids(1))
    assert len(found) >= 5 and all(found)
    with torch.no_grad():  # which turns queries, of many tokens, and not the prefix
        expected = model(input_ids=sequences).logits[:, -7:-1].float()  # as `generate` returns them
    # norms and angles are float32 in some models
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_rows_at_positions_of_their_own_have_their_queries_turned(found: list[bool]) -> None:
    model = prefixed(tiny_model(), task_type="CAUSAL_LM")
    ids, mask = token_ids(2), torch.ones(2, 7).long()
    mask[1, :3] = 0
    _, logits = decoded(model, ids, attention_mask=mask)
    assert found and not any(found)
    _, alone = decoded(model, ids[1:, 3:])
    assert found[-1]
    torch.testing.assert_close(logits[1:], alone, rtol=0, atol=1e-5)


def test_a_parameter_written_between_two_tokens_is_turned_anew(found: list[bool]) -> None:
    model = prefixed(tiny_model(), task_type="CAUSAL_LM")
    parameters = [parameter for name, parameter in model.named_parameters() if "prefix_plus_encoder" in name]

    def write_at_the_third_token(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 9:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.mul_(2.0)
        return scores

    sequences, logits = decoded(model, token_ids(1), logits_processor=[write_at_the_third_token])
    with torch.no_grad():
        for parameter in parameters:
            parameter.div_(2.0)
        cache = model(input_ids=sequences[:, :9], use_cache=True).past_key_values
        for parameter in parameters:
            parameter.mul_(2.0)
        expected = model(input_ids=sequences[:, 9:10], past_key_values=cache).logits[:, -1]
    assert all(found)
    torch.testing.assert_close(logits[:, 3], expected, rtol=0, atol=1e-5)


def test_layers_with_position_embeddings_of_their_own_give_it_up() -> None:
    from peft_prefix_plus.attention import Prefix, QueryRotation

    group = TurnedPrefixes(QueryRotation())
    prefixes = [group.add(layer, Prefix(torch.randn(2, 3, 8), torch.randn(2, 3, 8))) for layer in range(12)]
    answers = []
    for _ in range(3):
        for prefix in prefixes:
            angles = torch.randn(1, 1, 8)
            answers.append(prefix.turned((angles.cos(), angles.sin()), 1))  # type: ignore[misc]
    assert answers[0] is not None and all(answer is None for answer in answers[12:])
