"""The text and the metadata of a model card.

A downloader who does not import this package gets `KeyError: 'PREFIX_PLUS'` from PEFT, so every card says what to install
and to import, in a section of its own near the top. The rest of a card is PEFT's and the user's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


TAGS = ("prefix-tuning", "prefix-plus")

SECTION_START = "<!-- peft-prefix-plus: every save writes this section anew and keeps the text around it -->"
SECTION_END = "<!-- peft-prefix-plus: end of the section -->"
_SECTION = re.compile(
    f"{re.escape(SECTION_START)}(?:(?!{re.escape(SECTION_START)}).)*?{re.escape(SECTION_END)}", re.DOTALL
)

# By task type: what the classes in transformers and PEFT are named after, and the Hub's name for the task. There is none
# for SEQ_2_SEQ_LM any more: "text2text-generation" is gone, and whether a model translates or summarizes is not known.
TASKS: dict[str, tuple[str, str | None]] = {
    "CAUSAL_LM": ("ForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("ForSeq2SeqLM", None),
    "SEQ_CLS": ("ForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("ForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("ForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("ForFeatureExtraction", "feature-extraction"),
}
WIDGETS: dict[str, dict[str, str]] = {
    "text-generation": {"text": "Once upon a time"},
    "text-classification": {"text": "I liked it a lot."},
    "token-classification": {"text": "My name is Clara and I live in Berkeley, California."},
    "question-answering": {"text": "Where do I live?", "context": "My name is Merve and I live in İstanbul."},
}
"""By the Hub's name for a task, what the form on a model's page has in it at first. The author's own examples stay."""
LABELLED_TASKS = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True)
class SavedAdapter:
    """
    An adapter in a directory: the folder below that it lies in, if any, the fields of its configuration, the number of its learned
    parameters, and the folder that has it as one of PEFT's PREFIX_TUNING, as far as there are any.
    """

    subfolder: str | None
    config: dict[str, Any]
    num_parameters: int | None = None
    prefix_tuning: str | None = None

    @property
    def form(self) -> str:
        if self.config.get("gating"):
            return "gated"
        return "decoupled" if self.config.get("decoupled") else "joint"

    @property
    def runs_in(self) -> str:
        """The programs that can use it; vLLM can on base models that `prefix-plus serve` takes."""
        return {"cache": "transformers, vLLM (in its cache)", "added": "transformers, vLLM"}.get(
            self.served or "", "transformers"
        )

    @property
    def served(self) -> str | None:
        """How vLLM takes it: in its "cache", "added" to attention, or, as far as its configuration says, not at all."""
        fields = self.config
        if self.task_type != "CAUSAL_LM" or fields.get("modules_to_save"):
            return None
        if self.form != "joint":
            return "added"
        choices = ("layers_to_transform", "target_modules", "exclude_modules")
        is_everywhere = all(fields.get(name) is None for name in choices)
        return "cache" if fields.get("position_free") is False and is_everywhere else None

    @property
    def name(self) -> str:
        return self.subfolder or "default"

    @property
    def task_type(self) -> str | None:
        return self.config.get("task_type")

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path")


@dataclass(frozen=True)
class Training:
    """What the Trainer knows of a training: how long it was, on what data, and the last value of each metric."""

    length: str | None = None
    datasets: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Any, datasets: Any) -> Training:
        """
        Read it from a Trainer's state, as the file `trainer_state.json` has it.

        Args:
            state: The content of the file; what is not as the Trainer writes it is left out.
            datasets: The data sets that the card's metadata name.
        """
        state = state if isinstance(state, dict) else {}
        history = state.get("log_history")
        metrics: dict[str, float] = {}
        for entry in history if isinstance(history, list) else []:
            for name, value in entry.items() if isinstance(entry, dict) else []:
                is_metric = name in ("loss", "train_loss") or name.startswith("eval_")
                if is_metric and not name.endswith(SPEEDS) and isinstance(value, (int, float)):
                    metrics[name] = value
        steps, epochs = state.get("global_step"), state.get("epoch")
        length = None
        if isinstance(steps, int) and isinstance(epochs, (int, float)):
            length = f"{steps:,} steps, {epochs:.3g} epochs"
        named = [datasets] if isinstance(datasets, str) else datasets or []
        return cls(length, tuple(name for name in named if isinstance(name, str)), metrics)


