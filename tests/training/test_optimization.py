"""The groups of parameters for optimizers: what is in which, their rates, and a training with them."""

from __future__ import annotations

import pytest
import torch
from models import prefixed, tiny_model, token_ids
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from peft_prefix_plus import PrefixPlusConfig, prefix_plus_param_groups


ENCODERS = [("none", "none"), ("linear", "input"), ("mlp", "none"), ("mlp", "projection"), ("mlp", "all")]


def names(model, groups):
    """The names of the parameters in each group."""
    by_parameter = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: {by_parameter[parameter] for parameter in group["params"]} for group in groups}


def trainable(model):
    """The names of the parameters that training changes: the scaling requires a gradient, but that is zero."""
    named = model.named_parameters()
    return {name for name, parameter in named if parameter.requires_grad and "prefix_plus_scaling" not in name}


def rates(groups):
    return {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}


@pytest.mark.parametrize("gating", [False, True])
@pytest.mark.parametrize(("reparameterization", "sharing"), ENCODERS)
def test_every_trainable_parameter_is_in_one_group_by_what_it_is(reparameterization, sharing, gating):
    config = dict(reparameterization=reparameterization, sharing=sharing, gating=gating, modules_to_save=["lm_head"])
    model = prefixed(tiny_model(), **config)
    groups = prefix_plus_param_groups(model, lr=0.1)
    found = names(model, groups)
    assert sum(len(group["params"]) for group in groups) == len(set().union(*found.values())) == len(trainable(model))
    assert set().union(*found.values()) == trainable(model)

    def ending(*ends):
        return {name for name in trainable(model) if "prefix_plus" in name and name.endswith(ends)}

    assert found.pop("gates", set()) == {name for name in trainable(model) if "gate.default" in name}
    assert found.pop("keys", set()) == ending(".key")
    assert found.pop("values", set()) == ending(".value")
    assert found.pop("projection", set()) == ending(".weight", ".key_offset")
    assert found.pop("projection_no_decay", set()) == ending(".bias")
    assert found.pop("other") == {name for name in trainable(model) if "lm_head" in name}
    assert not found


def test_biases_of_whole_modules_and_gates_have_no_weight_decay():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = BertForSequenceClassification(BertConfig(**sizes))
    model = get_peft_model(model, PrefixPlusConfig(task_type="SEQ_CLS", gating=True))
    groups = prefix_plus_param_groups(model, lr=0.1, weight_decay=0.5)
    assert rates(groups) == {
        "keys": (0.1, 0.5),
        "values": (0.1, 0.5),
        "gates": (0.1, 0.0),
        "other": (0.1, 0.5),
        "other_no_decay": (0.1, 0.0),
    }
    assert all("bias" in name for name in names(model, groups)["other_no_decay"])


def test_each_group_has_its_own_rate_or_the_common_one():
    direct = prefixed(tiny_model(), gating=True)
    groups = prefix_plus_param_groups(direct, lr=0.1, key_lr=0.2, value_lr=0, gate_lr=0.4)
    assert rates(groups) == {"keys": (0.2, 0.0), "values": (0, 0.0), "gates": (0.4, 0.0)}
    projected = prefixed(tiny_model(), reparameterization="mlp", modules_to_save=["lm_head"])
    groups = prefix_plus_param_groups(projected, lr=0.1, projection_lr=0.2, weight_decay=0.3)
    assert rates(groups) == {"projection": (0.2, 0.3), "projection_no_decay": (0.2, 0.0), "other": (0.1, 0.3)}


