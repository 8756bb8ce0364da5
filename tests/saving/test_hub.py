"""An adapter's way over the Hub, as two users walk it: one pushes, another one loads, each in a process of their own."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import File, HubServer, Repository, running_hub
from huggingface_hub import ModelCard


PACKAGE = Path(__file__).parents[2]

PRELUDE = """
import json, re, sys
from pathlib import Path
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from peft_prefix_plus import PrefixPlusConfig, load_adapters

torch.manual_seed(0)
kept, facts = {}, {}

def keep_logits(name, model):
    tokens = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        kept[name] = model.eval()(input_ids=tokens, use_cache=False).logits

def keep_error(name, function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except Exception as error:
        facts[name] = f"{type(error).__name__}: {error}"
    else:
        facts[name] = "no error"

def base():
    return AutoModelForCausalLM.from_pretrained("user/base")
"""

POSTLUDE = """
torch.save(kept, sys.argv[1])
Path(sys.argv[1]).with_suffix(".json").write_text(json.dumps(facts))
"""

PUSH = """
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).push_to_hub("user/base")
keep_logits("base", base())

config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights=False)
model = get_peft_model(base(), config)
keep_logits("first", model)
facts["first"] = model.push_to_hub("user/name").oid
HfApi().create_tag("user/name", tag="v1")
HfApi().create_branch("user/name", branch="old")

card = ModelCard.load("user/name")
card.text += "\\n## Results\\n\\nGood ones.\\n"
card.push_to_hub("user/name")

with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_()
keep_logits("second", model)
facts["second"] = model.push_to_hub("user/name", tags=["my-tag"]).oid
arguments = TrainingArguments(sys.argv[1] + "-trainer", hub_model_id="user/trained", report_to=[], use_cpu=True)
Trainer(model, arguments).push_to_hub()
model.push_to_hub("user/private", private=True)
model.push_to_hub("user/name", revision="copy")

shared = {"reparameterization": "mlp", "sharing": "all", "encoder_dim": 8, "init_weights": False}
model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **shared))
model.set_adapter("other")
keep_logits("other", model)
model.push_to_hub("user/both")
config.push_to_hub("user/config")

both = base()
lora = get_peft_model(both, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False), adapter_name="style")
both = get_peft_model(both, PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights=False), "mine")
keep_logits("lora and prefix", both)
facts["lora and prefix"] = both.push_to_hub("user/lora-and-prefix").oid

keep_error("no token", model.push_to_hub, "user/name", token=False)
keep_error("wrong token", model.push_to_hub, "user/name", token="wrong")
keep_error("not the owner", model.push_to_hub, "somebody/name")
"""

LOAD = """
keep_logits("by id", PeftModel.from_pretrained(base(), "user/name"))
for name, model in load_adapters(base(), "user/lora-and-prefix", revision="main").items():
    keep_logits(f"load_adapters {name}", model)
keep_logits("auto", AutoPeftModelForCausalLM.from_pretrained("user/name"))
for revision in (json.loads(sys.argv[2])["first"], "v1", "old", "copy"):
    name = revision if len(revision) < 40 else "commit"
    keep_logits(name, PeftModel.from_pretrained(base(), "user/name", revision=revision))
keep_logits("trained", PeftModel.from_pretrained(base(), "user/trained"))
keep_logits("subfolder", PeftModel.from_pretrained(base(), "user/both", subfolder="other"))

model = PeftModel.from_pretrained(base(), "user/name", revision="v1")
model.load_adapter("user/name", "second")
keep_logits("before set_adapter", model)
model.set_adapter("second")
keep_logits("load_adapter", model)

config = PeftConfig.from_pretrained("user/config")
facts["config"] = [type(config).__name__, config.num_virtual_tokens, config.base_model_name_or_path]
facts["other config"] = PeftConfig.from_pretrained("user/both", subfolder="other").reparameterization

for repository, variable in (("user/name", "card"), ("user/both", "card of both")):
    text = Path(hf_hub_download(repository, "README.md")).read_text(encoding="utf-8")
    for number, code in enumerate(re.findall(r"```python\\n(.*?)```", text, re.DOTALL)):
        namespace = {}
        exec(code, namespace)
        keep_logits(f"{variable} {number}", namespace["model"])
        facts[f"{variable} {number}"] = sorted(namespace["model"].peft_config)

