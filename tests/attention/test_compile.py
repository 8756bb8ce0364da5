"""torch.compile and torch.export of adapted models, in one graph wherever the base model is one."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from models import INLINE_MODELS, adapter_parameters, loss_of, main_output, output_of, prefixed, tiny_model, token_ids
from transformers import T5EncoderModel


COMPILED = {"GPT-2": lambda: tiny_model("gpt2"), **INLINE_MODELS}
"""GPT-2 asks for the name of its attention implementation; the others write their attention out."""


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("gating", [False, True])
def test_a_model_compiles_into_one_graph(name, gating):
    torch.compiler.reset()
    model = prefixed(COMPILED[name]().eval(), gating=gating)
    gradients = []
    for each in (model, torch.compile(model, fullgraph=True, backend="eager")):
        model.zero_grad()
        loss_of(each, input_ids=token_ids()).backward()  # transformers' own loss of GPT-2 breaks the graph
        gradients.append({key: parameter.grad.clone() for key, parameter in adapter_parameters(model).items()})

    for key, expected in gradients[0].items():
        assert expected.abs().max() > 0
        # the backward's sums over the heads and rows are in another order
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-5, atol=1e-6)


COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler")
@pytest.mark.timeout(1800)  # which takes half a minute here, and many times that on a machine with other work
def test_inductor_trains_and_predicts_what_the_plain_model_does(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # so that it compiles, and leaves nothing behind
    torch.compiler.reset()
    model = prefixed(tiny_model(num_hidden_layers=1), task_type="CAUSAL_LM")
    compiled = torch.compile(model, fullgraph=True)
    results = []
    for each in (model, compiled):
        model.zero_grad()
        loss = loss_of(each, input_ids=token_ids(), labels=token_ids())
        loss.backward()
        results.append({key: parameter.grad.clone() for key, parameter in adapter_parameters(model).items()})
        results[-1]["loss"] = loss.detach()

    for key, expected in results[0].items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(results[1][key], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(
        output_of(compiled, input_ids=token_ids()), output_of(model, input_ids=token_ids()), rtol=1e-4, atol=1e-4
    )
    assert list(tmp_path.rglob("*.so"))


def t5_encoder():
    return T5EncoderModel._from_config(tiny_model("t5", "SEQ_2_SEQ_LM").config, attn_implementation="sdpa").eval()


EXPORTED = {
    "Llama": lambda: tiny_model("llama"),
    "GPT-2": lambda: tiny_model("gpt2"),
    "BERT classifier": lambda: tiny_model("bert", "SEQ_CLS"),
    "T5 encoder": t5_encoder,
}


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_a_model_is_exported_for_batches_and_texts_of_any_size(name, strict):
    model = prefixed(EXPORTED[name]())
    options = {"use_cache": False} if name in ("Llama", "GPT-2") else {}
    inputs = {"input_ids": token_ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    free = dict.fromkeys(range(2), torch.export.Dim.AUTO)

    with torch.no_grad():
        # the base model, with the prefix in it: a PeftModel's own forward names no arguments to give sizes to
        program = torch.export.export(
            model.get_base_model(),
            (),
            {**inputs, **options},
            dynamic_shapes={**dict.fromkeys(inputs, free), **dict.fromkeys(options)},
            strict=strict,
        )

    other = {"input_ids": token_ids(3, 9, seed=2), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    other["attention_mask"][0, :2] = 0
    expected = output_of(model, **other)
    torch.testing.assert_close(main_output(program.module()(**other, **options)), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert (output_of(model, **other) - expected).abs().max() > 1e-3


def test_a_peft_model_is_exported():
    model = prefixed(tiny_model(), task_type="CAUSAL_LM")
    inputs = {"input_ids": token_ids(), "use_cache": False}

    with torch.no_grad():
        program = torch.export.export(model, (), inputs)

    # not equal: it concatenates, and torch's private kernels stay out of it
    torch.testing.assert_close(
        main_output(program.module()(**inputs)), output_of(model, **inputs), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("fields", [{}, {"position_free": False}], ids=str)
def test_an_exported_program_has_no_kernel_of_the_device_it_was_made_on(fields):
    model = prefixed(tiny_model(), **fields).eval()
    inputs = {"input_ids": token_ids(), "use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits
        program = torch.export.export(model, (), inputs)

    operations = {str(node.target) for node in program.graph.nodes}
    assert not any("flash" in name or "efficient" in name for name in operations)
    torch.testing.assert_close(program.module()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"position_free": False}, {"gating": True}, {"decoupled": True}], ids=str)
def test_a_model_exported_to_onnx_runs_elsewhere(fields, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    model, tokens = Logits(prefixed(tiny_model(), **fields)).eval(), token_ids()
    with torch.no_grad():
        expected = model(tokens)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (tokens,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})

    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
