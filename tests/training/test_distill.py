"""From a document to the trained prefix: self-study, going on after a kill, and what is refused."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_models import DOCUMENT, chat_model, chat_tokenizer
from models import unchanged
from peft import get_peft_model
from transformers import TrainingArguments

from peft_prefix_plus import PrefixPlusConfig, SelfStudy, Template, distill, initialize_from_text, prefix_key_values
from peft_prefix_plus.training.conversations import Conversation, ConversationFile
from peft_prefix_plus.training.distill import CONVERSATIONS_FILE, RUN_FILE
from peft_prefix_plus.training.document import Chat, read_text
from peft_prefix_plus.training.self_study import Writer, draw_piece


STUDY = SelfStudy(num_conversations=10, piece_tokens=16, max_prompt_tokens=5, max_answer_tokens=6, batch_size=4)


def config(**fields):
    values = dict(task_type="CAUSAL_LM", num_virtual_tokens=4, decoupled=False, gating=False, position_free=False)
    return PrefixPlusConfig(**{**values, **fields})


def arguments(folder, **values):
    given = dict(max_steps=5, save_steps=1, save_total_limit=2, learning_rate=1e-2, per_device_train_batch_size=4)
    given.update(report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False)
    return TrainingArguments(output_dir=str(folder), **{**given, **values})


def run(folder, **values):
    torch.manual_seed(3)
    given = dict(args=arguments(folder), config=config(), self_study=STUDY)
    return distill(chat_model(), chat_tokenizer(), DOCUMENT, **{**given, **values})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------- going on after a kill

KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import test_distill
from pathlib import Path
from transformers import TrainerCallback
from peft_prefix_plus.training.conversations import ConversationFile

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

append = ConversationFile.append

def half(self, conversations):
    append(self, conversations)
    if len(self.path.read_bytes().splitlines()) >= 8:
        os.truncate(self.path, self.path.stat().st_size - 30)
        os.kill(os.getpid(), signal.SIGKILL)

if {where!r} == "study":
    ConversationFile.append = half
test_distill.run(Path({folder!r}), callbacks=[Kill()])
"""


def killed(folder: Path, where: str) -> None:
    tests = Path(__file__).parents[1]
    paths = [str(tests.parent), str(tests), str(Path(__file__).parent)]
    code = KILLED.format(paths=paths, where=where, folder=str(folder))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr


def test_a_run_that_was_killed_twice_ends_with_the_same_weights(tmp_path):
    expected = weights(run(tmp_path / "whole"))

    folder = tmp_path / "killed"
    killed(folder, "study")  # in the middle of writing the second batch
    lines = (folder / CONVERSATIONS_FILE).read_bytes().split(b"\n")
    assert len(lines) == 8 and lines[-1]
    killed(folder, "training")  # after the third step
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    found = weights(run(folder))

    assert (folder / CONVERSATIONS_FILE).read_bytes() == (tmp_path / "whole" / CONVERSATIONS_FILE).read_bytes()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], p) for name, p in expected.items())
    # a run that has ended has nothing left to do
    again = weights(run(folder))
    assert all(torch.equal(again[name], p) for name, p in expected.items())


def test_a_batch_of_conversations_is_there_whole_or_not_at_all(tmp_path):
    file = ConversationFile(tmp_path / "some.jsonl", batch_size=2)
    conversations = [Conversation(f"prompt {number}\n\u2028", [number], answer="ä") for number in range(5)]
    for start in (0, 2, 4):
        file.append(conversations[start : start + 2])
    assert file.read(5) == conversations
    whole = file.path.read_bytes()
    for size in range(len(whole)):
        file.path.write_bytes(whole[:size])
        found = file.read(5)
        assert found == conversations[: len(found)] and (len(found) % 2 == 0 or len(found) == 5)
        assert file.read(5) == found
    file.path.write_text("{}\n{}\n")
    with pytest.raises(ValueError, match="line 1, is not a conversation"):
        file.read(5)


# ------------------------------------------------------------------------------------------------------------ self-study


def test_what_is_drawn_depends_on_seed_and_place_alone(tmp_path):
    chat = Chat(chat_tokenizer())
    windows = read_text(chat, DOCUMENT, 100)
    pieces = [draw_piece(random.Random(f"0 {place}"), chat, windows, 16) for place in range(20)]
    assert len({piece.text for piece in pieces}) > 1
    for piece in pieces:
        assert piece.text in DOCUMENT and 8 <= len(piece.text.split()) <= 16
        start = DOCUMENT.index(piece.text)
        assert start == 0 or DOCUMENT[:start].endswith(". ")


