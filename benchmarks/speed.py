"""
Time and memory of PREFIX_PLUS against PEFT's PREFIX_TUNING, LoRA (r = 8 on q and v) and the bare model.

All methods run interleaved in one process, round by round, on the same random weights and inputs; each figure is the median
over the rounds, with the middle half of them as spread, and as a ratio of medians to PREFIX_TUNING. PREFIX_TUNING and
PREFIX_PLUS have prefixes of the same length in every layer; "joint" is PREFIX_PLUS with decoupled=False, "fixed" that with
position_free=False as well.

    python benchmarks/speed.py                          # every table, CPU, a 512-wide Llama
    python benchmarks/speed.py --tables train decode    # some tables
    python benchmarks/speed.py --device cuda --shape 1b --dtype bfloat16
    python benchmarks/speed.py --tables mixed --model PATH --dtype bfloat16     # a saved model in place of a shape
    python benchmarks/speed.py --tables decode --clock process   # CPU seconds, which other processes disturb less
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peft_prefix_plus import PrefixPlusConfig


SHAPES = {
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
}
INTERMEDIATE = {"small": 1408, "1b": 8192, "7b": 11008}
BASELINE = "PREFIX_TUNING"
JOINT = "PREFIX_PLUS, joint"
FIXED = "PREFIX_PLUS, joint, fixed"
METHODS = (BASELINE, "PREFIX_PLUS", JOINT, FIXED, "LoRA", "bare")

MIXED_BATCH = 50
MIXED_COUNTS = (1, 8, 50)
MIXED_BASELINE = "one, active"
MIXED_FORMS = {"decoupled": {}, "joint": {"decoupled": False}, "gated": {"gating": True}}

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}

Step = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What the whole run has in common."""

    shape: str
    device: str
    dtype: torch.dtype
    vocab_size: int
    prefix: int
    rounds: int
    batches: tuple[int, ...]
    clock: Callable[[], float] = time.perf_counter
    model: str | None = None

    def base(self) -> PreTrainedModel:
        if self.model is not None:
            return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype).to(self.device).eval()
        config = LlamaConfig(
            **SHAPES[self.shape],
            intermediate_size=INTERMEDIATE[self.shape],
            vocab_size=self.vocab_size,
            max_position_embeddings=16384,
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            return LlamaForCausalLM(config).to(self.dtype).eval()

    def ids(self, batch: int, tokens: int) -> torch.Tensor:
        return torch.randint(self.vocab_size, (batch, tokens), device=self.device)


def top_layers(base: PreTrainedModel, share: float) -> list[int]:
    """The uppermost share of the layers."""
    num_layers = base.config.num_hidden_layers
    return list(range(num_layers - round(num_layers * share), num_layers))


def wrap(settings: Settings, method: str, base: PreTrainedModel, layers: list[int] | None = None) -> PreTrainedModel:
    """Wrap a base model of its own in one of the methods."""
    base = copy.deepcopy(base)
    if method == "bare":
        return base.requires_grad_(False)
    if method == BASELINE:
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=settings.prefix)
    elif method == "LoRA":
        config = LoraConfig(
            task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"], layers_to_transform=layers
        )
    else:
        config = PrefixPlusConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=settings.prefix,
            layers_to_transform=layers,
            decoupled=method not in (JOINT, FIXED),
            position_free=method != FIXED,
        )
    return get_peft_model(base, config)


def synchronize(settings: Settings) -> None:
    if settings.device == "cuda":
        torch.cuda.synchronize()


def interleave(settings: Settings, steps: dict[str, Step], progress: Progress, name: str) -> dict[str, list[float]]:
    """Run every step once per round, in turn, and return the seconds of each by method."""
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    task = progress.add_task(name, total=(settings.rounds + 1) * len(steps))
    for round_number in range(settings.rounds + 1):
        for method, step in steps.items():
            synchronize(settings)
            start = settings.clock()
            step()
            synchronize(settings)
            if round_number > 0:  # the first warms up
                seconds[method].append(settings.clock() - start)
            progress.advance(task)
    progress.remove_task(task)
    return seconds