load = PeftModel.from_pretrained
keep_error("unknown repository", load, base(), "user/nothing")
keep_error("unknown revision", load, base(), "user/name", revision="v9")
keep_error("unknown subfolder", load, base(), "user/name", subfolder="nothing")
keep_error("private", load, base(), "user/private")
keep_error("no weights", load, base(), "user/config")
keep_error("pickle", load, base(), "user/pickle")
model = load(base(), "user/name", revision="v1")
keep_error("broken configuration", model.load_adapter, "user/broken", "default")
keep_logits("after a broken configuration", model)
model.load_adapter("user/weights", "default")
keep_logits("weights alone", model)
keep_logits("private with token", load(base(), "user/private", token="token-of-user"))
"""

LOAD_OFFLINE = """
keep_logits("by id", PeftModel.from_pretrained(base(), "user/name"))
keep_logits("v1", PeftModel.from_pretrained(base(), "user/name", revision="v1"))
keep_logits("auto", AutoPeftModelForCausalLM.from_pretrained("user/name"))
keep_error("not in the cache", PeftModel.from_pretrained, base(), "user/nothing")
"""

LOAD_WITHOUT_IMPORT = """
from peft import PeftConfig
PeftConfig.from_pretrained("user/name")
"""


class Program:
    """What a finished program kept: logits by name, and facts by name."""

    def __init__(self, results: Path) -> None:
        self.logits: dict[str, torch.Tensor] = torch.load(results)
        self.facts: dict[str, Any] = json.loads(results.with_suffix(".json").read_text())


def start(program: str, hub: HubServer, home: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start a user's program: only its environment says where the Hub is."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        **hub.environment(home),
        "PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")]),
        **variables,
    }
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(program: str, hub: HubServer, home: Path, *arguments: str, **variables: str) -> Program:
    results = home / f"results-{len(list(home.glob('results-*.pt')))}.pt"
    home.mkdir(exist_ok=True)
    process = start(PRELUDE + program + POSTLUDE, hub, home, str(results), *arguments, **variables)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    return Program(results)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running_hub({"token-of-user": "user"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return run(PUSH, hub, tmp_path_factory.mktemp("hub") / "author", HF_TOKEN="token-of-user")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the user who loads, with the cache."""
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def loaded(hub: HubServer, pushed: Program, reader: Path) -> Program:
    weights = pickled(CreatesDirectory(reader / "executed"))
    configuration = hub.repositories["user/name"].file("adapter_config.json", "main")
    hub.repositories["user/pickle"] = Repository(is_private=False)
    files = {"adapter_config.json": configuration, "adapter_model.bin": File(weights, is_lfs=True)}
    hub.objects[files["adapter_model.bin"].sha256] = weights
    hub.repositories["user/pickle"].add_commit("main", "Upload", files)
    learned = {"adapter_model.safetensors": hub.repositories["user/name"].file("adapter_model.safetensors", "main")}
    for name, other in (("user/weights", {}), ("user/broken", {"adapter_config.json": File(b"[]", is_lfs=False)})):
        hub.repositories[name] = Repository(is_private=False)
        hub.repositories[name].add_commit("main", "Upload", {**learned, **other})
    return run(LOAD, hub, reader, json.dumps(pushed.facts))