NOTHING_KNOWN = Training()

SPEEDS = ("runtime", "per_second")
"""How the names end by which the Trainer logs how long something took."""


def is_hub_id(name: Any) -> bool:
    """Return whether a base model's name can be the id of a repository; a directory's path cannot."""
    if not isinstance(name, str) or not name or os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- metadata


def update_metadata(data: ModelCardData, adapter: SavedAdapter) -> None:
    """Set the library, the base model and the task, and add the method's tags, in the metadata of a card."""
    data.library_name = "peft"
    named = data.base_model if isinstance(data.base_model, list) else [data.base_model]
    if is_hub_id(adapter.base_model) and adapter.base_model not in named:
        data.base_model = adapter.base_model
    elif not all(map(is_hub_id, named)):
        # PEFT writes the directory of a local base model here. The Hub refuses such a card, and a path is private.
        data.base_model = None
    tags = {tag for tag in data.tags or [] if _is_public(tag)}
    data.tags = sorted(tags.union(TAGS))
    if not data.pipeline_tag and adapter.task_type in TASKS:
        data.pipeline_tag = TASKS[adapter.task_type][1]
    if data.get("widget") is None and data.pipeline_tag in WIDGETS:
        data["widget"] = [dict(WIDGETS[data.pipeline_tag])]


def _is_public(tag: str) -> bool:
    prefix = "base_model:adapter:"
    return not tag.startswith(prefix) or is_hub_id(tag.removeprefix(prefix))


# ---------------------------------------------------------------------------------------------------- the section


def with_section(text: str, section: str) -> str:
    """Replace the section in a card's text, or insert it before the first heading below the title."""
    newline = "\r\n" if "\r\n" in text else "\n"
    blank_line = newline * 2
    section = section.replace("\n", newline)
    found = _SECTION.search(text)
    if found:
        return text[: found.start()] + section + text[found.end() :]
    position = _first_heading_below_title(text)
    before, after = text[:position].rstrip(), text[position:]
    return (before + blank_line if before else "") + section + (blank_line + after if after.strip() else newline)


def _first_heading_below_title(text: str) -> int:
    """Return where the first heading of the second level or deeper starts, or the length of the text."""
    position, in_code, in_comment = 0, False, False
    for line in text.splitlines(keepends=True):
        if not in_comment and line.lstrip().startswith(("```", "~~~")):
            in_code = not in_code
        elif not in_code:
            in_comment = in_comment or "<!--" in line
            if not in_comment and re.match(r"#{2,6} ", line):
                return position
            in_comment = in_comment and "-->" not in line
        position += len(line)
    return position


def how_to_use(
    adapters: list[SavedAdapter], repo_id: str | None, directory_name: str, training: Training = NOTHING_KNOWN
) -> str:
    """
    Return the section of a card that says how to load and serve adapters, and what they are.

    Args:
        adapters (`list[SavedAdapter]`): The adapters.
        repo_id (`str`, *optional*): The repository that they are in; `None` if it is not known.
        directory_name (`str`): The name of the directory that they are in, which stands for the repository then.
        training (`Training`): What is known of their training.
    """
    first = adapters[0]
    base_model = f"`{first.base_model}`" if is_hub_id(first.base_model) else "its base model"
    introduction = (
        f"A prefix-tuning adapter for {base_model}, made with [peft-prefix-plus]"
        "(https://pypi.org/project/peft-prefix-plus/), a plugin for PEFT: install it and import it before loading."
    )
    parts = [
        SECTION_START,
        "## How to use",
        introduction,
        "```sh\npip install peft-prefix-plus\n```",
        _python(_loading_lines(adapters, repo_id, directory_name)),
    ]
    if is_hub_id(first.base_model):  # only then can PEFT find the base model on another machine
        parts += ["Or with the base model in one step:", _python(_auto_loading_lines(first, repo_id, directory_name))]
    parts += [*_serving(adapters, repo_id, directory_name), *_without_package(adapters, repo_id, directory_name)]
    parts += [_settings_table(adapters), *_training_table(training), SECTION_END]
    return "\n\n".join(parts)


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


