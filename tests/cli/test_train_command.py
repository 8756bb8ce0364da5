"""`prefix-plus train`: the forms of data, evaluation, what a file of options and other names say, the tasks, the Hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from command import EXAMPLES, WORDS, failure, run, training, word_tokenizer, write_lines
from hub_server import File, running_hub
from peft import AutoPeftModelForSeq2SeqLM, PeftConfig, PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_prefix_plus.cli.chat import encode_chat
from peft_prefix_plus.cli.errors import CommandError
from peft_prefix_plus.cli.records import Chat
from peft_prefix_plus.training.checkpoints import checkpoints


TEMPLATE = """{%- for message in messages -%}
{{ '<role> ' + message.role + ' <says> ' + message.content + ' <end> ' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<role> assistant <says> ' }}{% endif -%}"""
MARKED = """{%- for message in messages -%}
{{ '<role> ' + message.role + ' <says> ' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + ' <end>' }}{% endgeneration %}{{ ' ' }}
{%- else %}{{ message.content + ' <end> ' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<role> assistant <says> ' }}{% endif -%}"""
FORGETFUL = """{%- for message in messages -%}
{{ '<role> ' + message.role + ' <says> ' + (message.content if loop.last else 'something') + ' <end> ' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<role> assistant <says> ' }}{% endif -%}"""
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "which chair"},
    {"role": "assistant", "content": "the red chair"},
    {"role": "user", "content": "which table"},
    {"role": "assistant", "content": "the blue table"},
]


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = [
        "<unknown>",
        "<end>",
        "<role>",
        "<says>",
        "system",
        "user",
        "assistant",
        "be",
        "brief",
        "which",
        "chair",
        "the",
        "red",
        "table",
        "blue",
        "something",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=template)


