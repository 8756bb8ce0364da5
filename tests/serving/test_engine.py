"""In vLLM every request gets the tokens that PEFT generates with its adapter, whatever else is in the batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served import VOCABULARY, Reference, save_adapter, save_model

from peft_prefix_plus.serving.folding import fold, served_model
from peft_prefix_plus.serving.store import PrefixStore


pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]
pytest.importorskip("vllm")

Question = tuple[str | None, list[int]]
"""An adapter's name, or `None` for the base model, and a prompt."""


def questions(store: PrefixStore, number: int, longest: int = 60, seed: int = 0) -> list[Question]:
    """Prompts of random lengths, for all adapters and the base model in turn, in random order."""
    draw = random.Random(seed)
    names: list[str | None] = [None, *store.entries()]
    asked = [(names[index % len(names)], draw.randrange(1, longest)) for index in range(number)]
    draw.shuffle(asked)
    return [(name, [draw.randrange(VOCABULARY) for _ in range(length)]) for name, length in asked]


def parameters(store: PrefixStore, adapter: str | None, num_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    named = {"prefix_plus": store.entries()[adapter].digest} if adapter is not None else None
    extra = {"kv_transfer_params": named} if named else None
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, extra_args=extra, **options)


def answers(llm: Any, store: PrefixStore, asked: list[Question], num_tokens: int = 12) -> list[list[int]]:
    prompts = [{"prompt_token_ids": prompt} for _, prompt in asked]
    settings = [parameters(store, adapter, num_tokens) for adapter, _ in asked]
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, settings, use_tqdm=False)]


def counted(llm: Any, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def test_a_mixed_batch_of_all_adapters_and_the_base_model_gets_pefts_tokens_cold_and_warm(
    engine: Callable[..., Any], store: PrefixStore, reference: Reference
) -> None:
    asked = questions(store, 42)
    expected = [reference.generate(adapter, prompt, 12) for adapter, prompt in asked]
    assert len({tuple(answer) for answer in expected}) > 30  # the adapters act
    with engine() as llm:
        assert answers(llm, store, asked) == expected
        queried, hit = (counted(llm, f"vllm:prefix_cache_{name}") for name in ("queries", "hits"))
        assert answers(llm, store, asked) == expected
        assert counted(llm, "vllm:prefix_cache_hits") - hit > 0.3 * (
            counted(llm, "vllm:prefix_cache_queries") - queried
        )
        # what a client sends as a salt cannot reach the blocks of an adapter
        longest = max(store.entries(), key=lambda name: store.entries()[name].num_cached_tokens)
        digest = store.entries()[longest].digest
        prompt = {"prompt_token_ids": [0] * 64 + [5], "cache_salt": digest}
        llm.generate([prompt], parameters(store, None, 1), use_tqdm=False)
        assert answers(llm, store, [(longest, [5])]) == [reference.generate(longest, [5], 12)]


def test_chunked_prefill_preemption_and_no_prefix_cache_change_nothing(
    engine: Callable[..., Any], store: PrefixStore, reference: Reference
) -> None:
    asked = questions(store, 24, longest=150, seed=1)
    expected = [reference.generate(adapter, prompt, 40) for adapter, prompt in asked]
    for prefix_caching in (True, False):
        with engine(
            num_gpu_blocks_override=30,  # of 32 tokens: too few for all that may run
            max_num_seqs=16,
            max_num_batched_tokens=48,  # less than a prompt, and no multiple of a block
            enable_chunked_prefill=True,
            enable_prefix_caching=prefix_caching,
        ) as llm:
            assert answers(llm, store, asked, 40) == expected
            assert counted(llm, "vllm:num_preemptions") > 0
            assert answers(llm, store, asked, 40) == expected


def test_each_tensor_parallel_rank_takes_its_heads(
    engine: Callable[..., Any], store: PrefixStore, reference: Reference
) -> None:
    asked = questions(store, 21, seed=2)
    with engine(tensor_parallel_size=2) as llm:
        assert answers(llm, store, asked) == [reference.generate(adapter, prompt, 12) for adapter, prompt in asked]


def test_a_model_with_scaled_rotary_frequencies_gets_pefts_tokens(
    engine: Callable[..., Any], store: PrefixStore, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0,
               "original_max_position_embeddings": 256})  # fmt: skip
    save_adapter(tmp_path / "model", tmp_path / "yarn", 3, num_virtual_tokens=40)
    served = served_model(str(tmp_path / "model"))
    store.add("yarn", fold(str(tmp_path / "yarn"), served), "yarn")
    reference = Reference(tmp_path / "model", {"yarn": tmp_path / "yarn"})
    asked: list[Question] = [(name, prompt) for name in ("yarn", None) for _, prompt in questions(store, 6, seed=3)]
    expected = [reference.generate(adapter, prompt, 12) for adapter, prompt in asked]
    try:
        with engine(model=tmp_path / "model") as llm:
            assert answers(llm, store, asked) == expected
    finally:
        store.remove("yarn")


def test_a_repetition_penalty_does_not_count_virtual_tokens(
    engine: Callable[..., Any], store: PrefixStore, reference: Reference
) -> None:
    with engine() as llm:
        for adapter, prompt in questions(store, 8, seed=4):
            prompt = [token for token in prompt if token] or [7]  # the placeholder is no part of any
            settings = parameters(store, adapter, 12, repetition_penalty=1.5)
            (output,) = llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
            expected = reference.generate(adapter, prompt, 12, repetition_penalty=1.5)
            assert list(output.outputs[0].token_ids) == expected


def test_what_cannot_be_answered_fails_alone_and_the_engine_goes_on(
    engine: Callable[..., Any], store: PrefixStore, reference: Reference
) -> None:
    from vllm import SamplingParams

    good = questions(store, 6, seed=5)
    expected = [reference.generate(adapter, prompt, 12) for adapter, prompt in good]
    lost = "0" * 64
    unreadable = store.directory / f"{'1' * 64}.safetensors"
    unreadable.write_bytes(b"no tensors")
    long = max(store.entries(), key=lambda name: store.entries()[name].num_cached_tokens)
    bad = [
        ([1], SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": {"prefix_plus": lost}})),
        ([1, 2], SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": {"prefix_plus": "../store"}})),
        ([1, 2], SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": {"prefix_plus": "1" * 64}})),
        ([1, 2], SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": {"prefix_plus": 7}})),
        ([1] * 500, parameters(store, long, 4)),  # no room
        ([1, 2, 3], parameters(store, long, 4, prompt_logprobs=1)),
    ]
    with engine() as llm:
        prompts = [
            {"prompt_token_ids": prompt} for prompt in [*(each for each, _ in bad), *(each for _, each in good)]
        ]
        settings = [*(each for _, each in bad), *(parameters(store, adapter, 12) for adapter, _ in good)]
        outputs = llm.generate(prompts, settings, use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in outputs[: len(bad)]] == ["error"] * len(bad)
        assert [list(output.outputs[0].token_ids) for output in outputs[len(bad) :]] == expected
        assert answers(llm, store, good) == expected
    unreadable.unlink()
