"""Models whose weights accelerate keeps elsewhere, or whose weights are tied: adapted before and after."""

from __future__ import annotations

import accelerate
import pytest
import torch
from models import adapter_parameters, loss_of, output_of, prefix_config, prefixed, task_inputs, tiny_model
from peft import PeftModel, get_peft_model


INPUTS = task_inputs("CAUSAL_LM")
FIELDS = [{}, {"reparameterization": "mlp", "sharing": "all"}, {"gating": True}]
EACH_PREFIX = pytest.mark.parametrize("fields", FIELDS, ids=["direct", "mlp", "gated"])


def placed(model, where, folder):
    """A model as `device_map` places it, where nothing but the CPU computes."""
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if where == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    device_map = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "prefix_plus"], "cpu"
    )
    device_map.update({f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)})
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


EACH_PLACE = pytest.mark.parametrize("where", ["cpu", "disk", "device map"])


def seeded(model, **fields):
    torch.manual_seed(1)
    return prefixed(model, task_type="CAUSAL_LM", **fields)


def step_of(model):
    loss = loss_of(model, **INPUTS)
    loss.backward()
    torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1).step()
    return loss.detach(), output_of(model, **INPUTS)


@EACH_PLACE
@EACH_PREFIX
def test_an_offloaded_model_trains_saves_and_loads(where, fields, tmp_path):
    expected = step_of(seeded(tiny_model(), **fields))
    model = seeded(placed(tiny_model(), where, tmp_path / "weights"), **fields)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in adapter_parameters(model).values())

    found = step_of(model)

    for tensor, reference in zip(found, expected, strict=True):
        assert torch.equal(tensor, reference)
    model.save_pretrained(tmp_path / "adapter")
    for base in (tiny_model(), placed(tiny_model(), where, tmp_path / "again")):
        assert torch.equal(output_of(PeftModel.from_pretrained(base, tmp_path / "adapter"), **INPUTS), expected[1])
    options = {"input_ids": INPUTS["input_ids"], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**options), model.generate(use_cache=False, **options))
    assert torch.equal(output_of(model.unload(), **INPUTS), output_of(tiny_model(), **INPUTS))


@EACH_PLACE
@EACH_PREFIX
def test_an_adapted_model_is_offloaded(where, fields, tmp_path):
    model = seeded(tiny_model(), **fields)
    expected = output_of(model, **INPUTS)

    placed(model.get_base_model(), where, tmp_path / "weights")

    assert torch.equal(output_of(model, **INPUTS), expected)
    with model.disable_adapter():
        assert torch.equal(output_of(model, **INPUTS), output_of(tiny_model(), **INPUTS))


@EACH_PREFIX
def test_an_adapter_is_loaded_into_a_model_that_its_device_map_says_where_to_keep(fields, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = seeded(tiny_model(), **fields)
    source.save_pretrained("adapter")
    tiny_model().save_pretrained("base")

    base = type(tiny_model()).from_pretrained(
        "base", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder="weights"
    )
    model = PeftModel.from_pretrained(
        base,
        "adapter",
        is_trainable=True,
        # the default, "auto", fails where the CPU is the only device, whatever the PEFT method
        device_map={
            "base_model.model.model": "cpu",
            "base_model.model.lm_head": "disk",
            "base_model.model.prefix_plus": "cpu",  # what the layers share
        },
        offload_dir="weights",
    )

    assert torch.equal(output_of(model, **INPUTS), output_of(source, **INPUTS))
    loss_of(model, **INPUTS).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter_parameters(model).values())


# ------------------------------------------------------------------------------------------------ tied weights


@EACH_PREFIX
@pytest.mark.parametrize(("architecture", "task_type"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_tied_weights_stay_tied(architecture, task_type, fields, tmp_path):
    inputs = task_inputs(task_type)
    base = tiny_model(architecture, task_type, tie_word_embeddings=True)
    tied = base.get_input_embeddings().weight
    assert base.get_output_embeddings().weight is tied
    torch.manual_seed(1)

    model = prefixed(base, task_type=task_type, **fields)
    loss_of(model, **inputs).backward()

    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight is tied
    assert tied.grad is None
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(architecture, task_type, tie_word_embeddings=True), tmp_path)
    assert torch.equal(output_of(loaded, **inputs), output_of(model, **inputs))
    unloaded = model.unload()
    assert unloaded.get_input_embeddings().weight is unloaded.get_output_embeddings().weight is tied


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head_that_is_trained_leaves_the_embeddings(tmp_path):
    base = tiny_model(tie_word_embeddings=True)
    before = base.get_input_embeddings().weight.clone()
    model = get_peft_model(base, prefix_config(modules_to_save=["lm_head"])).eval()

    step_of(model)

    head = model.base_model.model.lm_head
    assert torch.equal(base.get_input_embeddings().weight, before)
    assert torch.equal(head.original_module.weight, before)
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(tie_word_embeddings=True), tmp_path)
    assert torch.equal(output_of(loaded, **INPUTS), output_of(model, **INPUTS))


@EACH_PLACE
def test_a_tied_model_is_offloaded(where, tmp_path):
    model = seeded(placed(tiny_model(tie_word_embeddings=True), where, tmp_path / "weights"))

    found = step_of(model)

    for tensor, expected in zip(found, step_of(seeded(tiny_model(tie_word_embeddings=True))), strict=True):
        assert torch.equal(tensor, expected)