# ---------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["plain", "marked"])
def test_the_loss_is_on_what_the_assistant_says_and_its_end(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    encoded = encode_chat(Chat(TURNS), tokenizer)
    assert encoded.token_ids == tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    with_loss = tokenizer.convert_ids_to_tokens([label for label in encoded.labels if label != -100])
    assert with_loss == ["the", "red", "chair", "<end>", "the", "blue", "table", "<end>"]
    assert all(label in (-100, token) for token, label in zip(encoded.token_ids, encoded.labels, strict=True))
    everything = encode_chat(Chat(TURNS), tokenizer, assistant_only_loss=False)
    assert everything.labels == everything.token_ids == encoded.token_ids


def test_a_long_conversation_loses_its_end_and_keeps_an_answer() -> None:
    tokenizer = chat_tokenizer()
    encoded = encode_chat(Chat(TURNS), tokenizer, max_length=17)
    whole = encode_chat(Chat(TURNS), tokenizer)
    assert (encoded.token_ids, encoded.labels) == (whole.token_ids[:17], whole.labels[:17])
    encoded = encode_chat(Chat(TURNS), tokenizer, max_length=8)  # no answer begins so early
    words = tokenizer.convert_ids_to_tokens(encoded.token_ids)
    assert words == ["<end>", "<role>", "assistant", "<says>", "the", "red", "chair", "<end>"]
    with_loss = [label for label in encoded.labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(with_loss) == ["the", "red", "chair", "<end>"]


def test_conversations_that_cannot_be_learned_from_are_refused_in_words() -> None:
    with pytest.raises(CommandError, match="no chat template"):
        encode_chat(Chat(TURNS), chat_tokenizer(None))
    with pytest.raises(CommandError, match=r"message 3 differently when more follows.*--chat-template-path"):
        encode_chat(Chat(TURNS, place="here"), chat_tokenizer(FORGETFUL))
    with pytest.raises(CommandError, match=r"here: the chat template does not take it.*only two roles"):
        encode_chat(Chat(TURNS, place="here"), chat_tokenizer("{{ raise_exception('only two roles') }}"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "'messages' must be a list of objects with a 'role'"),
        ([{"content": "hello"}], "'messages' must be a list of objects with a 'role'"),
        ([{"role": "user", "content": "hello"}], "no message has the role 'assistant'"),
        ([{"role": "user"}, {"role": "assistant", "content": "x"}], "a message with the role 'user' has no 'content'"),
    ],
)
def test_messages_of_another_form_are_refused(base: Path, tmp_path: Path, messages: object, message: str) -> None:
    data = write_lines(tmp_path / "chats.jsonl", [{"messages": messages}])
    assert message in failure(*training(base, data, tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()


def test_training_on_conversations_saves_the_template_it_was_given(base: Path, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": e["prompt"]}, {"role": "assistant", "content": e["completion"]}]}
        for e in EXAMPLES
    ]
    data = write_lines(tmp_path / "chats.jsonl", chats)
    assert "no chat template" in failure(*training(base, data, tmp_path / "adapter"))
    (tmp_path / "template.jinja").write_text(MARKED, encoding="utf-8")
    run(
        *training(
            base, data, tmp_path / "adapter", "--max-steps", 2, "--chat-template-path", tmp_path / "template.jinja"
        )
    )
    assert (tmp_path / "adapter" / "chat_template.jinja").read_text(encoding="utf-8") == MARKED


# ---------------------------------------------------------------------------------------------------- sources


def test_tables_and_folders_train_what_json_lines_do(base: Path, data: Path, tmp_path: Path) -> None:
    frame = pandas.DataFrame(EXAMPLES)
    frame.to_csv(tmp_path / "data.csv", index=False)
    (tmp_path / "folder").mkdir()
    frame.to_parquet(tmp_path / "folder" / "train.parquet")
    frame.to_parquet(tmp_path / "folder" / "test.parquet")
    frame.to_parquet(tmp_path / "data.parquet")
    weights = []
    sources = (data, tmp_path / "data.csv", tmp_path / "data.parquet", tmp_path / "folder")
    for number, source in enumerate(sources):
        split = ["--eval-split", "test"] if source.is_dir() else []
        output = tmp_path / f"adapter{number}"
        run(*training(base, source, output, "--max-steps", 2, *split))
        weights.append(load_file(output / "adapter_model.safetensors"))
    for other in weights[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in weights[0].items())


def test_sources_that_cannot_be_read_are_refused_in_words(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "adapter"
    assert "Cannot read no-user/no-data, split 'train'" in failure(*training(base, Path("no-user/no-data"), output))
    pandas.DataFrame([{"instruction": "a"}]).to_csv(tmp_path / "data.csv", index=False)
    message = failure(*training(base, tmp_path / "data.csv", output))
    assert "data.csv, row 1: expected the keys" in message and "found 'instruction'" in message
    assert "is a file, which has no splits" in failure(*training(base, data, output, "--eval-split", "test"))
    assert "none would be left" in failure(*training(base, data, output, "--eval-split", "0.95"))
    assert "fraction in (0, 1)" in failure(*training(base, data, output, "--eval-split", "1.5"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets" in failure(*training(base, tmp_path / "data.csv", output))
    assert not output.exists()


# ---------------------------------------------------------------------------------------------------- evaluation


def logged(output: Path) -> list[dict[str, float]]:
    state = json.loads((checkpoints(output)[-1] / "trainer_state.json").read_text(encoding="utf-8"))
    return list(state["log_history"])


def test_the_best_checkpoint_is_saved_and_training_stops_early(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "adapter"
    # learning the training data makes these ones less likely, after the first steps towards the words of both
    other = write_lines(tmp_path / "other.jsonl", [{"prompt": "red table", "completion": "red cup on the table"}])
    # with "none", whose steps stay as large as the rate
    rate = ["--learning-rate", 30.0, "--schedule", "constant", "--max-steps", 40, "--reparameterization", "none"]
    stops = ["--early-stopping-patience", 2, "--eval-steps", 2, "--eval-data", other, "--keep-checkpoints", 50]
    run(*training(base, data, output, *rate, *stops))
    losses = {entry["step"]: entry["eval_loss"] for entry in logged(output) if "eval_loss" in entry}
    assert set(losses) == set(range(2, max(losses) + 1, 2)) and max(losses) < 40
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 4
    saved, expected = (
        load_file(path / "adapter_model.safetensors") for path in (output, output / f"checkpoint-{best}")
    )
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    printed = capsys.readouterr().out
    assert f"eval_loss {losses[best]:.4g} (checkpoint-{best})" in printed
    assert (output / "training_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_of_epochs_and_a_held_out_fraction(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    run(*training(base, data, output, "--epochs", 2, "--eval-split", "0.25", "--load-best-model-at-end", "--bf16"))
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]  # 3 records in batches of 2
    assert sum("eval_loss" in entry for entry in logged(output)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval-steps", 5], "--eval-steps needs evaluation data"),
        (["--early-stopping-patience", 5], "--load-best-model-at-end needs evaluation data"),
        (["--eval-split", "0.5", "--eval-strategy", "sometimes"], "`eval_strategy` must be epoch or steps"),
        (["--eval-split", "0.5", "--eval-strategy", "epoch", "--eval-steps", 5], "contradict each other"),
        (["--load-in-4bit", "--load-in-8bit"], "contradict each other"),
        (["--hub-model-id", "user/name"], "need --push-to-hub"),
        (["--task-type", "FEATURE_EXTRACTION"], "`task_type` must be one of CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS"),
        (["--report-to", "nowhere"], "nowhere"),
        (["--push-to-hub"], "--push-to-hub: cannot write to the repository 'adapter'"),
        (["--revision", "v9", "--model", "user/base"], "Cannot load the tokenizer of 'user/base'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_options_leave_nothing(
    base: Path, data: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    assert message in failure(*training(base, data, tmp_path / "new" / "adapter", *options))
    assert not (tmp_path / "new").exists()


def test_quantization_needs_bitsandbytes(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_prefix_plus.cli import loading

    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    message = failure(*training(base, data, tmp_path / "adapter", "--load-in-4bit"))
    assert "--load-in-4bit needs the package bitsandbytes" in message and "pip install bitsandbytes" in message
    assert not (tmp_path / "adapter").exists()


# ---------------------------------------------------------------------------------------------------- going on


def test_going_on_with_other_options_or_data_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    run(*training(base, data, output, "--max-steps", 2, "--save-steps", 1))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for options, message in (
        (["--learning-rate", 0.5], "`learning_rate` was 0.05 and is 0.5 now"),
        (["--batch-size", 3], "`batch_size` was 2 and is 3 now"),
        (["--seed", 3], "`seed` was 0 and is 3 now"),
        (["--dtype", "bfloat16"], "`dtype` was 'auto' and is 'bfloat16' now"),
        (["--max-length", 3], "`data_digest` was"),
        (["--eval-split", "0.5"], "`data_digest` was"),
    ):
        assert message in failure(*training(base, data, output, "--resume", "--max-steps", 4, *options))
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    moved = data.rename(tmp_path / "moved.jsonl")
    run(*training(base, moved, output, "--resume", "--max-steps", 4, "--logging-steps", 1, "--save-steps", 2))
    assert checkpoints(output)[-1].name == "checkpoint-4"


def test_an_interrupt_before_the_first_checkpoint_leaves_nothing(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    def press_ctrl_c(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "training_step", press_ctrl_c)
    from peft_prefix_plus.cli import main

    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in training(base, data, tmp_path / "new" / "adapter")])
    assert stop.value.code != 0 and not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------- how options are given


def test_a_file_of_options_and_the_command_line_before_it(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    options = {
        "model_name_or_path": str(base),
        "dataset-name": str(data),
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "learning_rate": "5e-2",
        "max_steps": 3,
        "save_steps": 1,
        "progress": False,
        "num_virtual_tokens": 4,
        "layers_to_transform": [0, 1],
        "init_weights": "zero",
        "report_to": ["none"],
        "eval_data": None,
    }
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    run("train", "--config", tmp_path / "options.yaml", "--max_steps", 2, "--num-virtual-tokens", 3)
    config = PeftConfig.from_pretrained(str(output))
    assert (config.num_virtual_tokens, config.layers_to_transform, config.init_weights) == (3, [0, 1], "zero")
    assert checkpoints(output)[-1].name == "checkpoint-2"
    written = json.loads((checkpoints(output)[-1] / "training_options.json").read_text(encoding="utf-8"))
    assert (written["batch_size"], written["learning_rate"]) == (2, 0.05)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "expected a mapping of options to values, found list"),
        ("learning_rat: 1\n", "'learning_rat' is not an option; did you mean 'learning_rate'?"),
        ("batch_size: 1\nper-device-train-batch-size: 2\n", "gives the option --batch-size a second time"),
        ("seed: {a: 1}\n", "'seed' must be a value or a list of values, found dict"),
        ("a: [", "Cannot read"),
        (None, "Cannot read"),
    ],
)
def test_a_bad_file_of_options_is_refused_in_words(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "options.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert message in failure("train", "--config", path)


def test_the_help_is_whole_at_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("train", "generate", "convert", "inspect", "params", "demo", "run"):
        run(command, "--help")
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 80 and not re.search(r"\w…", printed)
        if command == "train":
            names = set(re.findall(r"--[\w-]+", printed))
            assert {
                "--per-device-train-batch-size",
                "--no-gradient-checkpointing",
                "--load-best-model-at-end",
            } <= names


# ---------------------------------------------------------------------------------------------------- tasks


def test_a_classifier_learns_named_classes_and_says_them(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": f"the {thing} is {color}", "label": color} for color in ("red", "blue") for thing in ("cup", "box")
    ]
    data, output = write_lines(tmp_path / "data.jsonl", rows * 4), tmp_path / "adapter"
    evaluation = ["--eval-data", data, "--metric-for-best-model", "eval_accuracy", "--load-best-model-at-end"]
    run(*training(base, data, output, "--task-type", "SEQ_CLS", "--epochs", 10, *evaluation))
    assert "accuracy" in capsys.readouterr().out
    config = AutoConfig.from_pretrained(output)
    assert config.id2label == {0: "blue", 1: "red"}
    classifier = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    model = PeftModel.from_pretrained(classifier, output).eval()
    tokenizer = word_tokenizer()
    for row in rows:
        number = (
            model(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)).logits.argmax().item()
        )
        assert config.id2label[number] == row["label"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a cup", "label": "red"}] * 2, "only the class 'red'"),
        ([{"text": "a cup", "label": 0.5}], "'label' must be the name or the number of a class, found 0.5"),
        ([{"text": "a cup"}], "expected the keys 'text' and 'label'; found 'text'"),
    ],
)
def test_labels_that_are_no_classes_are_refused(
    base: Path, tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    data = write_lines(tmp_path / "data.jsonl", rows)
    assert message in failure(*training(base, data, tmp_path / "adapter", "--task-type", "SEQ_CLS"))


def test_an_encoder_decoder_learns_to_answer(data: Path, tmp_path: Path) -> None:
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(WORDS), eos_token_id=0, **sizes))
    model.save_pretrained(tmp_path / "t5")
    word_tokenizer().save_pretrained(tmp_path / "t5")
    output = tmp_path / "adapter"
    assert "expected the keys 'prompt' and 'completion'; found 'text'" in failure(
        *training(
            tmp_path / "t5",
            write_lines(tmp_path / "text.jsonl", [{"text": "a"}]),
            output,
            "--task-type",
            "SEQ_2_SEQ_LM",
        )
    )
    run(*training(tmp_path / "t5", data, output, "--task-type", "SEQ_2_SEQ_LM", "--epochs", 20, "--logging-steps", 1))
    losses = [entry["loss"] for entry in logged(output) if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(output).eval()
    tokenizer = word_tokenizer()
    total = 0.0
    for example in EXAMPLES:  # the loss by hand: the decoder's answer and the end, given the encoder's prompt
        labels = torch.tensor([[*tokenizer(example["completion"])["input_ids"], 0]])
        inputs = torch.tensor([tokenizer(example["prompt"])["input_ids"]])
        shifted = torch.cat([torch.zeros(1, 1, dtype=torch.long), labels[:, :-1]], 1)
        logits = loaded(input_ids=inputs, decoder_input_ids=shifted).logits
        total += torch.nn.functional.cross_entropy(logits[0], labels[0]).item() / len(EXAMPLES)
    assert total < losses[0]


# ---------------------------------------------------------------------------------------------------- the Hub


def test_the_adapter_goes_to_the_hub(base: Path, data: Path, tmp_path: Path) -> None:
    with running_hub({"token-of-user": "user"}) as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "HF_TOKEN": "token-of-user"}
        options = ["--max-steps", 1, "--push-to-hub", "--hub-model-id", "user/adapter", "--hub-private-repo"]
        arguments = [str(argument) for argument in training(base, data, tmp_path / "output", *options, "--overwrite")]
        command = [sys.executable, "-m", "peft_prefix_plus.cli", *arguments]
        (tmp_path / "output").mkdir()
        own = "---\nlibrary_name: peft\ndatasets: [user/data]\n---\n\nMine.\n"
        (tmp_path / "output" / "README.md").write_text(own, encoding="utf-8")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "The adapter is on the Hub: user/adapter" in done.stdout
        repository = hub.repositories["user/adapter"]
        assert repository.is_private
        local = (tmp_path / "output" / "adapter_model.safetensors").read_bytes()
        assert repository.read("adapter_model.safetensors") == local
        card = repository.read("README.md").decode()
        assert '"user/adapter"' in card and "Mine." in card
        saved = (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
        table = saved[saved.index("| Training | |") :].split("\n\n")[0]
        assert table in card and "| Data | `user/data` |" in table and "1 steps" in table
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= repository.commit_of().files.keys()
        assert "trainer_state.json" not in repository.commit_of().files
        assert "tokenizer.json" in repository.commit_of().files
        assert not any("checkpoint" in path for path in repository.commit_of().files)

        edited = File(card.replace("Mine.", "Edited on the Hub.").encode(), is_lfs=False)
        repository.add_commit("main", "Edit", {**repository.commit_of().files, "README.md": edited})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Edited on the Hub." in repository.read("README.md").decode()
