"""Distillation's trainer: what the teacher computes, what the loss is, and that nothing else changes."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from chat_models import CHAT_TEMPLATE, DOCUMENT, MODELS, NO_SYSTEM_TEMPLATE, SPECIAL, chat_model, chat_tokenizer
from peft import LoraConfig, get_peft_model
from sharding import run
from transformers import TrainingArguments

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.training.conversations import Conversation
from peft_prefix_plus.training.distillation import (
    DistillationCollator,
    DistillationTrainer,
    WindowSampler,
    drawn_distractors,
    encode_conversations,
    predicting_positions,
)
from peft_prefix_plus.training.divergence import divergence
from peft_prefix_plus.training.document import Chat, read_messages, read_text


PAIRS = [
    ("what is on the table ?", "the red cup ."),
    ("where is the blue box", "under the chair"),
    ("what is green", "the chair is green . the chair is on a box"),
    ("which cup", "red"),
]
FIELDS = dict(task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights=False, decoupled=False)


def adapted(name="llama", **fields):
    torch.manual_seed(1)
    return get_peft_model(chat_model(name), PrefixPlusConfig(**{**FIELDS, **fields}))


def data(template=None, window_tokens=100):
    chat = Chat(chat_tokenizer() if template is None else chat_tokenizer(template))
    windows = read_text(chat, DOCUMENT, window_tokens)
    conversations = [
        Conversation(prompt, chat.answer(answer), number % len(windows))
        for number, (prompt, answer) in enumerate(PAIRS)
    ]
    return chat, windows, conversations, encode_conversations(conversations, chat, windows)


def trainer(model, folder, windows, rows, k=5, distractors=(), **arguments):
    values = dict(per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, save_strategy="no", logging_steps=1)
    values.update(report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **arguments)
    return DistillationTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **values),
        windows=windows,
        k=k,
        distractors=distractors,
        train_dataset=rows,
        eval_dataset=rows,
    )


def prefix_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("name", MODELS)
def test_the_teachers_logits_are_the_base_models_bit_for_bit(name, tmp_path):
    _, windows, _, rows = data()
    base = copy.deepcopy(chat_model(name))
    batch = DistillationCollator(0)(rows)
    with torch.no_grad():
        cache = base(input_ids=torch.tensor([windows[0].token_ids]), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
        mask = torch.cat(
            [torch.ones(len(rows), len(windows[0].token_ids), dtype=torch.long), batch["teacher_mask"]], dim=1
        )
        logits = base(input_ids=batch["teacher_ids"], attention_mask=mask, past_key_values=cache).logits
    expected = logits[predicting_positions(batch["teacher_labels"])]

    model = adapted(name)
    run = trainer(model, tmp_path, windows, rows)
    run.model.train()
    run.contexts.read(run.model, run.model)
    for _ in range(2):  # the kept cache is not used up
        states = run.teacher_states(run.model, batch)
        assert (run.head is None) == (name == "gemma2")
        assert torch.equal(states if run.head is None else run.head(states), expected)
    assert model.training and not torch.equal(
        model(input_ids=batch["input_ids"]).logits, base(input_ids=batch["input_ids"]).logits
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("k", [5, None])
def test_the_loss_is_the_divergence_from_the_base_model_that_reads_the_document(name, k, tmp_path):
    chat, windows, conversations, rows = data()
    base, model = copy.deepcopy(chat_model(name)), adapted(name).eval()
    found = trainer(model, tmp_path, windows, rows, k=k, per_device_eval_batch_size=4).evaluate()["eval_loss"]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for conversation in conversations:  # one by one, the whole text at once
            answer = conversation.answer_ids
            both = [chat.prompt(conversation.prompt, window) + answer for window in (windows[0], None)]
            logits = [
                each(input_ids=torch.tensor([ids])).logits[0, -len(answer) - 1 : -1].double()
                for each, ids in zip((base, model), both, strict=True)
            ]
            total += divergence(logits[1], logits[0], k).sum().item()
            tokens += len(answer)
    # float32: a cache and padding round otherwise than one text at a time
    assert found == pytest.approx(total / tokens, rel=1e-4)


def test_teacher_and_student_see_the_same_answers_in_templates_without_a_system_message():
    chat, windows, conversations, rows = data(NO_SYSTEM_TEMPLATE)
    assert windows[0].messages == () and windows[0].in_prompt == f"{DOCUMENT}\n\n"
    assert len(windows[0].token_ids) > len(DOCUMENT.split()) - 8  # most of the document is read once
    for conversation, row in zip(conversations, rows, strict=True):
        whole = [*windows[0].token_ids, *row["teacher_ids"]]
        assert chat.tokenizer.decode(whole) == (
            f"<user> {DOCUMENT} {conversation.prompt} <end> <assistant> "
            + chat.tokenizer.decode(conversation.answer_ids)
        )
        assert row["input_ids"][-len(conversation.answer_ids) :] == conversation.answer_ids
        assert chat.tokenizer.decode(row["input_ids"]).startswith(f"<user> {conversation.prompt}")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM_TEMPLATE])
def test_a_window_ends_before_the_prompt_even_where_the_tokenizer_knows_no_word_of_it(template, monkeypatch):
    monkeypatch.setattr("chat_models.VOCABULARY", [*SPECIAL, "?", "red"])
    chat = Chat(chat_tokenizer(template))
    window = chat.of_text("red")
    is_system = bool(window.messages)
    assert chat.tokenizer.decode(window.token_ids) == ("<system> red <end> <user>" if is_system else "<user>")
    assert is_system == (template == CHAT_TEMPLATE)


def test_messages_are_one_window():
    chat = Chat(chat_tokenizer())
    messages = [
        {"role": "system", "content": "the text says"},
        {"role": "user", "content": "where"},
        {"role": "assistant", "content": "the red box"},
    ]
    (window,) = read_messages(chat, messages, 100)
    assert chat.tokenizer.decode(window.token_ids) == (
        "<system> the text says <end> <user> where <end> <assistant> the red box <end> <user>"
    )


def test_windows_overlap_and_cover_the_text():
    chat = Chat(chat_tokenizer())
    words = " ".join(str(1 + number % 5) for number in range(50))
    windows = read_text(chat, words, 20)
    assert all(len(window.token_ids) <= 20 for window in windows)
    joined = windows[0].text.split()
    for window in windows[1:]:
        part = window.text.split()
        assert part[:2] == joined[-2:] or len(part) < 17  # 20 - 3 of the template; one in eight is shared
        joined += part[17 // 8 :]
    assert joined == words.split()


# ---------------------------------------------------------------------------------------------------------------- steps


def test_training_changes_the_prefix_alone(tmp_path):
    _, windows, _, rows = data()
    model = adapted()
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = prefix_of(model)
    run = trainer(model, tmp_path, windows, rows, max_steps=20, learning_rate=3e-2, per_device_train_batch_size=4)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.7 * first
    assert all(not torch.equal(p, before[name]) for name, p in prefix_of(model).items() if "scaling" not in name)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in base.items())
    assert not any(model.get_output_embeddings()._forward_pre_hooks.values())


def test_accumulated_batches_take_the_step_of_one_large_batch(tmp_path):
    _, windows, _, rows = data()
    ends = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = adapted()
        arguments = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd")
        trainer(model, tmp_path, windows, rows, max_steps=1, max_grad_norm=0.0, **arguments).train()
        ends.append(prefix_of(model))
    for name, parameter in ends[0].items():
        torch.testing.assert_close(ends[1][name], parameter, rtol=1e-5, atol=1e-7)


def test_a_lora_adapter_can_be_the_student_too(tmp_path):
    _, windows, _, rows = data()
    torch.manual_seed(0)
    model = get_peft_model(chat_model(), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    trainable = list(prefix_of(model))
    run = trainer(model, tmp_path, windows, rows, max_steps=10, learning_rate=1e-2)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < first and list(prefix_of(model)) == trainable


def test_batches_are_of_one_window_and_every_conversation_is_in_every_epoch():
    windows = [0] * 5 + [1] * 3 + [2] * 4
    sampler = WindowSampler(windows, 2, seed=7)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == 14 and set(order) == set(range(12))
        assert all(windows[a] == windows[b] for a, b in zip(order[::2], order[1::2], strict=True))
        epochs.append(order)
    assert epochs[0] != epochs[1]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]


def test_several_windows_are_read_once_each(tmp_path):
    _, windows, _, rows = data(window_tokens=20)
    assert len(windows) > 1 and {row["window"] for row in rows} == set(range(min(len(windows), len(rows))))
    model = adapted()
    run = trainer(model, tmp_path, windows, rows, max_steps=6, per_device_train_batch_size=2)
    read = []
    handle = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    run.train()
    handle.remove()
    assert sum(shape[0] == 1 for shape in read) == len(windows)


# ---------------------------------------------------------------------------------------------------------- distractors


def test_distractors_are_active_beside_in_some_steps_and_stay_as_they_are(tmp_path):
    _, windows, _, rows = data()
    model = adapted()
    torch.manual_seed(2)
    model.add_adapter("other", PrefixPlusConfig(**FIELDS))
    frozen = {name: p.clone() for name, p in model.named_parameters() if ".other" in name}
    assert frozen and not any(p.requires_grad for name, p in model.named_parameters() if name in frozen)
    run = trainer(model, tmp_path, windows, rows, max_steps=8, distractors=["other"])
    layer = next(model.base_model.prefix_layers())[1]
    seen = []
    forward = layer.forward

    def watched(key, value):
        seen.append((torch.is_grad_enabled(), tuple(layer.active_adapters)))
        return forward(key, value)

    layer.forward = watched
    run.train()
    assert {names for with_grad, names in seen if with_grad} == {("default",), ("default", "other")}
    assert layer.active_adapters == ["default"]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], p) and not parameters[name].requires_grad for name, p in frozen.items())


def test_a_prefix_that_was_trained_beside_another_documents_works_better_beside_it(tmp_path):
    _, windows, _, rows = data()
    losses = {}
    for distractors in ([], ["other"]):
        model = adapted()
        torch.manual_seed(2)
        model.add_adapter("other", PrefixPlusConfig(**FIELDS))
        chat = Chat(chat_tokenizer())
        others = read_text(chat, " ".join(reversed(DOCUMENT.split())), 100)
        asked = [Conversation(prompt, chat.answer("the blue table is under a red chair")) for prompt, _ in PAIRS]
        steps = dict(max_steps=60, learning_rate=2e-2, per_device_train_batch_size=4)
        for name, of_document, conversations in (
            ("other", others, encode_conversations(asked, chat, others)),
            ("default", windows, rows),
        ):
            model.set_adapter(name)
            run = trainer(
                model, tmp_path, of_document, conversations, distractors=distractors * (name == "default"), **steps
            )
            run.train()
        with ExitStack() as stack:
            for _, layer in model.base_model.prefix_layers():
                stack.enter_context(layer.activating(["default", "other"]))
            losses[bool(distractors)] = run.evaluate()["eval_loss"]
    assert losses[True] < 0.8 * losses[False]


def test_how_often_distractors_are_drawn():
    drawn = [tuple(sorted(drawn_distractors(["a", "b"], str(seed)))) for seed in range(400)]
    shares = {each: drawn.count(each) / len(drawn) for each in set(drawn)}
    expected = {(): 0.5, ("a",): 0.125, ("b",): 0.125, ("a", "b"): 0.25}
    assert shares.keys() == expected.keys() and all(abs(shares[key] - expected[key]) < 0.08 for key in expected)


def test_a_distractor_must_be_there_and_not_the_one_that_is_trained(tmp_path):
    _, windows, _, rows = data()
    with pytest.raises(ValueError, match="no PREFIX_PLUS adapter named 'absent'"):
        trainer(adapted(), tmp_path, windows, rows, distractors=["absent"])
    with pytest.raises(ValueError, match="'default' is active"):
        trainer(adapted(), tmp_path, windows, rows, distractors=["default"])


def test_what_the_trainer_refuses(tmp_path):
    _, windows, _, rows = data()
    with pytest.raises(ValueError, match="`k` must be at least 1, or None for all tokens, got 0"):
        trainer(adapted(), tmp_path, windows, rows, k=0)
    with pytest.raises(ValueError, match="modules_to_save"):
        trainer(adapted(modules_to_save=["lm_head"]), tmp_path, windows, rows)


# -------------------------------------------------------------------------------------------------------- two processes


def train_in_parallel(rank, folder):
    _, windows, _, rows = data()
    model = adapted()
    arguments = dict(per_device_train_batch_size=2, optim="sgd", max_grad_norm=0.0, learning_rate=0.1)
    trainer(model, folder / f"out{rank}", windows, rows, max_steps=2, **arguments).train()
    return prefix_of(model)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_take_the_steps_of_one(tmp_path):
    found = run(train_in_parallel, tmp_path)
    _, windows, _, rows = data()
    model = adapted()
    arguments = dict(per_device_train_batch_size=4, optim="sgd", max_grad_norm=0.0, learning_rate=0.1)
    trainer(model, tmp_path / "one", windows, rows, max_steps=2, **arguments).train()
    for name, parameter in prefix_of(model).items():
        for each in found:
            # the sum over halves of the batch rounds otherwise than that over all of it
            torch.testing.assert_close(each[name], parameter, rtol=1e-4, atol=1e-6)