IMPORT_LINE = "import peft_prefix_plus  # noqa: F401 (registers the method PREFIX_PLUS with PEFT)"


def _loading_lines(
    adapters: list[SavedAdapter], repo_id: str | None, directory_name: str, of_peft: bool = False
) -> list[str]:
    """The lines that load adapters, as this package has them or as PEFT alone does."""
    first = adapters[0]
    module, class_name = _base_model_class(first)
    source, comment = _source(repo_id, directory_name)
    lines = [
        *([] if of_peft else [IMPORT_LINE]),
        "from peft import PeftModel",
        f"from {module} import {class_name}",
        "",
        f"base_model = {class_name}.from_pretrained({_base_model_arguments(first)}){_base_model_comment(first)}",
    ]
    for adapter in adapters:
        subfolder = adapter.prefix_tuning if of_peft else adapter.subfolder
        where = "" if subfolder is None else f", subfolder={_quoted(subfolder)}"
        named = "" if adapter.subfolder is None else f", adapter_name={_quoted(adapter.name)}"
        if adapter is first:
            lines.append(f"model = PeftModel.from_pretrained(base_model, {source}{named}{where}){comment}")
        else:
            lines.append(f"model.load_adapter({source}{named}{where})")
    return lines


def _auto_loading_lines(adapter: SavedAdapter, repo_id: str | None, directory_name: str) -> list[str]:
    suffix = TASKS[adapter.task_type][0] if adapter.task_type in TASKS else ""
    source, comment = _source(repo_id, directory_name)
    where = "" if adapter.subfolder is None else f", subfolder={_quoted(adapter.subfolder)}"
    return [
        IMPORT_LINE,
        f"from peft import AutoPeftModel{suffix}",
        "",
        f"model = AutoPeftModel{suffix}.from_pretrained({source}{where}){comment}",
    ]


def _serving(adapters: list[SavedAdapter], repo_id: str | None, directory_name: str) -> list[str]:
    """How to serve what vLLM takes."""
    served = [adapter for adapter in adapters if adapter.served and adapter.subfolder is None]
    if not served:
        return []
    source, base_model = repo_id or directory_name, served[0].base_model or "base-model"
    base_model = base_model if is_hub_id(base_model) else os.path.basename(os.path.normpath(base_model))
    name = re.sub(r"[^\w.-]+", "-", source.rpartition("/")[2])
    command = ["prefix-plus", "serve", "--model", base_model, "--adapter", f"{name}={source}"]
    revision = served[0].config.get("revision")
    command += ["--", "--revision", revision] if revision else []
    lines = ['pip install "peft-prefix-plus[serve]"', shlex.join(command)]
    return [
        f"An OpenAI-compatible server (vLLM) with the adapter as the model `{name}`:",
        "\n".join(["```sh", *lines, "```"]),
    ]


def _without_package(adapters: list[SavedAdapter], repo_id: str | None, directory_name: str) -> list[str]:
    """How to load an adapter where this package is not installed."""
    found = [adapter for adapter in adapters if adapter.prefix_tuning]
    if found:
        lines = _loading_lines(found, repo_id, directory_name, of_peft=True)
        return ["Without this package, as PEFT's own `PREFIX_TUNING`:", _python(lines)]
    if any(adapter.served == "cache" for adapter in adapters):
        save = "model.save_pretrained(directory, include_prefix_tuning=True)"
        return [f"Without this package PEFT loads the adapter as `PREFIX_TUNING`, if it is saved with `{save}`."]
    return []


