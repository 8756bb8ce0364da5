"""
What a question costs before its first token: after the document, with a prefix in its place, after as many cached tokens, and alone.

    python benchmarks/documents_costs.py --model .cache/smollm2

A token's keys and values are 2 · layers · key heads · head size numbers, so with a prefix a question's cache is as small as without the
document. The prefix is kept once for all questions, in float32. The time to the first token should be that of a question that the base
model reads after as many cached tokens: neither computes them again, both attend to them. The time is that of all layers; the output layer
costs the same in all ways. Times are medians of CPU time of one thread over rounds in which all ways take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from documents_text import document, held_out_questions, user_turn
from peft import get_peft_model
from quality_runs import silence
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_prefix_plus import PrefixPlusConfig, prefix_key_values


KIB = 1024


@dataclass(frozen=True)
class Way:
    """
    A way of asking.

    Attributes:
        name: Its name.
        model: What is called.
        token_ids: The tokens that it reads, (1, tokens).
        cached_ids: The tokens whose keys and values it has already, (1, tokens).
    """

    name: str
    model: Any
    token_ids: torch.Tensor
    cached_ids: torch.Tensor | None = None

    def cache(self) -> Any:
        """Return the keys and values that it begins with."""
        return None if self.cached_ids is None else self.read(self.cached_ids, None)

    @torch.no_grad()
    def read(self, token_ids: torch.Tensor, cache: Any) -> Any:
        """Read tokens after those of a cache up to the last hidden state, and return the cache."""
        return self.model.get_decoder()(input_ids=token_ids, past_key_values=cache, use_cache=True).past_key_values

    def seconds(self) -> float:
        """Return the CPU time until the first token."""
        cache = self.cache()
        started = time.process_time()
        self.read(self.token_ids, cache)
        return time.process_time() - started


def bytes_of_cache(cache: Any) -> int:
    """Return the bytes of all keys and values in a cache."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def bytes_of_prefix(model: Any) -> int:
    """Return the bytes of all keys and values of a prefix."""
    return sum(tensor.nbytes for pair in prefix_key_values(model).values() for tensor in pair)


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return what the keys and values of a token take, by the arithmetic."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize


def ways(base: Any, tokenizer: Any, tokens: int) -> list[Way]:
    """Return the ways, the last two those that are compared: as many cached tokens, and the prefix, on another copy of the model."""
    text = tokenizer(document() + "\n\n", add_special_tokens=False)["input_ids"]
    question = tokenizer(user_turn(held_out_questions()[0].question), add_special_tokens=False)["input_ids"]
    fields: dict[str, Any] = dict(num_virtual_tokens=tokens, position_free=False, decoupled=False)
    # the base model is left as it is: a wrapper changes the modules
    copy = AutoModelForCausalLM.from_pretrained(base.name_or_path, dtype=base.dtype).eval()
    prefixed = get_peft_model(copy, PrefixPlusConfig(task_type="CAUSAL_LM", **fields)).eval()
    return [
        Way("the document in context", base, torch.tensor([[*text, *question]])),
        Way("the question alone", base, torch.tensor([question])),
        Way(f"after {tokens} cached tokens", base, torch.tensor([question]), torch.tensor([text[:tokens]])),
        Way(f"a prefix of {tokens} tokens", prefixed.get_base_model(), torch.tensor([question])),
    ]


def seconds(all_ways: list[Way], rounds: int) -> list[float]:
    """Return the median CPU time of each of several ways, which take turns."""
    taken = [[way.seconds() for way in all_ways] for _ in range(rounds + 1)]
    return [statistics.median(times) for times in zip(*taken[1:], strict=True)]  # the first round warms up


def measure(base: Any, tokenizer: Any, tokens: int, rounds: int) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    all_ways = ways(base, tokenizer, tokens)
    times = seconds(all_ways, rounds)
    _, alone, after_cached, _ = times
    rows = []
    for way, taken in zip(all_ways, times, strict=True):
        is_prefix = way is all_ways[-1]
        count = way.token_ids.shape[1] + (0 if way.cached_ids is None else way.cached_ids.shape[1])
        cache = bytes_of_cache(way.read(way.token_ids, way.cache()))
        kept = bytes_of_prefix(way.model) if is_prefix else 0
        expected = tokens * bytes_per_token(base.config, torch.float32) if is_prefix else 0
        rows.append(
            (
                way.name,
                str(way.token_ids.shape[1]),
                f"{cache / KIB:,.1f} / {count * bytes_per_token(base.config, base.dtype) / KIB:,.1f}",
                f"{kept / KIB:,.1f} / {expected / KIB:,.1f}" if is_prefix else "",
                f"{1000 * taken:,.0f} ms",
                f"{taken / alone:.2f}",
                f"{taken / after_cached:.2f}",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2", help="a causal language model")
    parser.add_argument("--tokens", type=int, default=128, help="virtual tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the model; as it was saved by default")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype or "auto").eval()
    table = Table(
        "",
        "tokens read",
        "cache, KiB: measured / arithmetic",
        "prefix, KiB: measured / arithmetic",
        "prefill",
        "against the question alone",
        "against cached tokens",
    )
    for row in measure(base, AutoTokenizer.from_pretrained(options.model), options.tokens, options.rounds):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
