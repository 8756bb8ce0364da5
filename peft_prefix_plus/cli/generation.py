"""`prefix-plus generate`: complete prompts with an adapted model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from ..serving.left_padding import left_padded
from ..training.padding import padding_id
from .errors import CommandError, check_numbers, check_positive
from .loading import (
    BASE_MODEL_HELP,
    DTYPE_HELP,
    LARGEST_SEED,
    TRUST_HELP,
    check_dtype,
    load_adapted_model,
    num_positions,
)
from .records import check_text, check_vocabulary, prompt_ids, read_prompts


@dataclass(kw_only=True)
class GenerationSettings:
    """The options of `prefix-plus generate`; the help texts describe them."""

    adapter: str = field(metadata={"help": "The adapter: a directory or a name on the Hub."})
    model: str | None = field(default=None, metadata=BASE_MODEL_HELP)
    prompt: str | None = field(
        default=None,
        metadata={"help": "The prompt. Without --prompt and --data it is read from standard input."},
    )
    data: Path | None = field(default=None, metadata={"help": "A file of JSON lines; complete the 'prompt' of each."})
    max_new_tokens: int = field(default=128, metadata={"help": "The most tokens to generate per prompt."})
    sample: bool = field(
        default=False, metadata={"help": "Draw tokens at random instead of taking the likeliest one."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "With --sample: the temperature; below 1 favours likely tokens."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "With --sample: draw among the likeliest tokens of this total probability."}
    )
    top_k: int = field(
        default=0, metadata={"help": "With --sample: draw among this many of the likeliest tokens; 0 means all."}
    )
    seed: int = field(default=0, metadata={"help": "With --sample: the random seed."})
    batch_size: int = field(default=8, metadata={"help": "Prompts per batch."})
    dtype: str = field(default="auto", metadata=DTYPE_HELP)
    trust_remote_code: bool = field(default=False, metadata=TRUST_HELP)
    json_lines: bool = field(
        default=False,
        metadata={"help": "Print JSON lines with 'prompt' and 'completion' instead of plain completions."},
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.prompt is not None and self.data is not None:
            raise ValueError("--prompt and --data contradict each other. Give one of them.")
        check_numbers(self, 1, "max_new_tokens", "batch_size")
        check_positive(self, "temperature")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")
        check_numbers(self, 0, "top_k")
        check_numbers(self, 0, "seed", at_most=LARGEST_SEED)
        for name, unused in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
            if getattr(self, name) != unused and not self.sample:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but it has no effect without --sample. Add --sample."
                )


def generate(settings: GenerationSettings) -> None:
    """
    Print the completions on standard output, in the order of the prompts.

    Args:
        settings (`GenerationSettings`): The options.

    Raises:
        CommandError: If there is no prompt, or the adapter, its base model or the data cannot be read.
    """
    if settings.data is not None:
        prompts = read_prompts(settings.data)
    else:
        prompts = [sys.stdin.read().removesuffix("\n") if settings.prompt is None else settings.prompt]
    if not any(prompts):
        raise CommandError("There is no prompt. Give one with --prompt or on standard input, or several with --data.")
    if settings.data is None:
        check_text("The prompt", prompts[0])
    model, tokenizer = load_adapted_model(
        settings.adapter, settings.model, settings.dtype, trust_remote_code=settings.trust_remote_code
    )
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.sample:
        set_seed(settings.seed)
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    completions = complete(
        model, tokenizer, prompts, settings.max_new_tokens, batch_size=settings.batch_size, **sampling
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        if settings.json_lines:
            print(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False), flush=True)
        else:
            print(completion.strip(), flush=True)


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 8,
    **kwargs: Any,
) -> Iterator[str]:
    """
    Yield the completion of every prompt, without the prompt.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model. It is left in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        prompts (`Sequence[str]`): The prompts.
        max_new_tokens (`int`): The most tokens to generate per prompt.
        batch_size (`int`, defaults to 8): Prompts per batch.
        kwargs: Passed to the model's `generate`.

    Raises:
        CommandError: If the tokenizer does not fit the model, or the model has too few positions.
    """
    model.eval()
    padding = padding_id(tokenizer)
    encoded = [prompt_ids(prompt, tokenizer) or [padding] for prompt in prompts]
    check_vocabulary(model, tokenizer, encoded)
    check_positions(model, max(map(len, encoded), default=0), max_new_tokens)
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        input_ids, attention_mask = left_padded(batch, padding)
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            **kwargs,
        )
        yield from tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)


def check_positions(model: Any, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """
    Raise unless a model has enough positions for a prompt and its completion.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        num_prompt_tokens (`int`): The tokens of the longest prompt.
        max_new_tokens (`int`): The most tokens to generate.

    Raises:
        CommandError: If it has too few.
    """
    limit = num_positions(model)
    if limit is not None and num_prompt_tokens + max_new_tokens > limit:
        raise CommandError(
            f"The model has {limit} positions; the longest prompt has {num_prompt_tokens} tokens and --max-new-tokens is "
            f"{max_new_tokens}, which is more. Shorten the prompt, or lower --max-new-tokens."
        )
