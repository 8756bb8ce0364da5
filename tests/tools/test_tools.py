"""Tools that docs/tools.md lists, called as their users call them. Those that are not installed skip; `make test-tools` has all."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_base, tiny_model, token_ids, word_tokenizer
from peft import AutoPeftModelForCausalLM, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from peft_prefix_plus import PrefixPlusConfig


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "w1", "bos_token": "w2", "eos_token": "w0"})
    return tokenizer


def move(model: Any, std: float = 0.3) -> None:
    """Give an adapter a prefix that shows."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "encoder" in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=std)


@pytest.fixture
def adapter(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of an adapter, whose base model lies beside it with its tokenizer."""
    base = save_base(tmp_path / "base", tokenizer)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def expected_logits(adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(input_ids=token_ids()).logits
    return logits


# ------------------------------------------------------------------------------------------------------ transformers


def test_auto_model_loads_an_adapter_by_its_folder(adapter: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=token_ids()).logits, expected_logits(adapter))
        model.disable_adapters()
        assert not torch.allclose(model(input_ids=token_ids()).logits, expected_logits(adapter))


def test_a_models_own_load_adapter_and_add_adapter(adapter: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter.parent / "base").eval()
    with torch.no_grad():
        plain = model(input_ids=token_ids()).logits
        model.load_adapter(str(adapter))
        assert torch.equal(model(input_ids=token_ids()).logits, expected_logits(adapter))
        model.add_adapter(PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "new")
        model.set_adapter("new")
        assert torch.equal(model(input_ids=token_ids()).logits, plain)


def test_the_seq2seq_trainer_generates_in_its_evaluation(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    base = tiny_model("t5", "SEQ_2_SEQ_LM")
    base.generation_config.eos_token_id = base.config.eos_token_id = 0
    model = get_peft_model(
        base, PrefixPlusConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, reparameterization="none")
    )
    rows = [{"input_ids": [5 + row, 6, 7], "labels": [8, 9, 0]} for row in range(8)]
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            str(tmp_path / "run"),
            max_steps=20,
            learning_rate=5e-2,
            predict_with_generate=True,
            generation_max_length=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"eights": float((found.predictions == 8).any(axis=1).mean())},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_eights"] == 1.0 > before["eval_eights"]


# -------------------------------------------------------------------------------------------------- other packages


def test_sentence_transformers_trains_saves_and_loads_a_prefix(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def load(path: Path) -> Any:
        transformer = modules.Transformer(str(path))
        pooling = modules.Pooling(32)
        return sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu")

    texts = ["w3 w4 w5", "w9 w8", "w7"]
    model = load(tmp_path / "base")
    plain = model.encode(texts)
    model.add_adapter(PrefixPlusConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4))
    assert torch.equal(torch.tensor(model.encode(texts)), torch.tensor(plain))
    move(model)
    adapted = model.encode(texts)
    assert abs(adapted - plain).max() > 1e-3
    model.save_pretrained(str(tmp_path / "adapter"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert abs(again.encode(texts) - adapted).max() < 1e-6


def test_the_evaluation_harness_runs_with_the_method_registered(adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "questions.jsonl"
    rows = [{"question": "w3 w4 w5", "answers": ["w6", "w7"], "right": 0}] * 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "output_type: multiple_choice\n"
        "test_split: test\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{answers}}"\n'
        "doc_to_target: right\n"
        "metric_list: [{metric: acc}]\n",
        encoding="utf-8",
    )

    def evaluate(*adapted: str) -> dict[str, Any]:
        output = tmp_path / f"results-{len(adapted)}"
        arguments = ["--model", "hf", "--model_args", ",".join([f"pretrained={adapter.parent / 'base'}", *adapted])]
        arguments += ["--tasks", "tiny", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2"]
        arguments += ["--output_path", str(output), "--log_samples"]
        subprocess.run(
            [sys.executable, "-m", "peft_prefix_plus.cli", "run", "lm_eval", *arguments],
            check=True,
            capture_output=True,
            env={**os.environ, "HF_HOME": str(tmp_path / "cache")},
        )
        sample = json.loads(next(output.rglob("samples_*.jsonl")).read_text(encoding="utf-8").splitlines()[0])
        found: dict[str, Any] = sample
        return found

    plain, adapted = evaluate(), evaluate(f"peft={adapter}")
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)[[6, 7]]
    found = [float(answer[0][0]) for answer in adapted["resps"]]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)
    assert adapted["resps"] != plain["resps"]


def test_without_the_import_peft_names_the_method_in_its_error(adapter: Path) -> None:
    program = f"from peft import PeftModel; PeftModel.from_pretrained(None, {str(adapter)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "KeyError" in result.stderr and "PREFIX_PLUS" in result.stderr
