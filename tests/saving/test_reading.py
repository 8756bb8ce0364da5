"""Whatever reads an adapter's files says which one it cannot read, and raises one kind of error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import prefixed, tiny_model

from peft_prefix_plus import PrefixPlusConfig, from_adapterhub, from_prefix_tuning, load_adapters, plot_training_curve
from peft_prefix_plus.saving.files import update_model_card
from peft_prefix_plus.saving.reading import read_fields
from peft_prefix_plus.serving.folding import fold
from peft_prefix_plus.training.checkpoints import checkpoints


CONFIG = "adapter_config.json"

NO_OBJECTS = ["[]", "null", "3", '"text"', "{", "[" * 100_000, "9" * 5000, "\ud800"]
NO_CONFIGURATIONS = [
    *NO_OBJECTS,
    '{"peft_type": []}',
    '{"config": {}}',
    '{"peft_type": "NOTHING"}',
    '{"peft_type": "PREFIX_PLUS", "num_virtual_tokens": "20"}',
    '{"peft_type": "PREFIX_PLUS", "task_type": "NOTHING"}',
]

READERS: dict[str, Callable[[str], Any]] = {
    "load_adapters": lambda adapter: load_adapters(tiny_model(), adapter),
    "PrefixPlusConfig": PrefixPlusConfig.from_pretrained,
    "load_adapter": lambda adapter: prefixed(tiny_model(), task_type="CAUSAL_LM").load_adapter(adapter, "default"),
    "from_prefix_tuning": lambda adapter: from_prefix_tuning(adapter, tiny_model()),
    "from_adapterhub": lambda adapter: from_adapterhub(adapter, tiny_model()),
    "fold": lambda adapter: fold(adapter, None),  # type: ignore[arg-type]
}


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode(errors="surrogatepass"))  # half of a surrogate pair is no UTF-8


@pytest.mark.parametrize("text", NO_CONFIGURATIONS, ids=lambda text: text[:40])
@pytest.mark.parametrize("reader", READERS)
def test_a_broken_configuration_is_named_by_all_that_read_it(reader: str, text: str, tmp_path: Path) -> None:
    prefixed(tiny_model(), task_type="CAUSAL_LM").save_pretrained(tmp_path)
    write(tmp_path / CONFIG, text)
    with pytest.raises(ValueError, match=CONFIG):
        READERS[reader](str(tmp_path))


@pytest.mark.parametrize("reader", READERS)
def test_a_repository_that_cannot_be_reached_is_named_by_all_that_read_it(reader: str) -> None:
    with pytest.raises(ValueError, match="'user/nothing'"):
        READERS[reader]("user/nothing")  # the tests run offline


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: text[:40])
def test_only_an_object_has_fields(text: str, tmp_path: Path) -> None:
    write(tmp_path / "a.json", text)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_fields(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json"):
        plot_training_curve(tmp_path / "a.json")


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: text[:40])
def test_a_card_is_written_whatever_lies_beside_the_adapter(text: str, tmp_path: Path) -> None:
    model = prefixed(tiny_model(), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    for folder, name in (("other", CONFIG), ("checkpoint-1", "trainer_state.json")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, text)
    card = tmp_path / "README.md"
    expected = card.read_text(encoding="utf-8")
    update_model_card(str(tmp_path))
    assert card.read_text(encoding="utf-8") == expected
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert checkpoints(tmp_path, complete_only=True) == []
