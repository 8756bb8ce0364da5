"""The benchmarks of distillation run from end to end on a tiny model, and measure the loss that is defined."""

from __future__ import annotations

import json

import documents_composition
import documents_distillation
import pytest
import torch
from chat_models import CHAT_TEMPLATE, GROUPED, SPECIAL, SPECIAL_IDS
from documents_distillation import METHODS, Place, adapt, answer_loss, main
from documents_text import FIRST, SECOND, document, held_out_questions
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_prefix_plus.training.document import Chat, read_text


QUESTIONS = 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny chat model that knows the words of the handbook."""
    folder = tmp_path_factory.mktemp("model")
    words = dict.fromkeys(
        [*SPECIAL, "?", *document().split(), *(w for q in held_out_questions() for w in q.question.split())]
    )
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", additional_special_tokens=list(SPECIAL[1:])
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**GROUPED, **SPECIAL_IDS, "vocab_size": len(words), "max_position_embeddings": 4096}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def call(directory, tmp_path, monkeypatch):
    """Call a benchmark's main function, with a few of the questions; returns what it printed."""

    def few(part=slice(None)):
        return held_out_questions(part)[:QUESTIONS]

    for module in (documents_distillation, documents_composition):
        monkeypatch.setattr(module, "held_out_questions", few)
    monkeypatch.setenv("COLUMNS", "200")

    def run(main, *arguments):
        monkeypatch.setattr(
            "sys.argv", ["benchmark", "--model", str(directory), "--output", str(tmp_path), *arguments]
        )
        main()

    return run


def place_of(directory):
    chat = Chat(AutoTokenizer.from_pretrained(directory))
    (window,) = read_text(chat, document(), 4096)
    return Place(str(directory), chat, window, held_out_questions()[:QUESTIONS])


def test_two_parts_of_the_handbook_share_no_section():
    first, second = (held_out_questions(part) for part in (FIRST, SECOND))
    assert not set(first) & set(second) and set(first) | set(second) <= set(held_out_questions())
    for part, questions in ((FIRST, first), (SECOND, second)):
        assert len(questions) > 20
        assert all(question.fact.lower() in document(part).lower() for question in questions)


@pytest.mark.parametrize("has_document", [False, True])
def test_the_loss_is_the_mean_over_the_answers_tokens(directory, has_document):
    place = place_of(directory)
    base, losses = place.base(), []
    with torch.no_grad():
        for question in place.questions:  # one by one, the whole text at once
            answer = place.chat.answer(question.answer)
            prompt = place.chat.prompt(question.question, place.window if has_document else None)
            scores = base(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(dim=-1)
            losses += [-scores[len(prompt) + index - 1, token] for index, token in enumerate(answer)]
    # float32 against float64, and batches against rows
    assert answer_loss(base, place, has_document) == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_all_methods_learn_from_the_same_conversations_and_a_run_is_not_repeated(
    call, directory, tmp_path, capsys, monkeypatch
):
    names = ["PREFIX_PLUS", "PREFIX_PLUS, frozen sink", "CARTRIDGE"]
    arguments = ["--tokens", "4", "--steps", "2", "--every", "1", "--recited", "--conversations", "8"]
    call(main, *arguments, "--methods", *names[:2], "--no-facts")
    call(main, *arguments, "--methods", *names)
    printed = capsys.readouterr().out
    folder = tmp_path / "recited-8"
    results = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/result.json")}
    assert sorted(results) == [
        "cartridge-4tokens-2steps",
        "prefix_plus-4tokens-2steps",
        "prefix_plus-frozen-sink-4tokens-2steps",
    ]
    for result in results.values():
        assert list(result["losses"]) == ["1", "2"]
        # after the last step nothing is trained
        assert result["losses"]["2"][1] == result["loss"] != result["first_loss"]
    assert [name for name, result in results.items() if "facts" in result] == ["cartridge-4tokens-2steps"]
    gap = json.loads((tmp_path / "base.json").read_text())
    closed = (gap["loss_without"] - results["cartridge-4tokens-2steps"]["loss"]) / (
        gap["loss_without"] - gap["loss_with"]
    )
    assert f"{100 * closed:.0f} %" in next(line for line in printed.splitlines() if line.startswith("│ CARTRIDGE"))

    monkeypatch.setattr(documents_distillation, "perform", None)
    call(main, *arguments, "--methods", *names)
    assert capsys.readouterr().out.splitlines()[-8:] == printed.splitlines()[-8:]

    start = adapt(place_of(directory), METHODS["PREFIX_PLUS"], 4)
    first = {name.replace(".default", ""): value for name, value in start.named_parameters() if "encoder" in name}
    for name, is_frozen in (("prefix_plus", False), ("prefix_plus-frozen-sink", True)):
        saved = load_file(folder / f"{name}-4tokens-2steps" / "checkpoint-2" / "adapter_model.safetensors")
        assert first.keys() <= saved.keys()
        for key, value in first.items():
            assert torch.equal(saved[key][:, 0], value[:, 0]) == is_frozen
            assert not torch.equal(saved[key][:, 1:], value[:, 1:])


def test_prefixes_of_two_documents_are_measured_alone_and_composed(call, tmp_path, capsys):
    arguments = ["--tokens", "4", "--steps", "6"]  # the first distractor is drawn in the sixth step
    call(documents_composition.main, *arguments)
    printed = capsys.readouterr().out
    losses = json.loads((tmp_path / "4tokens-6steps" / "losses.json").read_text())
    assert list(losses) == [
        *("none", "in the context", "a", "b", "composed, each alone"),
        *("a beside b", "b beside a", "composed, with distractors"),
    ]
    assert len({tuple(found.values()) for found in losses.values()}) == len(losses)
    for way in losses:
        assert f"│ {way} " in printed

    call(documents_composition.main, *arguments)  # from the file
    assert capsys.readouterr().out == printed[printed.index("┏") :]
