"""The entry for PEFT's own comparison of methods: its files and its runner, and every step that PEFT's script takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from peft_prefix_plus import PrefixPlusConfig


FOLDER = Path(__file__).parents[2] / "benchmarks" / "method_comparison"
EXPERIMENTS = sorted((FOLDER / "experiments" / "prefix_plus").iterdir())


def optimizer_arguments(experiment: Path) -> dict[str, float]:
    parameters = json.loads((experiment / "training_params.json").read_text(encoding="utf-8"))
    assert list(parameters) == ["optimizer_kwargs"], "all else must be what the other methods have"
    return parameters["optimizer_kwargs"]


# ------------------------------------------------------------------------------------------------ the files


def test_there_is_a_default_and_a_tuned_experiment() -> None:
    names = [experiment.name for experiment in EXPERIMENTS]
    assert "llama-3.2-3B-default" in names and len(names) == 2
    default = json.loads((FOLDER / "experiments/prefix_plus/llama-3.2-3B-default/adapter_config.json").read_text())
    assert set(default) == {"peft_type", "task_type", "num_virtual_tokens"}


def llama_3_2_3b() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256,
                hidden_size=3072,
                intermediate_size=8192,
                num_hidden_layers=28,
                num_attention_heads=24,
                num_key_value_heads=8,
                head_dim=128,
                tie_word_embeddings=True,
            )
        )


@pytest.mark.filterwarnings("ignore:LlamaForCausalLM has no weights yet")
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_an_experiment_trains_as_many_parameters_as_lora_of_rank_32(experiment: Path) -> None:
    config = PeftConfig.from_pretrained(str(experiment))
    assert isinstance(config, PrefixPlusConfig)
    model = get_peft_model(llama_3_2_3b(), config, low_cpu_mem_usage=True)
    learned = (name.endswith((".key", ".value")) * each.numel() for name, each in model.named_parameters())
    keys_and_values = sum(learned)
    lora = get_peft_model(llama_3_2_3b(), LoraConfig(task_type="CAUSAL_LM", r=32), low_cpu_mem_usage=True)
    assert keys_and_values == lora.get_nb_trainable_parameters()[0] == 9_175_040
    further = model.get_nb_trainable_parameters()[0] - keys_and_values
    page = (FOLDER.parent.parent / "docs" / "method-comparison.md").read_text(encoding="utf-8")
    assert f"{keys_and_values:,}" in page and f"{further:,} for the" in page


# ------------------------------------------------------------------------------------------------ the runner


STAND_IN = """
import json, os, sys
from peft import PeftConfig
from utils import NEIGHBOUR

print(json.dumps({
    "name": __name__,
    "file": __file__,
    "arguments": sys.argv,
    "directory": os.getcwd(),
    "neighbour": NEIGHBOUR,
    "type": PeftConfig.from_pretrained(sys.argv[-1]).peft_type,
}))
sys.exit(3)
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False)


def test_the_runner_registers_the_method_and_hands_on(tmp_path: Path) -> None:
    task = tmp_path / "method_comparison" / "MetaMathQA"
    task.mkdir(parents=True)
    (task / "run.py").write_text(STAND_IN, encoding="utf-8")
    (task / "utils.py").write_text("NEIGHBOUR = 'theirs'", encoding="utf-8")
    path = "experiments/prefix_plus/llama-3.2-3B-default"
    result = run(tmp_path, "-v", "--clean", path)
    assert result.returncode == 3, result.stderr  # the script's own
    assert json.loads(result.stdout) == {
        "name": "__main__",
        "file": str(task / "run.py"),
        "arguments": [str(task / "run.py"), "-v", "--clean", path],
        "directory": str(FOLDER),
        "neighbour": "theirs",
        "type": "PREFIX_PLUS",
    }


@pytest.mark.parametrize("arguments", [[], ["-v", "experiments/prefix_plus/llama-3.2-3B-default"]])
def test_the_runner_says_how_to_call_it(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 1 and "PEFT_CHECKOUT" in result.stderr


def test_the_runner_names_a_folder_that_is_no_checkout(tmp_path: Path) -> None:
    result = run(tmp_path, "experiments/prefix_plus/llama-3.2-3B-default")
    assert result.returncode == 1
    assert str(tmp_path) in result.stderr and "MetaMathQA" in result.stderr and "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------------ the script's steps


def base_model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=100, num_key_value_heads=2, pad_token_id=0, initializer_range=0.1, **sizes)
    return LlamaForCausalLM(config).to(torch.bfloat16)


ROWS = [list(range(10, 18)), list(range(30, 35)), list(range(50, 61)), list(range(70, 73))]


def padded(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    """Return token ids and their mask, padded on a side."""
    length = max(map(len, rows))
    filling = [[0] * (length - len(row)) for row in rows]
    ids = [fill + row if side == "left" else row + fill for fill, row in zip(filling, rows, strict=True)]
    input_ids = torch.tensor(ids)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def written(model: Any, rows: list[list[int]]) -> list[list[int]]:
    """Let a model continue rows as the script does: in inference mode, padded on the left, by a new generation config."""
    model.eval()
    with torch.inference_mode():
        batch = padded(rows, "left")
        config = GenerationConfig(max_length=batch["input_ids"].shape[1] + 6, pad_token_id=0)
        output = model.generate(**batch, generation_config=config)
    return output[:, batch["input_ids"].shape[1] :].tolist()


def train(model: Any, optimizer: Any, schedule: Any, num_steps: int) -> list[float]:
    """Train as the script does: padded on the right, the padding without loss, gradients clipped, one parameter group."""
    model.train()
    batch = padded(ROWS, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        count = int(batch["attention_mask"].sum())
        loss = model(**batch, labels=labels, num_items_in_batch=count).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_an_experiment_goes_through_every_step_of_the_script(experiment: Path, tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(str(experiment))
    rows = padded(ROWS, "left")
    with torch.inference_mode():
        expected = base_model()(**rows).logits
    model: Any = get_peft_model(base_model(), config, autocast_adapter_dtype=True)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    optimizer = torch.optim.AdamW(model.parameters(), **optimizer_arguments(experiment))
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=20)
    model.eval()
    with model.disable_adapter(), torch.inference_mode():
        assert torch.equal(model(**rows).logits, expected)  # what forgetting is measured against
    losses = train(model, optimizer, schedule, 10)
    halfway = written(model, ROWS)
    losses += train(model, optimizer, schedule, 10)  # nothing made in inference mode may enter a backward
    assert losses[-1] < 0.9 * losses[0]
    finished = written(model, ROWS)
    assert finished != halfway
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / SAFETENSORS_WEIGHTS_NAME).stat().st_size > 4 * model.get_nb_trainable_parameters()[0]
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == "PREFIX_PLUS"  # it goes into the result's file
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path))
    assert written(loaded, ROWS) == finished


@pytest.mark.parametrize("config_class", [PeftConfig, PrefixPlusConfig])
@pytest.mark.parametrize("init_weights", [True, "activations"])
def test_a_config_read_from_a_file_starts_as_the_one_written(
    config_class: type[PeftConfig], init_weights: bool | str, tmp_path: Path
) -> None:
    written_out = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=160, init_weights=init_weights)
    written_out.save_pretrained(str(tmp_path))
    starts = []
    for config in (written_out, config_class.from_pretrained(str(tmp_path))):
        base = base_model()
        torch.manual_seed(1)
        model: Any = get_peft_model(base, config)
        starts.append({name: tensor for name, tensor in model.state_dict().items() if "prefix_plus" in name})
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
