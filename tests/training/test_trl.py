"""TRL's trainers with the default configuration: those of `examples/train_with_trl.py`, and each of the others."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from peft_prefix_plus import PrefixPlusConfig


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    pytest.importorskip("trl")
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "train_with_trl.py"))


def test_supervised_fine_tuning_learns_what_the_assistant_says(example: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(example["make_base"](), PrefixPlusConfig(task_type="CAUSAL_LM"))
    first, *_, last = example["supervise"](model, example["make_tokenizer"](), str(tmp_path), max_steps=10)
    assert last < 0.5 * first


def test_preference_optimization_starts_at_the_reference(example: dict[str, Any], tmp_path: Path) -> None:
    losses = example["prefer"](example["make_base"](), example["make_tokenizer"](), str(tmp_path), max_steps=4)
    # the reference is the model without the prefix, and a new prefix hardly changes it: both answers gain nothing, log 2
    assert losses[0] == pytest.approx(math.log(2), abs=0.005)
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------ each trainer


def packed(example: dict[str, Any], arguments: dict[str, Any]) -> Any:
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(packing=True, max_length=32, **arguments)
    return SFTTrainer, settings, example["make_chats"](), {}


def kto(example: dict[str, Any], arguments: dict[str, Any]) -> Any:
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer, KTOConfig(**arguments), example["make_preferences"](), {}


def orpo(example: dict[str, Any], arguments: dict[str, Any]) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig(max_length=32, **arguments), example["make_preferences"](), {}


def says_blue(completions: list[Any], **_: Any) -> list[float]:
    return [float("blue" in str(completion)) for completion in completions]


def grpo(example: dict[str, Any], arguments: dict[str, Any]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(num_generations=4, max_completion_length=4, beta=0.1, **arguments)
    return GRPOTrainer, settings, example["make_preferences"]().select_columns("prompt"), {"reward_funcs": says_blue}


def rloo(example: dict[str, Any], arguments: dict[str, Any]) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    settings = RLOOConfig(num_generations=4, max_completion_length=4, beta=0.1, **arguments)
    return RLOOTrainer, settings, example["make_preferences"]().select_columns("prompt"), {"reward_funcs": says_blue}


TRAINERS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "SFT, packing": packed,
    "KTO": kto,
    "ORPO": orpo,
    "GRPO": grpo,
    "RLOO": rloo,
}


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_a_trainer_trains_the_prefix_alone_and_saves_what_peft_loads(
    name: str, example: dict[str, Any], tmp_path: Path
) -> None:
    arguments = example["arguments_of"](str(tmp_path / "run"), 3)
    trainer_class, settings, data, more = TRAINERS[name](example, arguments)
    base = example["make_base"]()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = trainer_class(
        model=base,
        args=settings,
        train_dataset=data,
        processing_class=example["make_tokenizer"](),
        peft_config=PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        **more,
    )
    before = adapter_of(trainer.model)
    trainer.train()
    after = adapter_of(trainer.model)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    if name in ("GRPO", "RLOO"):
        # a new prefix hardly changes the model: no divergence from it yet
        first = next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
        assert abs(first) <= 0.005

    trainer.save_model(str(tmp_path / "adapter"))
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    ids = torch.tensor([[4, 5, 6, 7, 3, 1]])
    state = trained.get_base_model().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    loaded = PeftModel.from_pretrained(example["make_base"](), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)
        with trained.disable_adapter(), loaded.disable_adapter():
            assert torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_a_reward_model_is_trained_with_its_head(example: dict[str, Any], tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    def make_base() -> LlamaForSequenceClassification:
        config: LlamaConfig = example["make_base"]().config
        config.num_labels = 1
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config)

    trainer = RewardTrainer(
        model=make_base(),
        args=RewardConfig(**example["arguments_of"](str(tmp_path / "run"), 8)),
        train_dataset=example["make_preferences"](),
        processing_class=example["make_tokenizer"](),
        peft_config=PrefixPlusConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    )
    trainer.train()
    first, *_, last = example["losses"](trainer)
    assert last < 0.9 * first
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "adapter").eval()
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    ids = torch.tensor([[4, 5, 6, 7, 3, 1]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)
