"""
Every architecture in transformers' auto mappings: it works with a prefix in everything, or says clearly why not.

`make test-models` tests them all and writes docs/models.md; the default run tests a sample.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapter_parameters, assert_unchanged, joint_config, prefix_layers, state_of
from peft import PeftModel, get_peft_model
from tiny_models import NO_TEXT_LOSS, UNBUILDABLE, UNREAD_MODULES, Case, cases, inputs_of, tiny_model, token_ids

from peft_prefix_plus import PrefixPlusConfig
from peft_prefix_plus.probing.modules import attention_modules
from peft_prefix_plus.probing.probe import probe


SAMPLE = {
    "CAUSAL_LM-LlamaForCausalLM",
    "CAUSAL_LM-DeepseekV3ForCausalLM",
    "CAUSAL_LM-Gemma4ForCausalLM",
    "CAUSAL_LM-GptOssForCausalLM",
    "CAUSAL_LM-Qwen3NextForCausalLM",
    "CAUSAL_LM-JambaForCausalLM",
    "CAUSAL_LM-BloomForCausalLM",
    "CAUSAL_LM-FalconForCausalLM",
    "CAUSAL_LM-GPTJForCausalLM",
    "CAUSAL_LM-MptForCausalLM",
    "CAUSAL_LM-MambaForCausalLM",
    "SEQ_2_SEQ_LM-T5ForConditionalGeneration",
    "SEQ_2_SEQ_LM-LEDForConditionalGeneration",
    "SEQ_CLS-DebertaV2ForSequenceClassification",
    "SEQ_CLS-MPNetForSequenceClassification",
    "SEQ_CLS-RoFormerForSequenceClassification",
    "SEQ_CLS-FNetForSequenceClassification",
}
"""What the default run tests; the rest has the marker `models`."""

REFUSED = {
    "BltForCausalLM",
    "FNetForSequenceClassification",
    "FalconMambaForCausalLM",
    "FunnelForSequenceClassification",
    "LayoutLMv3ForSequenceClassification",
    "LiltForSequenceClassification",
    "LongformerForSequenceClassification",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "MraForSequenceClassification",
    "NystromformerForSequenceClassification",
    "OpenAIGPTForSequenceClassification",
    "OpenAIGPTLMHeadModel",
    "ProphetNetForCausalLM",
    "ProphetNetForConditionalGeneration",
    "ReformerForSequenceClassification",
    "ReformerModelWithLMHead",
    "RwkvForCausalLM",
    "XLNetForSequenceClassification",
    "XLNetLMHeadModel",
    "YosoForSequenceClassification",
    "xLSTMForCausalLM",
}
"""The models that cannot have a prefix; docs/models.md has their errors. No other may be refused."""

PROMPT = token_ids(2, 6, seed=2)


def parameters() -> list[Any]:
    """The cases as pytest's parameters."""
    return [
        pytest.param(case, id=str(case), marks=[] if str(case) in SAMPLE else [pytest.mark.models])
        for case in cases()
        if case.class_name not in UNBUILDABLE
    ]


@pytest.mark.parametrize("case", parameters())
def test_an_architecture_works_with_a_prefix_or_says_why_not(case: Case, tmp_path: Path) -> None:
    model = tiny_model(case)
    before = state_of(model)
    try:
        get_peft_model(model, config_for(case))
    except ValueError as error:
        report(case, "refused", str(error))
        assert_unchanged(model, before)
        assert type(model).__name__ in str(error)
        assert case.class_name in REFUSED, error
        return
    assert case.class_name not in REFUSED
    try:
        detail = check_all(case, tmp_path)
    except BaseException as error:
        report(case, "failed", f"{type(error).__name__}: {error}")
        raise
    report(case, "passed", detail)


def config_for(case: Case) -> PrefixPlusConfig:
    # keys and values of both signs and unit size: they visibly change what the model computes
    return joint_config(
        task_type=case.task_type,
        num_virtual_tokens=3,
        init_weights=False,
        exclude_modules=UNREAD_MODULES.get(case.class_name),
    )


