"""Train a prefix with the Trainer, stop, go on from the checkpoint, and generate.

It runs offline in seconds, on a tiny frozen model with random weights whose prefix learns to make it repeat one token:

    python examples/train_with_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from peft_prefix_plus import PrefixPlusConfig


VOCABULARY, LENGTH, ANSWER = 32, 8, 7


def make_base() -> PreTrainedModel:
    """Make the frozen model. With a model of your own: `AutoModelForCausalLM.from_pretrained("...")`."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def make_rows() -> list[dict[str, list[int]]]:
    """Make the training data: any first token, then the same one again and again."""
    sequences = [[start, *[ANSWER] * (LENGTH - 1)] for start in range(VOCABULARY)]
    return [{"input_ids": sequence, "labels": sequence} for sequence in sequences]


def train(model: PeftModel, output_dir: str, max_steps: int, resume: bool) -> Trainer:
    """Train up to `max_steps`, from the last checkpoint in `output_dir` if `resume`."""
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=max_steps,
        save_steps=20,
        logging_steps=20,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=make_rows())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main() -> None:
    config = PrefixPlusConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, reparameterization="mlp")
    with tempfile.TemporaryDirectory() as output_dir:
        model = get_peft_model(make_base(), config)
        model.print_trainable_parameters()
        train(model, output_dir, max_steps=20, resume=False)

        # another process would start here
        model = get_peft_model(make_base(), config)
        trainer = train(model, output_dir, max_steps=60, resume=True)

        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print("loss:", " → ".join(f"{float(loss):.2f}" for loss in losses))

        loaded = PeftModel.from_pretrained(make_base(), f"{output_dir}/checkpoint-60").eval()
        prompt = torch.tensor([[3]])
        generated = loaded.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
        print("generated:", generated[0].tolist())


if __name__ == "__main__":
    main()