class CreatesDirectory:
    """Unpickled without care, this creates a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": value}, buffer)
    return buffer.getvalue()


def test_the_adapters_of_these_tests_differ_from_the_base_model_and_from_each_other(pushed):
    logits = [pushed.logits[name] for name in ("base", "first", "second", "other")]
    assert all(not torch.allclose(one, two) for number, one in enumerate(logits) for two in logits[:number])


def test_a_pushed_adapter_loads_by_its_repository_id_with_the_same_logits(pushed, loaded):
    assert torch.equal(loaded.logits["by id"], pushed.logits["second"])


def test_an_auto_class_loads_the_adapter_and_its_base_model_from_the_hub(pushed, loaded):
    assert torch.equal(loaded.logits["auto"], pushed.logits["second"])


@pytest.mark.parametrize("revision", ["commit", "v1", "old"])
def test_a_revision_gives_the_adapter_as_it_was_pushed_then(revision, pushed, loaded):
    assert torch.equal(loaded.logits[revision], pushed.logits["first"])


def test_an_adapter_can_be_pushed_to_a_new_branch(hub, pushed, loaded):
    assert torch.equal(loaded.logits["copy"], pushed.logits["second"])
    assert "copy" in hub.repositories["user/name"].branches


def test_every_push_is_one_commit(hub, pushed):
    second, of_card, first, initial = hub.repositories["user/name"].commit_of().history()
    assert (first.oid, second.oid) == (pushed.facts["first"], pushed.facts["second"])
    assert first.title == second.title == "Upload model" != of_card.title
    assert set(initial.files) == {".gitattributes"}


def test_a_named_adapter_is_pushed_to_and_loaded_from_a_subfolder(hub, pushed, loaded):
    files = set(hub.repositories["user/both"].commit_of().files)
    saved = {"adapter_config.json", "adapter_model.safetensors"}
    assert files == {".gitattributes", "README.md", *saved, *(f"other/{name}" for name in saved)}
    assert torch.equal(loaded.logits["subfolder"], pushed.logits["other"])
    assert loaded.facts["other config"] == "mlp"


def test_a_second_adapter_is_loaded_from_the_hub_beside_the_first(pushed, loaded):
    assert torch.equal(loaded.logits["before set_adapter"], pushed.logits["first"])
    assert torch.equal(loaded.logits["load_adapter"], pushed.logits["second"])


def test_lora_and_a_prefix_are_pushed_as_one_commit_and_loaded_by_one_call(hub, pushed, loaded):
    assert hub.repositories["user/lora-and-prefix"].commit_of().oid == pushed.facts["lora and prefix"]
    for name in ("style", "mine"):
        assert torch.equal(loaded.logits[f"load_adapters {name}"], pushed.logits["lora and prefix"])


def test_a_configuration_is_pushed_and_loaded_by_itself(hub, pushed, loaded):
    assert set(hub.repositories["user/config"].commit_of().files) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
    }
    assert loaded.facts["config"] == ["PrefixPlusConfig", 4, "user/base"]


def test_weights_are_stored_as_large_files_of_the_same_bytes_in_every_push(hub, pushed):
    def weights(repo_id: str) -> File:
        return hub.repositories[repo_id].file("adapter_model.safetensors", "main")

    assert weights("user/name").is_lfs
    assert weights("user/name").content == weights("user/both").content == weights("user/private").content


def test_the_card_on_the_hub_names_the_library_the_base_model_and_the_tags(hub, pushed):
    data = ModelCard(hub.repositories["user/name"].read("README.md").decode()).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "user/base", "text-generation")
    assert {"prefix-plus", "prefix-tuning", "my-tag", "base_model:adapter:user/base"} <= set(data.tags)


def test_the_card_on_the_hub_says_once_what_to_install_and_import(hub, pushed):
    for repo_id in ("user/name", "user/both", "user/private", "user/config"):
        text = hub.repositories[repo_id].read("README.md").decode()
        assert text.count("pip install peft-prefix-plus") == 1, repo_id
        assert "import peft_prefix_plus" in text and f'"{repo_id}"' in text and "tmp" not in text
        assert ModelCard(text).data.library_name == "peft"


def test_what_the_author_wrote_into_the_card_on_the_hub_is_kept_by_the_next_push(hub, pushed):
    assert "## Results\n\nGood ones." in hub.repositories["user/name"].read("README.md").decode()


def test_a_trainer_pushes_the_adapter_with_the_same_card(hub, pushed, loaded):
    text = hub.repositories["user/trained"].read("README.md").decode()
    assert text.count("pip install peft-prefix-plus") == 1 and "### Training hyperparameters" in text
    assert torch.equal(loaded.logits["trained"], pushed.logits["second"])


@pytest.mark.parametrize("number", [0, 1])
def test_the_lines_on_the_card_load_the_adapter(number, pushed, loaded):
    assert torch.equal(loaded.logits[f"card {number}"], pushed.logits["second"])


def test_the_lines_on_the_card_load_every_adapter_of_the_repository(pushed, loaded):
    assert loaded.facts["card of both 0"] == ["default", "other"]
    assert torch.equal(loaded.logits["card of both 0"], pushed.logits["second"])


def test_without_the_import_peft_does_not_know_the_method(hub, pushed, tmp_path):
    process = start(LOAD_WITHOUT_IMPORT, hub, tmp_path)
    assert "KeyError: 'PREFIX_PLUS'" in process.communicate(timeout=120)[1]


def test_what_was_loaded_once_loads_offline_from_the_cache(hub, pushed, loaded, reader):
    requests = len(hub.requests)
    offline = run(LOAD_OFFLINE, hub, reader, HF_HUB_OFFLINE="1")
    for name in ("by id", "v1", "auto"):
        assert torch.equal(offline.logits[name], loaded.logits[name])
    assert "user/nothing" in offline.facts["not in the cache"]
    assert len(hub.requests) == requests


def test_nobody_pushes_without_the_right_token(hub, pushed):
    assert "401" in pushed.facts["no token"]
    assert "401" in pushed.facts["wrong token"]
    assert "403" in pushed.facts["not the owner"]
    assert "somebody/name" not in hub.repositories


def test_a_private_adapter_loads_with_the_owners_token_only(pushed, loaded):
    assert torch.equal(loaded.logits["private with token"], pushed.logits["second"])
    assert "user/private" in loaded.facts["private"] and loaded.facts["private"].startswith("ValueError")


@pytest.mark.parametrize("missing", ["unknown repository", "unknown revision", "unknown subfolder"])
def test_what_is_not_on_the_hub_is_an_error_that_names_the_file_and_the_repository(missing, loaded):
    repository = "user/nothing" if missing == "unknown repository" else "user/name"
    assert f"Can't find 'adapter_config.json' at '{repository}'" in loaded.facts[missing]


def test_a_repository_without_weights_is_an_error(loaded):
    assert loaded.facts["no weights"].startswith("ValueError: Can't find weights")


def test_weights_of_a_broken_configuration_are_not_loaded_onto_an_adapter(pushed, loaded):
    assert "user/broken/adapter_config.json cannot be read" in loaded.facts["broken configuration"]
    assert torch.equal(loaded.logits["after a broken configuration"], pushed.logits["first"])


def test_weights_alone_are_loaded_onto_an_adapter(pushed, loaded):
    assert torch.equal(loaded.logits["weights alone"], pushed.logits["second"])


LOAD_CONFIG = """
for name, subfolder in (("user/name", None), ("user/both", "other"), ("user/torn", None), ("user/pickled", None)):
    keep_error(f"{name} {subfolder}", PrefixPlusConfig.from_pretrained, name, subfolder=subfolder)