def test_the_models_own_answers_are_those_that_it_gives_with_the_document_in_its_context():
    chat, model = Chat(chat_tokenizer()), chat_model()
    windows = read_text(chat, DOCUMENT, 100)
    prompts = ["what is red", "where is the blue box on the table", "which"]
    found = Writer(model, chat, windows, 0).answers(prompts, [0, 0, 0], 6)
    for prompt, answer in zip(prompts, found, strict=True):  # without a cache, without padding
        token_ids = torch.tensor([chat.prompt(prompt, windows[0])])
        expected = model.generate(
            input_ids=token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=6, do_sample=False,
            eos_token_id=chat.end_ids(), pad_token_id=0,
        )  # fmt: skip
        assert answer == expected[0, token_ids.shape[1] :].tolist()


def test_templates_of_the_users_own(tmp_path):
    templates = (Template("recital", "text {start} ?", recites=True), Template("own", "which {piece}", asks=True))
    run(tmp_path, self_study=SelfStudy(num_conversations=4, templates=templates, piece_tokens=16, batch_size=4, max_answer_tokens=9),
        args=arguments(tmp_path, max_steps=1))  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / CONVERSATIONS_FILE).read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["recital", "own"] * 2
    for row in rows[::2]:
        start = row["prompt"].removeprefix("text ").removesuffix(" ?")
        assert len(start.split()) == 8 and f"{start} {row['answer']}".strip() in DOCUMENT
    for fields, message in (
        (dict(kind="a", prompt="nothing"), "must have {piece} or {start}"),
        (dict(kind="a", prompt="{piece}", asks=True, recites=True), "both asks and recites"),
        (dict(kind="a", prompt=3), "`prompt` of a template must be a str"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            Template(**fields)


# ------------------------------------------------------------------------------------------------- prompts, start, forms


def test_given_prompts_and_answers_are_what_is_learned(tmp_path):
    prompts = ["what is red", ("where is the blue box", "under the chair")]
    model = run(tmp_path, prompts=prompts, args=arguments(tmp_path, max_steps=1))
    rows = [json.loads(line) for line in (tmp_path / CONVERSATIONS_FILE).read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts[:1] and rows[0]["answer_ids"]
    assert model.active_adapter == "default"


def test_a_prompt_is_about_the_window_in_whose_context_it_is_likeliest():
    chat, model = Chat(chat_tokenizer()), chat_model()
    windows = read_text(chat, DOCUMENT * 3, 30)
    assert len(windows) > 2
    writer = Writer(model, chat, windows, 0)
    found = set()
    green = "the green chair is on a box"
    for prompt, answer in [("what is red", "the cup"), ("which", ""), ("which", "the cup"), (green, "")]:
        ids = chat.answer(answer) if answer else []
        losses = []
        for window in windows:  # without a cache, the whole text at once
            tokens = chat.prompt(prompt, window) + ids
            count = len(chat.prompt(prompt)) + len(ids)
            with torch.no_grad():
                scores = model(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)
            places = range(len(tokens) - count, len(tokens))
            # the window ends with <user>, and what predicts the prompt's first word is in its cache
            losses.append(-sum(scores[place - 1, tokens[place]].item() for place in places[2:]))
        best = min(range(len(windows)), key=losses.__getitem__)
        assert sorted(losses)[1] - min(losses) > 1e-3  # no tie that float32 could turn
        assert writer.likeliest_window(prompt, ids) == best
        found.add(best)
    assert found == set(range(len(windows)))


def test_prompts_are_learned_each_with_its_window(tmp_path):
    prompts = ["what is red", "which", ("where is the blue box", "under the chair")]
    values = dict(window_tokens=30, prompts=prompts, args=arguments(tmp_path, max_steps=2))
    model = distill(chat_model(), chat_tokenizer(), DOCUMENT * 3, config=config(), self_study=STUDY, **values)
    chat = Chat(chat_tokenizer())
    windows = read_text(chat, DOCUMENT * 3, 30)
    rows = [json.loads(line) for line in (tmp_path / CONVERSATIONS_FILE).read_text().splitlines()]
    writer = Writer(chat_model(), chat, windows, 0)
    assert [row["window"] for row in rows] == [writer.likeliest_window(prompt) for prompt in prompts[:2]]
    assert any(row["window"] for row in rows)
    assert model.active_adapter == "default"


@pytest.mark.parametrize(
    ("start", "position_free"), [("first", False), ("attention", False), (None, True), ("config", True)]
)
def test_the_prefix_starts_from_what_the_teacher_has_in_its_context(start, position_free, tmp_path):
    fields = dict(position_free=position_free)
    still = arguments(tmp_path, max_steps=1, learning_rate=0.0)
    model = run(tmp_path, args=still, start=start, config=config(**fields))
    torch.manual_seed(3)
    expected = get_peft_model(chat_model(), config(**fields))
    if start != "config":
        context = f"<system> {DOCUMENT} <end> <user> " if start != "first" else "<system> the red cup"
        method = start or "attention"
        initialize_from_text(expected, chat_tokenizer(), context, add_special_tokens=False, method=method)
    for name, pair in prefix_key_values(model).items():
        for found, wanted in zip(pair, prefix_key_values(expected)[name], strict=True):
            assert torch.equal(found, wanted)


def test_a_model_that_has_the_adapter_is_trained_as_it_is(tmp_path):
    model = get_peft_model(chat_model(), config(position_free=True))
    model.add_adapter("document", config(position_free=True))
    other = {name: p.clone() for name, p in model.named_parameters() if ".default" in name}
    before = {name: p.clone() for name, p in model.named_parameters() if ".document" in name}
    result = distill(
        model, chat_tokenizer(), DOCUMENT, args=arguments(tmp_path / "b"), self_study=STUDY, adapter_name="document"
    )
    assert result is model and model.active_adapter == "document"
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], p) for name, p in other.items())
    assert any(not torch.equal(parameters[name], p) for name, p in before.items())
    assert model.peft_config["document"].position_free  # no text has changed the form


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(text=" \n"), "The text is empty"),
        (dict(text=None), "Give either `text` or `messages`"),
        (dict(messages=[]), "Give either `text` or `messages`"),
        (dict(text=None, messages=[]), "`messages` must be dicts"),
        (dict(text=None, messages=[{"role": "system", "content": "red " * 300}]), "303 tokens, and a context holds 64"),
        (dict(text="red", config=config(num_virtual_tokens=9)), "num_virtual_tokens=9"),
        (dict(window_tokens=5), "leaves 2 for the text"),
        (dict(window_tokens=500), "room for conversations in the model's context of 128 tokens, got 500"),
        (dict(prompts=[]), "`prompts` is empty"),
        (dict(prompts=["what", ("where", " ")]), r"`prompts\[1\]`"),
        (dict(start="middle"), "`start` must be one of 'attention', 'first', 'config' or None, got 'middle'"),
        (dict(distractors=["absent"]), "no PREFIX_PLUS adapter named 'absent'"),
        (dict(tokenizer=chat_tokenizer(None)), "has no chat template"),
    ],
)  # fmt: skip
def test_what_cannot_be_distilled_is_refused_before_anything_is_written(given, message, tmp_path):
    model = chat_model()
    model.config.max_position_embeddings = 128
    folder = tmp_path / "output"
    values = dict(tokenizer=chat_tokenizer(), text=DOCUMENT, config=config(), self_study=STUDY)
    with unchanged(model), pytest.raises(ValueError, match=message):
        distill(model, **{**values, **given}, args=arguments(folder))
    assert not folder.exists()


def test_a_directory_of_another_run_is_refused_and_left_as_it_is(tmp_path):
    run(tmp_path, args=arguments(tmp_path, max_steps=1))
    before = files(tmp_path)
    with pytest.raises(ValueError, match="another run's: self_study differ"):
        run(tmp_path, self_study=SelfStudy(num_conversations=3))
    (tmp_path / RUN_FILE).unlink()
    with pytest.raises(ValueError, match=r"files of a run, but no distillation\.json"):
        run(tmp_path)
    del before[str(tmp_path / RUN_FILE)]
    assert files(tmp_path) == before


@pytest.mark.parametrize("field", ["num_conversations", "batch_size", "temperature", "piece_tokens"])
def test_numbers_of_self_study_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` must be at least"):
        SelfStudy(**{field: -1})
