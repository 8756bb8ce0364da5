"""The model card says how to load the adapter, and leaves alone what is not its own."""

import copy
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from hub_server import card_errors
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.saving.files import update_model_card, write_atomically
from peft_prefix_plus.saving.model_card import SECTION_END, SECTION_START, with_section
from peft_prefix_plus.serving.folding import why_not_served


def llama(model_class=LlamaForCausalLM, base_model="org/base"):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, **sizes)
    config._name_or_path = str(base_model)
    return model_class(config)


def t5():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    config._name_or_path = "org/base"
    return T5ForConditionalGeneration(config)


def adapted(base=None, **fields):
    return get_peft_model(base or llama(), PrefixPlusConfig(**{"task_type": "CAUSAL_LM", **fields}))


def card_of(directory):
    return (Path(directory) / "README.md").read_text(encoding="utf-8")


def code_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_a_saved_adapter_has_a_card_with_library_base_model_task_and_tags(tmp_path):
    adapted().save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "org/base", "text-generation")
    assert data.tags == ["base_model:adapter:org/base", "prefix-plus", "prefix-tuning", "transformers"]


def test_the_hub_accepts_the_metadata_of_the_card(tmp_path):
    adapted().save_pretrained(tmp_path)
    metadata = card_of(tmp_path).split("---\n")[1]
    assert "org/base" in metadata and card_errors(metadata) == []


def test_the_card_says_what_to_install_and_import_before_anything_that_is_left_to_fill_in(tmp_path):
    adapted().save_pretrained(tmp_path)
    before = card_of(tmp_path).split("[More Information Needed]")[0]
    assert "pip install peft-prefix-plus" in before
    assert all("import peft_prefix_plus" in code for code in code_of(before)) and len(code_of(before)) == 2


def test_saving_twice_leaves_the_card_as_it_was(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    first = card_of(tmp_path)
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path) == first


def test_saving_another_adapter_replaces_the_section(tmp_path):
    adapted(num_virtual_tokens=5).save_pretrained(tmp_path)
    adapted(num_virtual_tokens=7).save_pretrained(tmp_path)
    text = card_of(tmp_path)
    assert "| Virtual tokens | 7 |" in text and "| Virtual tokens | 5 |" not in text
    assert text.count(SECTION_START) == text.count(SECTION_END) == text.count("## How to use") == 1