"""


def test_a_configuration_is_checked_against_the_header_of_the_weights_without_loading_them(hub, pushed, tmp_path):
    saved, other = (hub.repositories[name].commit_of().files for name in ("user/name", "user/both"))
    hub.repositories["user/torn"] = Repository(is_private=False)
    files = {"adapter_config.json": saved["adapter_config.json"]}
    torn = {**files, "adapter_model.safetensors": other["other/adapter_model.safetensors"]}
    hub.repositories["user/torn"].add_commit("main", "Upload", torn)
    pickle = File(pickled(torch.zeros(2)), is_lfs=True)
    hub.objects[pickle.sha256] = pickle.content
    hub.repositories["user/pickled"] = Repository(is_private=False)
    hub.repositories["user/pickled"].add_commit("main", "Upload", {**files, "adapter_model.bin": pickle})

    before = len(hub.requests)
    found = run(LOAD_CONFIG, hub, tmp_path / "home").facts
    assert found["user/name None"] == found["user/both other"] == "no error"
    assert "user/torn/adapter_model.safetensors does not fit its configuration" in found["user/torn None"]
    assert "has no tensor for prefix_plus_encoder.key" in found["user/pickled None"]  # which has no header
    weights = [
        each for each in hub.requests[before:] if each.method == "GET" and "adapter_model.safetensors" in each.path
    ]
    assert weights and all(each.headers.get("Range") == "bytes=0-100000" for each in weights)
    assert list((tmp_path / "home/hub").glob("*/snapshots/*/**/adapter_model.safetensors")) == []


def test_code_in_a_pickled_adapter_is_not_executed(loaded, reader, tmp_path):
    torch.load(io.BytesIO(pickled(CreatesDirectory(tmp_path / "executed"))), weights_only=False)
    assert (tmp_path / "executed").exists(), "a careless reader is harmed by such a file"
    assert "UnpicklingError" in loaded.facts["pickle"] and "mkdir" in loaded.facts["pickle"]
    assert not (reader / "executed").exists()
