"""A tiny model with a tokenizer and adapters for it on disk, what PEFT generates with them, and vLLM's settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hub_server import File, HubServer, Repository
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_prefix_plus import PrefixPlusConfig


ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
"""vLLM's settings for small machines without a network."""

VOCABULARY = 300  # 256 bytes and room: ids that mean nothing are generated too
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
FORMS: list[dict[str, Any]] = [
    {},
    {"reparameterization": "linear", "sharing": "all", "encoder_dim": 8},
    {"reparameterization": "mlp", "sharing": "none", "encoder_dim": 8},
    {"prefix_scaling": 2.0},
    {"decoupled": True, "position_free": True},
    {"gating": True, "position_free": True, "reparameterization": "linear", "encoder_dim": 8},
    {"decoupled": True, "layers_to_transform": [0, 2]},
    {"decoupled": True, "position_free": True, "reparameterization": "mlp", "sharing": "input", "encoder_dim": 8},
    {"gating": True},
]


def save_model(directory: Path, **sizes: Any) -> None:
    """Save a random Llama, with a tokenizer that takes bytes for tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 128,  # the dims of a head are at least 32 in vLLM's kernels for CPUs
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
            **sizes,
        }
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def save_adapter(model_directory: Path, directory: Path, seed: int, **fields: Any) -> None:
    """Save an adapter that acts: random keys and values of the size of the model's own."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_directory)
    fields = {"decoupled": False, "position_free": False, "init_weights": False, "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(base, PrefixPlusConfig(**fields))
    if fields.get("reparameterization") == "log":  # which starts with values of zero
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith((".default.key", ".default.value")):
                    parameter.normal_(std=0.1)
    model.save_pretrained(str(directory))


def save_adapters(model_directory: Path, directory: Path, num_adapters: int) -> dict[str, Path]:
    """Save adapters of all forms and many lengths, and return their folders by name."""
    paths = {}
    for index in range(num_adapters):
        name = f"adapter-{index}"
        paths[name] = directory / name
        lengths = (1, 31, 32, 33, 20, 64, 70)  # those around the size of a block too
        save_adapter(
            model_directory,
            paths[name],
            index + 1,
            num_virtual_tokens=lengths[3 * index % len(lengths)],  # so that most forms have several
            **FORMS[index % len(FORMS)],
        )
    return paths


def push(adapter: Path, hub: HubServer, repo_id: str) -> None:
    """Put an adapter's folder on a Hub, without a client: the tests' own process is offline."""
    repository = hub.repositories[repo_id] = Repository(is_private=False)
    files = {path.name: File(path.read_bytes(), path.suffix == ".safetensors") for path in adapter.iterdir()}
    hub.objects |= {file.sha256: file.content for file in files.values()}
    repository.add_commit("main", "an adapter", files)


class Reference:
    """
    What PEFT generates.

    Args:
        model_directory: The model's folder.
        paths: The adapters' folders by name.
    """

    def __init__(self, model_directory: Path, paths: dict[str, Path]) -> None:
        base = AutoModelForCausalLM.from_pretrained(model_directory).eval()
        names = list(paths)
        self.model = PeftModel.from_pretrained(base, str(paths[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(str(paths[name]), name)

    def generate(self, adapter: str | None, prompt: Sequence[int], num_tokens: int, **more: Any) -> list[int]:
        """Return the tokens that follow a prompt, greedily, with an adapter or the base model."""
        input_ids = torch.tensor([list(prompt)])
        options: dict[str, Any] = {
            "max_new_tokens": num_tokens,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            **more,
        }
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        with torch.no_grad():
            if adapter is None:
                with self.model.disable_adapter():
                    output = self.model.generate(**inputs, **options)
            else:
                self.model.set_adapter(adapter)
                output = self.model.generate(**inputs, **options)
        return list(output[0, input_ids.shape[1] :].tolist())