def test_what_the_user_writes_around_the_section_stays(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.data.license, card.data.tags = "mit", [*card.data.tags, "my-tag"]
    card.text = "# Mine\n\nA summary.\n\n" + card.text[card.text.index(SECTION_START) :] + "\n## Results\n\nGood.\n"
    card.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    again = ModelCard.load(tmp_path / "README.md")
    assert again.text == card.text.rstrip("\n")
    assert again.data.license == "mit" and "my-tag" in again.data.tags


def test_the_card_has_the_settings_of_the_adapter(tmp_path):
    fields = {"reparameterization": "mlp", "encoder_dim": 8, "encoder_hidden_size": 16, "sharing": "all"}
    adapted(num_virtual_tokens=3, layers_to_transform=[-1, 0], **fields).save_pretrained(tmp_path)
    text = card_of(tmp_path)
    assert "| Virtual tokens | 3 |" in text
    assert "| Reparameterization | `mlp` (width 8, hidden width 16, tanh) |" in text
    assert "| Sharing between layers | `all` |" in text
    assert "| Layers | -1, 0 |" in text


@pytest.mark.parametrize("reparameterization", ["none", "log"])
def test_the_card_of_a_prefix_without_a_projection_names_none(reparameterization, tmp_path):
    adapted(reparameterization=reparameterization).save_pretrained(tmp_path)
    text = card_of(tmp_path)
    assert f"| Reparameterization | `{reparameterization}` |" in text
    assert "Sharing between layers" not in text


TASKS = [
    ("CAUSAL_LM", llama, "AutoModelForCausalLM", "AutoPeftModelForCausalLM", "text-generation"),
    ("SEQ_2_SEQ_LM", t5, "AutoModelForSeq2SeqLM", "AutoPeftModelForSeq2SeqLM", None),
    (
        "SEQ_CLS",
        lambda: llama(LlamaForSequenceClassification),
        "AutoModelForSequenceClassification",
        "AutoPeftModelForSequenceClassification",
        "text-classification",
    ),
    (
        "TOKEN_CLS",
        lambda: llama(LlamaForTokenClassification),
        "AutoModelForTokenClassification",
        "AutoPeftModelForTokenClassification",
        "token-classification",
    ),
    (
        "QUESTION_ANS",
        lambda: llama(LlamaForQuestionAnswering),
        "AutoModelForQuestionAnswering",
        "AutoPeftModelForQuestionAnswering",
        "question-answering",
    ),
    (
        "FEATURE_EXTRACTION",
        lambda: llama(LlamaModel),
        "AutoModel",
        "AutoPeftModelForFeatureExtraction",
        "feature-extraction",
    ),
    (None, llama, "LlamaForCausalLM", "AutoPeftModel", "text-generation"),
]


@pytest.mark.parametrize(("task_type", "base", "auto_class", "auto_peft_class", "pipeline_tag"), TASKS)
def test_the_lines_use_the_classes_of_the_task(tmp_path, task_type, base, auto_class, auto_peft_class, pipeline_tag):
    import peft
    import transformers

    adapted(base(), task_type=task_type).save_pretrained(tmp_path / "my-adapter")
    text = card_of(tmp_path / "my-adapter")
    separate, at_once = code_of(text)
    assert f'base_model = {auto_class}.from_pretrained("org/base")' in separate
    assert 'model = PeftModel.from_pretrained(base_model, "my-adapter")' in separate
    assert f'model = {auto_peft_class}.from_pretrained("my-adapter")' in at_once
    assert hasattr(transformers, auto_class) and hasattr(peft, auto_peft_class)
    for code in (separate, at_once):
        compile(code, "README.md", "exec")
    if task_type is not None:  # otherwise PEFT does not say what the model is for
        assert ModelCard(text).data.pipeline_tag == pipeline_tag


FORMS = {
    "decoupled": ({}, "decoupled", "transformers, vLLM"),
    "gated": ({"gating": True}, "gated", "transformers, vLLM"),
    "servable": (PrefixPlusConfig.servable, "joint", "transformers, vLLM (in its cache)"),
    "joint, position-free": ({"decoupled": False}, "joint", "transformers"),
    "joint, one layer": (
        {"decoupled": False, "position_free": False, "layers_to_transform": [0]},
        "joint",
        "transformers",
    ),
    "with a module of its own": ({"modules_to_save": ["lm_head"]}, "decoupled", "transformers"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_card_says_the_form_and_where_it_runs_as_the_server_does(tmp_path, form):
    fields, name, runs_in = FORMS[form]
    config = fields(task_type="CAUSAL_LM") if callable(fields) else PrefixPlusConfig(task_type="CAUSAL_LM", **fields)
    model = get_peft_model(llama(), config)
    model.save_pretrained(tmp_path / "mine")
    text = card_of(tmp_path / "mine")
    assert f"| Form | {name} |" in text and f"| Runs in | {runs_in} |" in text
    served = why_not_served(llama().config, model.base_model.resolved_config()) is None
    assert ("vLLM" in runs_in) == served == ("prefix-plus serve --model org/base --adapter mine=mine" in text)
    assert ("include_prefix_tuning=True" in text) == (form == "servable")


def test_the_card_has_the_base_model_its_revision_and_the_number_of_parameters(tmp_path):
    model = get_peft_model(llama(), PrefixPlusConfig(task_type="CAUSAL_LM"), revision="v2")
    model.save_pretrained(tmp_path / "mine")
    text = card_of(tmp_path / "mine")
    prefix = {name: each for name, each in model.named_parameters() if each.requires_grad}
    trainable = sum(each.numel() for name, each in prefix.items() if name.endswith((".key", ".value")))
    assert "| Base model | `org/base`, revision `v2` |" in text
    assert f"| Trained parameters | {trainable:,} |" in text
    assert "--adapter mine=mine -- --revision v2" in text


def test_the_page_gets_an_example_unless_the_author_has_some(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.widget == [{"text": "Once upon a time"}]
    card.data.widget = [{"text": "Mine"}]
    card.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.widget == [{"text": "Mine"}]


def test_the_card_has_what_the_trainer_knows_of_the_training(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2,
        save_strategy="no", report_to=[], use_cpu=True,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(5), "labels": torch.arange(5)}] * 8
    trainer = Trainer(model=adapted(), args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert "| Training | |" not in card_of(tmp_path)
    trainer.save_state()
    trainer.create_model_card(dataset_tags="org/data", dataset="Data")
    text = card_of(tmp_path)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and f"| `eval_loss` | {losses[-1]:.4g} |" in text
    assert "| Data | `org/data` |" in text and "| Length | 4 steps, 4 epochs |" in text
    assert "eval_runtime" not in text and "per_second" not in text


@pytest.mark.parametrize(
    "state", ["[]", "nothing", '{"log_history": 3, "global_step": "4"}', '{"log_history": [1, {}]}']
)
def test_a_training_state_of_another_kind_is_left_out(tmp_path, state):
    (tmp_path / "trainer_state.json").write_text(state)
    adapted().save_pretrained(tmp_path)
    assert SECTION_START in card_of(tmp_path) and "| Training | |" not in card_of(tmp_path)


def test_the_lines_name_the_revision_of_the_base_model(tmp_path):
    model = get_peft_model(llama(), PrefixPlusConfig(task_type="CAUSAL_LM"), revision="v2")
    model.save_pretrained(tmp_path)
    assert 'from_pretrained("org/base", revision="v2")' in card_of(tmp_path)


def test_a_named_adapter_is_described_in_the_card_above_its_folder(tmp_path):
    model = adapted()
    model.add_adapter("second", PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=9))
    model.save_pretrained(tmp_path / "both")
    text = card_of(tmp_path / "both")
    assert 'model = PeftModel.from_pretrained(base_model, "both")' in text
    assert 'model.load_adapter("both", adapter_name="second", subfolder="second")' in text
    assert "| Virtual tokens | 20 | 9 |" in text
    assert not (tmp_path / "both" / "second" / "README.md").exists()


def test_a_named_adapter_alone_is_loaded_from_its_subfolder(tmp_path):
    model = get_peft_model(llama(), PrefixPlusConfig(task_type="CAUSAL_LM"), adapter_name="only")
    model.save_pretrained(tmp_path / "one")
    separate, at_once = code_of(card_of(tmp_path / "one"))
    assert 'PeftModel.from_pretrained(base_model, "one", adapter_name="only", subfolder="only")' in separate
    assert 'from_pretrained("one", subfolder="only")' in at_once


def test_an_adapter_that_was_not_saved_is_not_described(tmp_path):
    model = adapted()
    model.add_adapter("second", PrefixPlusConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert "second" not in card_of(tmp_path)


def test_a_checkpoint_below_has_its_own_card(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "checkpoint-10")
    model.save_pretrained(tmp_path)
    assert "checkpoint-10" not in card_of(tmp_path)
    assert "checkpoint-10" in card_of(tmp_path / "checkpoint-10")


UNRELATED = {
    "no metadata": "# My project\n\n## Install\n",
    "another library": "---\nlibrary_name: transformers\n---\n\n# A model\n\n## Use\n",
    "broken metadata": "---\nlibrary_name: [peft\n---\n\n# A model\n",
    "unusable metadata": "---\nlibrary_name: peft\nmodel-index: 3\n---\n\n# A model\n",
    "metadata that is a list": "---\n- peft\n---\n\n# A model\n",
    "empty": "",
}


@pytest.mark.parametrize("text", UNRELATED.values(), ids=UNRELATED.keys())
@pytest.mark.parametrize("place", [".", ".."], ids=["beside", "above"])
def test_a_configuration_saved_alone_leaves_an_unrelated_readme_alone(tmp_path, text, place):
    directory = tmp_path / "folder"
    directory.mkdir()
    readme = directory / place / "README.md"
    readme.write_text(text, encoding="utf-8")
    PrefixPlusConfig().save_pretrained(directory)
    assert readme.read_text(encoding="utf-8") == text


def test_a_configuration_saved_below_a_card_that_peft_did_not_write_leaves_it_alone(tmp_path):
    text = "---\nlibrary_name: peft\n---\n\n# My adapters\n\n## Results\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    PrefixPlusConfig().save_pretrained(tmp_path / "folder")
    assert card_of(tmp_path) == text


def test_a_configuration_saved_alone_makes_no_card(tmp_path):
    PrefixPlusConfig().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["adapter_config.json"]


def test_the_directory_of_a_local_base_model_is_not_published(tmp_path):
    base = tmp_path / "private" / "my-base"
    llama().save_pretrained(base)
    adapted(llama(base_model=base)).save_pretrained(tmp_path / "adapter")
    text = card_of(tmp_path / "adapter")
    assert ModelCard(text).data.base_model is None
    assert "private" not in text and card_errors(text.split("---\n")[1]) == []
    assert len(code_of(text)) == 1 and 'from_pretrained("my-base")' in code_of(text)[0]


def test_the_id_that_the_user_gives_for_a_local_base_model_stays(tmp_path):
    base = tmp_path / "my-base"
    llama().save_pretrained(base)
    model = adapted(llama(base_model=base))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.data.base_model = "org/base"
    card.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "org/base"


def test_the_card_that_a_trainer_writes_has_the_section_too(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(model=adapted(num_virtual_tokens=6), args=arguments)
    trainer.save_model()
    trainer.create_model_card(tags=["my-tag"])
    text = card_of(tmp_path)
    assert "### Training hyperparameters" in text
    assert text.count("pip install peft-prefix-plus") == 1 and "| Virtual tokens | 6 |" in text
    assert {"my-tag", "prefix-plus", "generated_from_trainer"} <= set(ModelCard(text).data.tags)


def test_the_card_of_another_method_is_peft_own(tmp_path):
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted().save_pretrained(tmp_path / "ours")
    for name in ("create_or_update_model_card", "_upload_modified_files"):
        assert getattr(PeftModel, name).__module__ in ("peft.peft_model", "transformers.utils.hub")
        assert name not in vars(model)
    model.save_pretrained(tmp_path / "theirs")
    assert SECTION_START not in card_of(tmp_path / "theirs")


def test_a_saved_model_can_be_copied_and_pickled(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "original")
    for name, copied in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        copied.save_pretrained(tmp_path / name)
        assert copied.create_or_update_model_card.__self__ is copied
        assert f'"{name}"' in card_of(tmp_path / name)


def test_the_line_ends_of_a_card_stay(tmp_path):
    PrefixPlusConfig().save_pretrained(tmp_path)
    text = "---\r\nlibrary_name: peft\r\n---\r\n\r\n# Title\r\n\r\n## Results\r\n"
    (tmp_path / "README.md").write_bytes(text.encode())
    update_model_card(str(tmp_path))
    written = (tmp_path / "README.md").read_bytes().decode()
    assert "How to use" in written and "\n" not in written.replace("\r\n", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Title\n\nSummary.\n\n## Results\n", "# Title\n\nSummary.\n\nSECTION\n\n## Results\n"),
        ("# Title\n\n```sh\n## no heading\n```\n\n## Results\n", "# Title\n\n```sh\n## no heading\n```\n\nSECTION\n\n## Results\n"),
        ("# Title\n<!--\n## no heading\n-->\n## Results\n", "# Title\n<!--\n## no heading\n-->\n\nSECTION\n\n## Results\n"),
        ("# Title\n\nSummary.\n", "# Title\n\nSummary.\n\nSECTION\n"),
        ("", "SECTION\n"),
    ],
    ids=["before the first heading", "not in code", "not in a comment", "at the end", "alone"],
)  # fmt: skip
def test_the_section_comes_before_the_first_heading_below_the_title(text, expected):
    assert with_section(text, "SECTION") == expected


def test_a_section_that_lost_its_end_mark_takes_no_text_with_it():
    text = f"# Title\n\n{SECTION_START}\n\nmine\n\n## Results\n"
    once = with_section(text, f"{SECTION_START} one {SECTION_END}")
    twice = with_section(once, f"{SECTION_START} two {SECTION_END}")
    assert "mine" in twice and " two " in twice and " one " not in twice


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text("old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(str(path), "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["README.md"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_written_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    previous = os.umask(0o027)
    try:
        PrefixPlusConfig().save_pretrained(tmp_path)
    finally:
        os.umask(previous)
    assert (tmp_path / "adapter_config.json").stat().st_mode & 0o777 == 0o640


def test_saving_again_completes_the_card_once(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path).count(SECTION_START) == 1


def test_a_loaded_adapter_is_saved_with_a_card(tmp_path):
    adapted().save_pretrained(tmp_path / "one")
    model = PeftModel.from_pretrained(llama(), tmp_path / "one")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "two")
    assert '"two"' in card_of(tmp_path / "two")
