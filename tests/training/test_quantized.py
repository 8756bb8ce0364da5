"""Prefixes over quantized models, as far as the packages that quantize are installed and run on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from models import adapter_parameters, cached_prefix, loss_of, output_of, prefixed, task_inputs, tiny_model
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaForCausalLM, QuantoConfig, TorchAoConfig


INPUTS = task_inputs("CAUSAL_LM")
FIELDS = [{}, {"reparameterization": "mlp", "sharing": "all"}]
EACH_PREFIX = pytest.mark.parametrize("fields", FIELDS, ids=["direct", "mlp"])
DTYPES = [torch.float32, torch.bfloat16]


def bitsandbytes(**options: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


def torchao_int8() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def torchao_int4() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity").PerGroup(32)
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity))


def quanto() -> QuantoConfig:
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8")


METHODS = {
    "bitsandbytes 8-bit": partial(bitsandbytes, load_in_8bit=True),
    "bitsandbytes 4-bit": partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "quanto int8": quanto,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model whose widths every method can divide into groups."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return folder


@pytest.fixture(params=METHODS)
def quantized(request, checkpoint):
    """Called with a dtype: a model of quantized weights, whose other tensors have that dtype."""
    configuration = METHODS[request.param]()  # skips here, without the package
    return lambda dtype=torch.float32: LlamaForCausalLM.from_pretrained(
        checkpoint, quantization_config=configuration, dtype=dtype, device_map="cpu"
    ).eval()


def values_of(model):
    """The numbers in a model, those of quantized tensors written out."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    is_plain = {name: type(tensor) in (torch.Tensor, torch.nn.Parameter) for name, tensor in tensors.items()}
    return {name: (tensor if is_plain[name] else tensor.dequantize()).clone() for name, tensor in tensors.items()}


def gradients_of(model):
    model.zero_grad()
    loss_of(model, **INPUTS).backward()
    return {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_keys_and_values_in_the_quantized_models_cache(quantized, dtype):
    # parameters that are the keys and values themselves, at fixed positions as in a cache
    model, plain = prefixed(quantized(dtype), prefix_scaling=1.0, position_free=False), quantized(dtype)
    parameters = adapter_parameters(model)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}

    loss = plain(**INPUTS, **cached_prefix(plain, leaves, *INPUTS["input_ids"].shape)).loss
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    # activations are rounded to int8 in bitsandbytes, and to bfloat16 (2 to the -8) here and there
    tolerance = 0.1
    for name, gradient in gradients_of(model).items():
        assert expected[name].abs().max() > 0
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference < tolerance, (name, difference)


@EACH_PREFIX
def test_a_step_trains_the_prefix_alone(quantized, fields):
    model = prefixed(quantized(), **fields)
    before = values_of(model)

    gradients = gradients_of(model)
    torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1).step()

    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    after = values_of(model)
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == set(adapter_parameters(model))


@EACH_PREFIX
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_adapter_gives_the_same_and_generates(quantized, fields, dtype, tmp_path):
    model = prefixed(quantized(dtype), task_type="CAUSAL_LM", **fields)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(quantized(dtype), tmp_path)

    expected = output_of(model, **INPUTS)
    assert torch.equal(output_of(loaded, **INPUTS), expected)
    with loaded.disable_adapter():
        assert not torch.equal(output_of(loaded, **INPUTS), expected)
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = loaded.generate(input_ids=INPUTS["input_ids"], **options)
    assert torch.equal(tokens, model.generate(input_ids=INPUTS["input_ids"], **options))
    assert torch.equal(tokens[:, 7], expected[:, -1].argmax(dim=-1))
    assert not any("prefix" in name for name in loaded.unload().state_dict())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_prepared_for_training_gives_the_same_gradients(quantized, use_reentrant):
    plain = prepare_model_for_kbit_training(quantized(), use_gradient_checkpointing=False)
    prepared = prepare_model_for_kbit_training(
        quantized(), gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    torch.manual_seed(1)
    expected = gradients_of(prefixed(plain).train())
    torch.manual_seed(1)

    model = prefixed(prepared).train()

    is_checkpointed = getattr(plain, "is_loaded_in_8bit", False) or getattr(plain, "is_loaded_in_4bit", False)
    if is_checkpointed or plain.config.quantization_config.quant_method == "torchao":  # those that PEFT knows
        assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "prefix_plus_scaling" not in name} == set(adapter_parameters(model))
    for name, gradient in gradients_of(model).items():
        # float32, with additions in another order
        assert (gradient - expected[name]).norm() < 1e-4 * expected[name].norm(), name