def train_step(model: PreTrainedModel, ids: torch.Tensor) -> Step:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        model.train()
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
        if parameters:
            loss.backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def peak_bytes(device: str, step: Step) -> int:
    """The most memory that a step has allocated at any one time, beyond what there was before."""
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    allocations = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    allocated = peak = 0
    for _, size in allocations:
        allocated += size
        peak = max(peak, allocated)
    return peak


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def timing_rows(
    table: Table, case: str, seconds: dict[str, list[float]], unit: float = 1e3, baseline: str = BASELINE
) -> None:
    medians = {method: statistics.median(times) for method, times in seconds.items()}
    reference = medians.get(baseline)
    for method, times in seconds.items():
        low, _, high = statistics.quantiles(times, n=4)
        ratio = f"{medians[method] / reference:.2f}" if reference else "–"
        table.add_row(case, method, f"{medians[method] * unit:.1f}", f"{low * unit:.1f}–{high * unit:.1f}", ratio)
        case = ""


def train_table(settings: Settings, progress: Progress) -> Table:
    table = new_table("Training step", "case", "method", "ms", "middle half", "ratio")
    base = settings.base()
    cases = [(tokens, batch, share) for tokens, batch in ((512, 4), (2048, 1)) for share in (1.0, 0.5, 0.25)]
    for tokens, batch, share in cases:
        ids = settings.ids(batch, tokens)
        layers = None if share == 1.0 else top_layers(base, share)
        methods = [BASELINE, "PREFIX_PLUS", JOINT, "LoRA", *([FIXED, "bare"] if share == 1.0 else [])]
        steps = {method: train_step(wrap(settings, method, base, layers), ids) for method in methods}
        name = f"T={tokens}, batch {batch}, {'all' if layers is None else f'top {share:g} of the'} layers"
        timing_rows(table, name, interleave(settings, steps, progress, name))
    return table


def memory_table(settings: Settings, progress: Progress) -> Table:
    table = new_table("Peak memory of a training step, all layers, batch 1", "case", "method", "MiB", "ratio")
    base = settings.base()
    for tokens in (2048, 4096, 8192):
        ids = settings.ids(1, tokens)
        reference = None
        rows = [
            *((method, False) for method in (BASELINE, "PREFIX_PLUS", JOINT, "LoRA")),
            *((method, True) for method in ("PREFIX_PLUS", JOINT, "LoRA")),
        ]
        # without checkpointing, 8192 tokens need more memory than small machines have
        rows = [row for row in rows if tokens < 8192 or row[1]]
        task = progress.add_task(f"memory at T={tokens}", total=len(rows))
        for method, checkpointing in rows:
            model = wrap(settings, method, base)
            if checkpointing:
                model.activation_checkpointing_enable()
            peak = peak_bytes(settings.device, train_step(model, ids))
            reference = peak if method == BASELINE else reference
            ratio = f"{peak / reference:.2f}" if reference else "–"
            label = f"{method}, checkpointing" if checkpointing else method
            table.add_row(f"T={tokens}", label, f"{peak / 2**20:.0f}", ratio)
            progress.advance(task)
        progress.remove_task(task)
    return table


def evaluated(settings: Settings) -> dict[str, PreTrainedModel]:
    """A model of every method, for inference."""
    base = settings.base()
    return {method: wrap(settings, method, base).eval() for method in METHODS}


def prefill_table(settings: Settings, progress: Progress) -> Table:
    table = new_table("Prefill", "case", "method", "ms", "middle half", "ratio")
    ids = settings.ids(1, 2048)

    def prefill(model: PreTrainedModel) -> Step:
        @torch.no_grad()
        def step() -> None:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)

        return step

    steps = {method: prefill(model) for method, model in evaluated(settings).items()}
    timing_rows(table, "2048 tokens", interleave(settings, steps, progress, "prefill"))
    return table


def decode_table(settings: Settings, progress: Progress) -> Table:
    table = new_table("Decoding", "case", "method", "ms", "middle half", "ratio")
    models = evaluated(settings)
    for batch in settings.batches:
        prompt = settings.ids(batch, 64)

        def decode(model: PreTrainedModel, prompt: torch.Tensor = prompt) -> Step:
            def step() -> None:
                model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=256,
                    min_new_tokens=256,
                    do_sample=False,
                    pad_token_id=0,
                )

            return step

        steps = {method: decode(model) for method, model in models.items()}
        name = f"256 tokens, batch {batch}"
        seconds = interleave(settings, steps, progress, name)
        timing_rows(table, name, seconds)
        rate = batch * 256 / statistics.median(seconds["PREFIX_PLUS"])
        table.add_row("", "PREFIX_PLUS", f"{rate:.0f} tokens/s", "", "")
    return table