def _training_table(training: Training) -> list[str]:
    rows = []
    if training.datasets:
        rows.append(("Data", ", ".join(f"`{name}`" for name in training.datasets)))
    if training.length:
        rows.append(("Length", training.length))
    rows += [(f"`{name}`", f"{value:.4g}") for name, value in sorted(training.metrics.items())]
    if not rows:
        return []
    return ["\n".join(["| Training | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])]


def _source(repo_id: str | None, directory_name: str) -> tuple[str, str]:
    """Return what to load an adapter from, and the comment that this needs."""
    if repo_id is not None:
        return _quoted(repo_id), ""
    return _quoted(directory_name), "  # this directory, or the id of its repository on the Hub"


def _base_model_class(adapter: SavedAdapter) -> tuple[str, str]:
    """Return the module and the name of the class that loads the base model."""
    if adapter.task_type in TASKS:
        suffix = TASKS[adapter.task_type][0]
        return "transformers", "AutoModel" + ("" if suffix == "ForFeatureExtraction" else suffix)
    mapping = adapter.config.get("auto_mapping") or {}
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    if not library or not name:
        return "transformers", "AutoModel"
    return ("transformers" if library.startswith("transformers.") else library), name


def _base_model_arguments(adapter: SavedAdapter) -> str:
    base_model = adapter.base_model or "base-model"
    name = base_model if is_hub_id(base_model) else os.path.basename(os.path.normpath(base_model))
    revision = adapter.config.get("revision")
    return _quoted(name) + (f", revision={_quoted(revision)}" if revision else "")


def _base_model_comment(adapter: SavedAdapter) -> str:
    comments = []
    if not is_hub_id(adapter.base_model):
        comments.append("the base model's directory or id")
    if adapter.task_type in LABELLED_TASKS:
        comments.append("add num_labels=… if there are not two labels")
    return f"  # {'; '.join(comments)}" if comments else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _settings_table(adapters: list[SavedAdapter]) -> str:
    columns = [_settings(adapter.config) for adapter in adapters]
    names = ["Value"] if len(adapters) == 1 else [f"`{adapter.name}`" for adapter in adapters]
    settings = [setting for setting in columns[0] if any(column[setting] is not None for column in columns)]
    adapters_of: dict[str, list[str | None]] = {
        "Base model": [_base_model_cell(adapter) for adapter in adapters],
        "Form": [adapter.form for adapter in adapters],
        "Runs in": [adapter.runs_in for adapter in adapters],
        "Trained parameters": [
            None if adapter.num_parameters is None else f"{adapter.num_parameters:,}" for adapter in adapters
        ],
    }
    rows = [["Setting", *names], ["---"] * (len(names) + 1)]
    rows += [[name, *(cell or "–" for cell in cells)] for name, cells in adapters_of.items() if any(cells)]
    rows += [[setting, *(column[setting] or "–" for column in columns)] for setting in settings]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _base_model_cell(adapter: SavedAdapter) -> str | None:
    if not is_hub_id(adapter.base_model):
        return None
    revision = adapter.config.get("revision")
    return f"`{adapter.base_model}`" + (f", revision `{revision}`" if revision else "")


def _settings(config: dict[str, Any]) -> dict[str, str | None]:
    """Return an adapter's settings as the card shows them; `None` for what is as usual."""
    reparameterization = config.get("reparameterization")
    encoder = None if reparameterization in ("none", "log") else f"width {config.get('encoder_dim')}"
    if reparameterization == "mlp":
        hidden = config.get("encoder_hidden_size") or config.get("encoder_dim")
        encoder = f"{encoder}, hidden width {hidden}, {config.get('encoder_activation')}"
    return {
        "Virtual tokens": str(config.get("num_virtual_tokens")),
        "Reparameterization": f"`{reparameterization}`" + (f" ({encoder})" if encoder else ""),
        "Sharing between layers": None if encoder is None else f"`{config.get('sharing')}`",
        "Layers": _listed(config.get("layers_to_transform")) or "all",
        "Attention modules": _listed(config.get("target_modules")),
        "Attention modules left out": _listed(config.get("exclude_modules")),
        "Positions": None if config.get("position_free") is None else "free" if config["position_free"] else "fixed",
        "Other trained modules": _listed(config.get("modules_to_save")),
    }


def _listed(value: Any) -> str | None:
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"`{item}`" if isinstance(item, str) else str(item) for item in values)