def test_each_group_moves_at_its_own_rate():
    model = prefixed(tiny_model(), gating=True, init_weights=False)
    optimizer = torch.optim.SGD(prefix_plus_param_groups(model, lr=1.0, key_lr=0.5, value_lr=0.0, gate_lr=2.0))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = token_ids(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = next((rate for end, rate in ((".key", 0.5), (".value", 0.0), ("gate.default", 2.0)) if end in name), 0)
        gradient = parameter.grad if name in trainable(model) else torch.zeros_like(parameter)
        assert torch.equal(parameter, before[name] - rate * gradient), name


def test_other_adapters_and_frozen_parameters_are_left_out():
    model = prefixed(tiny_model(), modules_to_save=["lm_head"])
    model.add_adapter("other", PrefixPlusConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    both = names(model, prefix_plus_param_groups(model, lr=0.1))
    one = names(model, prefix_plus_param_groups(model, lr=0.1, adapter_name="other"))
    assert {name for name in both["keys"] if ".other." in name} == one["keys"] < both["keys"]
    assert not any(".default." in name for found in one.values() for name in found)
    assert any(".other." in name and "lm_head" in name for name in one["other"])

    model.requires_grad_(False)
    layer = next(layer for _, layer in model.base_model.prefix_layers())
    layer.prefix_plus_encoder["default"].key.requires_grad_(True)
    (group,) = prefix_plus_param_groups(model, lr=0.1)
    assert group["name"] == "keys" and group["params"] == [layer.prefix_plus_encoder["default"].key]


@pytest.mark.parametrize("argument", ["lr", "key_lr", "value_lr", "gate_lr", "projection_lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_rates_that_are_no_rates_are_refused(argument, value):
    model = prefixed(tiny_model(), gating=True)
    with pytest.raises(ValueError, match=f"`{argument}` must be a finite number.*got {value}"):
        prefix_plus_param_groups(model, **{"lr": 0.1, argument: value})


@pytest.mark.parametrize("argument", ["key_lr", "value_lr"])
@pytest.mark.parametrize("reparameterization", ["linear", "mlp"])
def test_keys_and_values_of_a_projection_have_no_rates_of_their_own(reparameterization, argument):
    model = prefixed(tiny_model(), reparameterization=reparameterization)
    with pytest.raises(ValueError, match=f"`{argument}` is 0.2.*one matrix produces both its keys and its values"):
        prefix_plus_param_groups(model, lr=0.1, **{argument: 0.2})


@pytest.mark.parametrize(("argument", "kind"), [("gate_lr", "gates"), ("projection_lr", "projection")])
def test_a_rate_for_what_is_not_trained_is_refused(argument, kind):
    with pytest.raises(ValueError, match=f"`{argument}` is 0.2, but no {kind} .*only keys, values"):
        prefix_plus_param_groups(prefixed(tiny_model()), lr=0.1, **{argument: 0.2})


def test_nothing_to_train_and_unknown_adapters_are_refused(tmp_path):
    prefixed(tiny_model(), task_type="CAUSAL_LM").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match=r"no trainable parameter\..*is_trainable=True"):
        prefix_plus_param_groups(model, lr=0.1)
    with pytest.raises(ValueError, match="no trainable parameter of adapter 'default'"):
        prefix_plus_param_groups(model, lr=0.1, adapter_name="default")
    with pytest.raises(ValueError, match=r"named 'other'.*\['default'\]"):
        prefix_plus_param_groups(model, lr=0.1, adapter_name="other")


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_the_trainer_trains_with_the_groups_and_resumes(way, tmp_path):
    def trainer(steps):
        torch.manual_seed(0)
        model = prefixed(tiny_model(), task_type="CAUSAL_LM", gating=True, init_weights=False)
        groups = prefix_plus_param_groups(model, lr=0.05, value_lr=0.1, gate_lr=0.0)
        if way == "optimizers":
            chosen = {"optimizers": (torch.optim.AdamW(groups), None)}
        else:
            chosen = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups})}
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=3,
            logging_steps=1,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in token_ids(16, 8)]
        return Trainer(model, arguments, train_dataset=rows, **chosen)

    run = trainer(6)
    gates = [parameter.detach().clone() for name, parameter in run.model.named_parameters() if "gate" in name]
    run.train()
    optimizer = run.optimizer
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "keys": 0.05,
        "values": 0.1,
        "gates": 0.0,
    }
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = [parameter for name, parameter in run.model.named_parameters() if "gate" in name]
    assert all(torch.equal(one, other) for one, other in zip(gates, after, strict=True))

    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
