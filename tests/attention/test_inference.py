"""Inference: what is produced once, and what decoding costs."""

from __future__ import annotations

import copy

import pytest
import torch
from models import joint_config
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from peft_prefix_plus import prefix_key_values


IDS = torch.arange(3, 15).reshape(2, 6)


def adapted(reparameterization="mlp", **kwargs):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    config = joint_config(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        reparameterization=reparameterization,
        encoder_dim=6,
        init_weights=False,
        **kwargs,
    )
    return get_peft_model(model, config).eval()


@pytest.fixture
def productions(monkeypatch):
    """Counts how often an encoder has produced a prefix."""
    from peft_prefix_plus.encoders import ProjectedEncoder

    count = []
    forward = ProjectedEncoder.forward
    monkeypatch.setattr(ProjectedEncoder, "forward", lambda self: count.append(self) or forward(self))
    return count


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("sharing", ["none", "input", "projection", "all"])
def test_generating_produces_each_layers_prefix_once(productions, sharing):
    model = adapted(sharing=sharing)
    model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=10, do_sample=False)
    assert len(productions) == len(set(productions)) == 3
    logits(model)
    assert len(productions) == 6  # what `generate` has produced is gone with it


def change_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)


def change_by_an_optimizer(model):
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()


def change_through_data_after_training(model):
    model(IDS, labels=IDS).loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data -= parameter.grad


def change_by_loading(model):
    state = {name: tensor + 0.5 * name.count("prefix_plus") for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)


def change_by_replacing(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter.detach() + 0.5))


def change_storage(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.5


def change_through_data(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2.0)


def change_through_numpy(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.detach().numpy()[:] += 0.5


CHANGES = [
    change_in_place,
    change_through_data,
    change_through_numpy,
    change_by_an_optimizer,
    change_through_data_after_training,
    change_by_loading,
    change_by_replacing,
    change_storage,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("sharing", ["none", "all"])
def test_a_changed_parameter_is_seen_at_once(change, sharing):
    model = adapted(sharing=sharing)
    before = logits(model)
    assert torch.equal(logits(model), before)
    change(model)
    after = logits(model)
    assert not torch.equal(after, before)
    assert torch.equal(logits(copy.deepcopy(model)), after)  # a copy remembers nothing


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_parameter_is_seen_by_the_next_generation(change):
    model = adapted()
    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0)

    def scores():
        return torch.stack(model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options).logits)

    before = scores()
    assert torch.equal(scores(), before)
    change(model)
    assert not torch.equal(scores()[0], before[0])
    torch.testing.assert_close(scores()[0], logits(model)[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [change_in_place, change_by_loading, change_by_replacing, change_storage])
def test_a_parameter_that_changes_while_a_text_is_generated_is_seen_at_once(change):
    model = adapted()
    other = copy.deepcopy(model)
    change(other)

    def change_at_the_second_token(ids, scores):
        if ids.shape[1] == IDS.shape[1] + 1:
            change(model)
        return scores

    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    found = model.generate(input_ids=IDS, logits_processor=[change_at_the_second_token], **options)
    with torch.no_grad():
        cache = adapted()(IDS, use_cache=True).past_key_values
        for position in (0, 1):
            tokens = found.sequences[:, IDS.shape[1] + position, None]
            stepper = adapted() if position == 0 else other
            expected = stepper(tokens, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(found.logits[1 + position], expected, rtol=0, atol=1e-5)


def test_a_switched_adapter_is_seen_at_once():
    model = adapted()
    first = logits(model)
    model.add_adapter("second", joint_config(num_virtual_tokens=3, init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert len({tensor.sum().item() for tensor in (first, second, both)}) == 3


def test_a_moved_model_is_seen_at_once():
    model = adapted()
    expected = logits(model)
    model.double()
    assert logits(model).dtype == torch.float64
    torch.testing.assert_close(logits(model).float(), expected, rtol=0, atol=1e-5)
    model.float()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first, second", [(1, 2), (2, 1)])
def test_another_batch_size_is_seen_at_once(first, second):
    model = adapted()
    expected = {batch: torch.cat([copy.deepcopy(model)(row[None]).logits for row in IDS[:batch]]) for batch in (1, 2)}
    with torch.no_grad():
        for batch in (first, second):
            torch.testing.assert_close(model(IDS[:batch]).logits, expected[batch], rtol=0, atol=1e-5)


def test_training_goes_on_after_inference_mode():
    model = adapted()
    with torch.inference_mode():
        expected = model(IDS).logits
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert torch.equal(logits(model), expected)


def test_a_copied_or_pickled_model_carries_no_produced_prefix():
    import pickle

    model = adapted()
    empty = len(pickle.dumps(model))
    logits(model)
    assert abs(len(pickle.dumps(model)) - empty) < 500  # less than the prefix of one layer


class LargestCopy(TorchDispatchMode):
    """Notes the most numbers that a concatenation or a copy has written at once."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.clone, torch.ops.aten.copy_):
            self.numbers = max(self.numbers, output.numel())
        return output


def test_decoding_copies_no_cached_keys_and_values():
    from transformers import StaticCache

    model = adapted("none")
    cache = StaticCache(config=model.config, max_cache_len=256)
    with torch.no_grad():
        model(IDS[:1], past_key_values=cache)
        with LargestCopy() as copies:
            model(IDS[:1, :1], past_key_values=cache)
    layer = cache.layers[0].keys
    assert 0 < copies.numbers < layer.numel() / 4


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_prefix_key_values_are_what_enters_attention(reparameterization):
    model = adapted(reparameterization, prefix_scaling=2.0)
    for name, (key, value) in prefix_key_values(model).items():
        layer = model.get_base_model().get_submodule(name).prefix_plus
        prefix, gated = layer(torch.zeros(1), torch.zeros(1))
        assert torch.equal(prefix.key, key) and torch.equal(prefix.value, value) and gated == ()
