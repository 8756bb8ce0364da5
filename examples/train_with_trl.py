"""Train a prefix with TRL: supervised fine-tuning on conversations, and direct preference optimization.

It needs `pip install "peft-prefix-plus[trl]"` and runs offline in seconds, on a tiny frozen model with random weights:

    python examples/train_with_trl.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_prefix_plus import PrefixPlusConfig


WORDS = ["<end>", "<says>", "user", "assistant", "what", "is", "the", "sky", "grass", "snow", "blue", "green", "white"]
COLORS = {"sky": "blue", "grass": "green", "snow": "white"}
# {% generation %} marks what the assistant says, for assistant_only_loss
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' <says> ' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + ' <end>' }}{% endgeneration %}{{ ' ' }}{% else %}"
    "{{ message.content + ' <end> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant <says> ' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of words. With a model of your own: `AutoTokenizer.from_pretrained("...")`."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends: dict[str, Any] = dict(eos_token="<end>", pad_token="<end>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **ends)


def make_base() -> PreTrainedModel:
    """Make the frozen model. With a model of your own: `AutoModelForCausalLM.from_pretrained("...")`."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    ends: dict[str, Any] = dict(eos_token_id=0, pad_token_id=0, bos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), initializer_range=0.2, **sizes, **ends))


def question(thing: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"what is the {thing}"}]


def answer(color: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": color}]


def make_chats() -> Dataset:
    return Dataset.from_list([{"messages": question(thing) + answer(color)} for thing, color in COLORS.items()] * 8)


def make_preferences() -> Dataset:
    """Make pairs of answers: the sky's color is liked, and no other is."""
    rows = [
        {"prompt": question(thing), "chosen": answer("blue"), "rejected": answer(color)}
        for thing, color in COLORS.items()
        if color != "blue"
    ]
    return Dataset.from_list(rows * 8)


def arguments_of(output_dir: str, max_steps: int) -> dict[str, Any]:
    return dict(
        output_dir=output_dir,
        max_steps=max_steps,
        learning_rate=5e-2,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        bf16=False,
    )


def losses(trainer: Any) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def supervise(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, output_dir: str, max_steps: int = 40
) -> list[float]:
    """Train on conversations, with the loss on what the assistant says; return the losses."""
    arguments = SFTConfig(assistant_only_loss=True, packing=False, **arguments_of(output_dir, max_steps))
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=make_chats(), processing_class=tokenizer)
    trainer.train()
    return losses(trainer)


def prefer(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, output_dir: str, max_steps: int = 20
) -> list[float]:
    """Train a new prefix on preferences; the reference is the same model without it. Return the losses."""
    config = PrefixPlusConfig(task_type="CAUSAL_LM")
    arguments = DPOConfig(**arguments_of(output_dir, max_steps))
    trainer = DPOTrainer(
        model=base,
        args=arguments,
        train_dataset=make_preferences(),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    return losses(trainer)


def main() -> None:
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as output_dir:
        model = get_peft_model(make_base(), PrefixPlusConfig(task_type="CAUSAL_LM"))
        first, *_, last = supervise(model, tokenizer, f"{output_dir}/sft")
        print(f"SFT loss: {first:.2f} → {last:.2f}")

        prompt = tokenizer.apply_chat_template(question("grass"), add_generation_prompt=True, return_tensors="pt")
        generated = model.eval().generate(**prompt, max_new_tokens=3, do_sample=False)
        print("what is the grass:", tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :]))

        first, *_, last = prefer(make_base(), tokenizer, f"{output_dir}/dpo")
        print(f"DPO loss: {first:.4f} → {last:.4f}")


if __name__ == "__main__":
    main()
