"""An adapter that is saved as PEFT's PREFIX_TUNING too: PEFT alone, in a process without this package, is the reference."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import running_hub
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_prefix_plus import PrefixPlusConfig, load_adapters


TOKENS = torch.arange(3, 13).reshape(2, 5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return folder


def adapted(base: Path, **fields: Any) -> Any:
    torch.manual_seed(1)
    config = PrefixPlusConfig.servable(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights=False, **fields)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    output: torch.Tensor = model(input_ids=TOKENS).logits
    return output


def logits_of_peft_alone(code: str, folder: Path, **environment: str) -> torch.Tensor:
    """Run the lines of a card in a process that does not import this package."""
    program = f"""
import sys, torch
{code}
assert not any(name.startswith("peft_prefix_plus") for name in sys.modules)
with torch.no_grad():
    torch.save(model.eval()(input_ids=torch.arange(3, 13).reshape(2, 5)).logits, {str(folder / "logits.pt")!r})
"""
    run = [sys.executable, "-c", program]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    process = subprocess.run(
        run, capture_output=True, text=True, timeout=300, env={**kept, **environment}, check=False
    )
    assert process.returncode == 0, process.stderr
    result: torch.Tensor = torch.load(folder / "logits.pt")
    return result


def test_peft_alone_loads_the_folder_with_the_same_output(base: Path, tmp_path: Path) -> None:
    model = adapted(base, reparameterization="mlp", encoder_dim=8)
    model.save_pretrained(tmp_path / "saved", include_prefix_tuning=True)
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(base)!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(tmp_path / 'saved')!r}, subfolder='prefix_tuning')"
    )
    torch.testing.assert_close(logits_of_peft_alone(code, tmp_path), logits(model), rtol=0, atol=1e-5)  # rounding
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-3
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved").eval()
    assert torch.equal(logits(again), logits(model))


def test_named_adapters_have_folders_of_their_own_and_the_card_loads_them(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    model.add_adapter("poems", PrefixPlusConfig.servable(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "saved", include_prefix_tuning=True)
    folders = {path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()}
    assert folders == {"poems", "prefix_tuning", "poems_prefix_tuning"}
    lines = re.findall(r"```python\n(.*?)```", (tmp_path / "saved/README.md").read_text(), re.DOTALL)[-1]
    assert "peft_prefix_plus" not in lines
    for line in (
        'base_model, "saved", subfolder="prefix_tuning")',
        '"saved", adapter_name="poems", subfolder="poems_prefix_tuning")',
    ):
        assert line in lines


UNSERVABLE: dict[str, tuple[dict[str, Any], str]] = {
    "position-free": ({"decoupled": False}, "which is position-free, cannot be expressed"),
    "decoupled": ({}, "decoupled=True cannot be expressed"),
    "some layers": (
        {"decoupled": False, "position_free": False, "layers_to_transform": [0]},
        "A choice of layers cannot",
    ),
}


@pytest.mark.parametrize("form", UNSERVABLE)
def test_what_cannot_be_expressed_is_refused_before_anything_is_written(base: Path, tmp_path: Path, form: str) -> None:
    fields, message = UNSERVABLE[form]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PrefixPlusConfig(task_type="CAUSAL_LM", **fields)
    )
    with pytest.raises(ValueError, match=f"`include_prefix_tuning` is True for the adapter 'default'.*{message}"):
        model.save_pretrained(tmp_path / "saved", include_prefix_tuning=True)
    assert not (tmp_path / "saved").exists()


def test_an_adapter_of_the_folders_name_is_refused(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    model.add_adapter("prefix_tuning", PrefixPlusConfig.servable(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="The adapter 'prefix_tuning' is saved in the folder of that name"):
        model.save_pretrained(tmp_path / "saved", include_prefix_tuning=True)
    assert not (tmp_path / "saved").exists()


def test_a_save_that_fails_leaves_both_forms_of_the_adapter_as_they_were(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base)
    model.save_pretrained(tmp_path, include_prefix_tuning=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("peft_prefix_plus.saving.prefix_tuning_folder.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path, include_prefix_tuning=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_later_save_brings_the_folder_up_to_date_or_removes_it(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    model.save_pretrained(tmp_path, include_prefix_tuning=True)
    first = load_file(tmp_path / "prefix_tuning/adapter_model.safetensors")["prompt_embeddings"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    model.save_pretrained(tmp_path, include_prefix_tuning=True)
    second = load_file(tmp_path / "prefix_tuning/adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(second, first / 2)
    with pytest.warns(UserWarning, match="held the adapter that was saved there before, and is removed"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "prefix_tuning").exists()
    assert 'subfolder="prefix_tuning"' not in (tmp_path / "README.md").read_text()


def test_a_folder_of_that_name_that_is_the_users_own_is_left_alone(base: Path, tmp_path: Path) -> None:
    own = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), own).save_pretrained(tmp_path / "prefix_tuning")
    (tmp_path / "prefix_tuning/README.md").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "prefix_tuning").iterdir()}
    model = adapted(base)
    model.save_pretrained(tmp_path)
    assert 'subfolder="prefix_tuning"' not in (tmp_path / "README.md").read_text()
    saved = (tmp_path / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.prefix_plus.prefix_plus_encoder["default"].value.add_(1.0)
    with pytest.raises(
        ValueError, match="prefix_tuning has an adapter that `include_prefix_tuning` did not put there"
    ):
        model.save_pretrained(tmp_path, include_prefix_tuning=True)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == saved
    assert {path.name: path.read_bytes() for path in (tmp_path / "prefix_tuning").iterdir()} == before


def test_a_file_that_a_user_has_put_in_the_folder_stays(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    model.save_pretrained(tmp_path, include_prefix_tuning=True)
    (tmp_path / "prefix_tuning/notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="is removed"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "prefix_tuning").iterdir()] == ["notes.txt"]


def test_all_adapters_of_a_directory_are_loaded_once_each(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    model.add_adapter("poems", PrefixPlusConfig.servable(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(tmp_path, include_prefix_tuning=True)
    loaded = load_adapters(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    assert sorted(loaded) == ["default", "poems"]
    assert torch.equal(logits(loaded["default"].eval()), logits(model))


PUSH = """
import sys
from peft import get_peft_model
from transformers import AutoModelForCausalLM
import torch
from peft_prefix_plus import PrefixPlusConfig

AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("user/base")
torch.manual_seed(1)
fields = dict(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights=False)
model = get_peft_model(AutoModelForCausalLM.from_pretrained("user/base"), PrefixPlusConfig.servable(**fields)).eval()
model.push_to_hub("user/prefix", include_prefix_tuning=True, commit_message="Both")
model.push_to_hub("user/plain")
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 13).reshape(2, 5)).logits, sys.argv[2])
other = get_peft_model(AutoModelForCausalLM.from_pretrained("user/base"), PrefixPlusConfig(**fields))
try:
    other.push_to_hub("user/refused", include_prefix_tuning=True)
except ValueError as error:
    print(error)
"""


def test_a_push_has_the_folder_and_the_lines_on_its_card_load_it_by_peft_alone(base: Path, tmp_path: Path) -> None:
    with running_hub({"token-of-user": "user"}) as hub:
        environment = {**hub.environment(tmp_path / "author"), "HF_TOKEN": "token-of-user"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        package = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        process = subprocess.run(
            [sys.executable, "-c", PUSH, str(base), str(tmp_path / "pushed.pt")],
            env={**kept, **environment, "PYTHONPATH": package},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        repository = hub.repositories["user/prefix"].commit_of()
        saved = {"adapter_config.json", "adapter_model.safetensors"}
        assert repository.title == "Both"
        assert set(repository.files) == {
            ".gitattributes",
            "README.md",
            *saved,
            *(f"prefix_tuning/{name}" for name in saved),
        }
        config = json.loads(repository.files["prefix_tuning/adapter_config.json"].content)
        assert (config["peft_type"], config["base_model_name_or_path"]) == ("PREFIX_TUNING", "user/base")
        assert not any(path.startswith("prefix_tuning") for path in hub.repositories["user/plain"].commit_of().files)
        assert "decoupled=True cannot be expressed" in process.stdout and "user/refused" not in hub.repositories

        lines = re.findall(r"```python\n(.*?)```", repository.files["README.md"].content.decode(), re.DOTALL)[-1]
        assert 'PeftModel.from_pretrained(base_model, "user/prefix", subfolder="prefix_tuning")' in lines
        found = logits_of_peft_alone(lines, tmp_path, **{**environment, **hub.environment(tmp_path / "reader")})
        torch.testing.assert_close(found, torch.load(tmp_path / "pushed.pt"), rtol=0, atol=1e-5)