def report(case: Case, outcome: str, detail: Any) -> None:
    """Note a result for docs/models.md, if the run was asked to."""
    path = os.environ.get("MODELS_REPORT")
    if path is not None:
        line = json.dumps(
            {"case": [case.task_type, case.model_type, case.class_name], "outcome": outcome, "detail": detail}
        )
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def check_all(case: Case, tmp_path: Path) -> dict[str, list[str]]:
    """
    Check everything on one model; return the classes of the attention modules with and without a prefix, and why the prefix
    is at fixed positions, if it is.
    """
    # frozen, as the adapter leaves it: torch takes other kernels for some sums when a parameter needs a gradient
    model = tiny_model(case).requires_grad_(False)
    inputs = inputs_of(case, model)
    expected = logits_of(model, inputs)
    modules = [name for name, _ in model.named_modules()]
    output = None if case.task_type == "SEQ_CLS" else generated(model)

    tuned = get_peft_model(model, config_for(case)).eval()
    changed = logits_of(tuned, inputs)
    assert not torch.allclose(changed, expected, atol=1e-5), "the adapter changes nothing"
    with tuned.disable_adapter():
        assert torch.equal(logits_of(tuned, inputs), expected), "disabled, it is not the base model"
    check_rows_are_independent(tuned, inputs, changed)
    obstacles: set[str] = set()
    if tuned.resolved_config().position_free:
        check_queries_are_unrotated(tuned)
    else:
        geometries = probe(tuned.get_base_model())
        obstacles = {geometry.obstacle for geometry in geometries.values() if geometry.obstacle}
        assert obstacles
    if output is not None:
        check_generation(tuned, output)
    tuned.save_pretrained(tmp_path)

    unloaded = tuned.unload()
    assert [name for name, _ in unloaded.named_modules()] == modules
    assert not any(module._forward_pre_hooks for name, module in unloaded.named_modules() if "attention" in name)
    assert torch.equal(logits_of(unloaded, inputs), expected), "unloaded, it is not the base model"
    loaded = PeftModel.from_pretrained(unloaded, tmp_path, is_trainable=True).eval()
    assert torch.equal(logits_of(loaded, inputs), changed), "loaded, it computes something else"
    check_training_step(case, loaded)
    prefixed, others = attention_classes(loaded)
    return {"prefixed": prefixed, "others": others, "obstacles": sorted(obstacles)}


def attention_classes(tuned: PeftModel) -> tuple[list[str], list[str]]:
    prefixed = {type(layer.attention).__name__ for layer in prefix_layers(tuned).values()}
    others = {type(module).__name__ for module in attention_modules(tuned).values()}
    return sorted(prefixed), sorted(name for name in others - prefixed if "Attention" in name)


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model(**inputs)
    logits = outputs.logits if "logits" in outputs else outputs[0]
    assert logits.isfinite().all(), "the logits are not finite"
    return logits