def mixed_table(settings: Settings, progress: Progress) -> Table:
    table = new_table(
        f"A batch of {MIXED_BATCH} rows with adapters of their own, beside one adapter for all rows",
        "case",
        "adapters",
        "ms",
        "middle half",
        "ratio",
    )
    base, count = settings.base(), max(MIXED_COUNTS)
    prompt = settings.ids(MIXED_BATCH, 64)
    mask = torch.ones_like(prompt)
    for form, fields in MIXED_FORMS.items():
        model: PreTrainedModel = copy.deepcopy(base)
        for index in range(count):
            config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=settings.prefix, **fields)
            if index == 0:
                model = get_peft_model(model, config, adapter_name="adapter_0")
            else:
                model.add_adapter(f"adapter_{index}", config)
        model.eval()
        named: dict[str, dict[str, list[str]]] = {MIXED_BASELINE: {}}
        for number in MIXED_COUNTS:
            named[str(number)] = {"adapter_names": [f"adapter_{row % number}" for row in range(MIXED_BATCH)]}

        def generation(names: dict[str, list[str]], tokens: int, model: PreTrainedModel = model) -> Step:
            def step() -> None:
                model.generate(
                    input_ids=prompt,
                    attention_mask=mask,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=0,
                    **names,
                )

            return step

        for tokens in (1, 65):
            case = f"{form}, prefill of 64" if tokens == 1 else f"{form}, and 64 tokens"
            steps = {name: generation(names, tokens) for name, names in named.items()}
            timing_rows(table, case, interleave(settings, steps, progress, case), baseline=MIXED_BASELINE)
    return table


def length_table(settings: Settings, progress: Progress) -> Table:
    table = new_table(
        "Training step by prefix length, T=2048, batch 1", "case", "method", "ms", "middle half", "ratio"
    )
    base = settings.base()
    ids = settings.ids(1, 2048)
    for prefix in (10, 50, 100, 200, 500):
        longer = Settings(**{**vars(settings), "prefix": prefix})
        steps = {method: train_step(wrap(longer, method, base), ids) for method in (BASELINE, "PREFIX_PLUS", JOINT)}
        name = f"{prefix} virtual tokens"
        timing_rows(table, name, interleave(settings, steps, progress, name))
    return table


def storage_table(settings: Settings, progress: Progress) -> Table:
    table = new_table("Saving and loading an adapter", "case", "method", "ms", "middle half", "ratio")
    base = settings.base()
    with tempfile.TemporaryDirectory() as folder:
        wrapped = {method: wrap(settings, method, base) for method in (BASELINE, "PREFIX_PLUS", JOINT, "LoRA")}
        paths = {method: Path(folder, method) for method in wrapped}
        saves: dict[str, Step] = {
            method: lambda method=method: wrapped[method].save_pretrained(paths[method]) for method in wrapped
        }
        timing_rows(table, "save", interleave(settings, saves, progress, "save"))
        fresh = {method: [copy.deepcopy(base) for _ in range(settings.rounds + 1)] for method in wrapped}
        loads: dict[str, Step] = {
            method: lambda method=method: PeftModel.from_pretrained(fresh[method].pop(), paths[method])
            for method in wrapped
        }
        timing_rows(table, "load", interleave(settings, loads, progress, "load"))
        for method, path in paths.items():
            size = (path / "adapter_model.safetensors").stat().st_size
            table.add_row("size", method, f"{size / 2**10:.0f} KiB", "", "")
    return table


TABLES = {
    "train": train_table,
    "memory": memory_table,
    "prefill": prefill_table,
    "decode": decode_table,
    "mixed": mixed_table,
    "length": length_table,
    "storage": storage_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--model", help="the path of a saved model, in place of the shape and the vocabulary size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--prefix", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="of the decode table")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what is timed; process: CPU seconds")
    arguments = parser.parse_args()
    settings = Settings(
        arguments.shape,
        arguments.device,
        getattr(torch, arguments.dtype),
        arguments.vocab_size,
        arguments.prefix,
        arguments.rounds,
        tuple(arguments.batches),
        CLOCKS[arguments.clock],
        arguments.model,
    )
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    console = Console(width=110)
    device = torch.cuda.get_device_name() if settings.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    shape = arguments.model or f"{arguments.shape} shape, vocabulary {arguments.vocab_size}"
    console.print(
        f"{device}, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}; {shape}, {arguments.dtype}, prefix "
        f"{arguments.prefix}, {arguments.rounds} rounds, {arguments.clock} time"
    )
    for name in arguments.tables:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            table = TABLES[name](settings, progress)
        console.print(table)


if __name__ == "__main__":
    main()