def check_rows_are_independent(tuned: PeftModel, inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
    """Each row of a batch gets what it gets alone."""
    alone = logits_of(tuned, {name: tensor[:1] for name, tensor in inputs.items()})
    torch.testing.assert_close(alone, logits[:1], atol=2e-4, rtol=1e-3)


def check_generation(tuned: PeftModel, of_base: Any) -> None:
    """Greedy generation with a cache gives what forwards over the whole text give, where it does so in the base model."""
    of_tuned = generated(tuned)
    assert of_tuned.sequences.shape == of_base.sequences.shape
    assert not torch.equal(of_tuned.logits[-1], of_base.logits[-1]), "the adapter does not change what is generated"
    with tuned.disable_adapter():
        base_error = error_of_cache(tuned, of_base)
    error = error_of_cache(tuned, of_tuned)
    assert base_error > 1e-3 or error < 1e-2, (
        f"with a cache the logits are off by {error}, the base model's by {base_error}"
    )


def generated(model: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        input_ids=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )


def error_of_cache(model: Any, output: Any) -> float:
    """How far the last logits of a generation with a cache are from those of one forward over all that it generated."""
    if output.sequences.dim() != 2:
        return float("inf")  # audio codes, put into another order
    text = output.sequences[:, :-1]
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": PROMPT, "decoder_input_ids": text}
    else:
        inputs = {"input_ids": text}
    return float((logits_of(model, inputs)[:, -1] - output.logits[-1]).abs().max())


def check_training_step(case: Case, tuned: PeftModel) -> None:
    tuned.train()
    inputs = inputs_of(case, tuned.get_base_model(), with_labels=True)
    adapter = adapter_parameters(tuned)
    optimizer = torch.optim.SGD([parameter for parameter in tuned.parameters() if parameter.requires_grad], lr=0.1)
    loss_of(case, tuned, inputs).backward()
    optimizer.step()
    assert adapter
    for name, parameter in adapter.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        assert parameter.grad.any(), f"{name} has a gradient of zero"
    optimizer.zero_grad()
    tuned.eval()


def loss_of(case: Case, tuned: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of the task, or for the few models that compute none, cross-entropy of the logits."""
    base = type(tuned.get_base_model())
    if "labels" in inspect.signature(base.forward).parameters and base.__name__ not in NO_TEXT_LOSS:
        return tuned(**inputs).loss
    labels = inputs.pop("labels")
    logits = tuned(**inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def test_the_documentation_lists_every_architecture() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert [str(case) for case in cases() if f"`{case.class_name}`" not in text] == []


def check_queries_are_unrotated(tuned: Any) -> None:
    """Where a position-free prefix undoes the rotation of queries: that it does, wherever the text begins."""
    layers = {name: layer for name, layer in prefix_layers(tuned).items() if layer.rotation is not None}
    if not layers:
        return
    seen: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in layers}
    hooks = []
    for name, layer in layers.items():
        hidden: list[torch.Tensor] = []
        hooks.append(layer.attention.register_forward_pre_hook(partial(note_input, hidden), with_kwargs=True))
        layer.queries = partial(spied, layer.queries, hidden, seen[name])
    inputs = {"input_ids": token_ids(2, 6, seed=3)}
    if tuned.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids(2, 5, seed=4)
    with torch.no_grad():
        for start in (0, 9):
            positions = {
                name.replace("input_ids", "position_ids"): start + torch.arange(ids.shape[1])[None].expand(2, -1)
                for name, ids in inputs.items()
            }
            tuned(**inputs, **positions)
    num_checked = 0
    for name, calls in seen.items():
        half = len(calls) // 2
        for (hidden_here, here, unrotated), (hidden_there, there, moved) in zip(
            calls[:half], calls[half:], strict=True
        ):
            if not torch.allclose(hidden_there, hidden_here, rtol=1e-3, atol=1e-5):
                continue  # the model itself makes more of positions, as T5Gemma 2 does where it merges encoder and decoder
            assert not torch.allclose(here, there, atol=1e-4), f"{name} does not rotate its queries"
            torch.testing.assert_close(
                moved, unrotated, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
            num_checked += 1
    assert num_checked >= len(seen) // 2
    for hook in hooks:
        hook.remove()
    for layer in layers.values():
        del vars(layer)["queries"]


def note_input(hidden: list[torch.Tensor], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the forward of an attention module: note its hidden states."""
    hidden[:] = [args[0] if args else kwargs["hidden_states"]]


def spied(
    queries: Callable[..., torch.Tensor],
    hidden: list[torch.Tensor],
    seen: list[tuple[torch.Tensor, ...]],
    query: torch.Tensor,
    *args: Any,
) -> torch.Tensor:
    """Return the queries that a prefix reads, and note them with the hidden states and the queries that they come from."""
    result = queries(query, *args)
    seen.append((hidden[0], query, result))
    return result
