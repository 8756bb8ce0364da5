"""Put a document into a prefix, stop, go on, and compare with the document in the context.

It runs offline in seconds, on a tiny frozen model with random weights whose prefix learns to make it answer as if it had read the text:

    python examples/distill_document.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from peft_prefix_plus import PrefixPlusConfig, SelfStudy, distill


DOCUMENT = "the ferry leaves at nine . the captain is anna . the dog of the captain is old . the boat is blue ."
SPECIAL = ["<end>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of words with a chat template. A chat model has one: `AutoTokenizer.from_pretrained("...")`."""
    words = [*SPECIAL, "?", *dict.fromkeys(DOCUMENT.split())]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", additional_special_tokens=SPECIAL[1:]
    )
    fast.chat_template = TEMPLATE
    return fast


def make_base(vocabulary: int) -> LlamaForCausalLM:
    """Make the frozen model. With a model of your own: `AutoModelForCausalLM.from_pretrained("...")`."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.2, eos_token_id=0, **sizes)).eval()


def distances(
    model: Any, tokenizer: PreTrainedTokenizerFast, base: LlamaForCausalLM, question: str
) -> tuple[float, float]:
    """How far the next token's probabilities are from the base model's with the document: without it, and with the prefix."""
    asked = [{"role": "user", "content": question}]
    chats = [[{"role": "system", "content": DOCUMENT}, *asked], asked]
    options: dict[str, Any] = dict(add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with_document, without = (tokenizer.apply_chat_template(chat, **options) for chat in chats)
    with torch.no_grad():
        wanted = base(input_ids=with_document).logits[0, -1].log_softmax(-1)
        found = [each(input_ids=without).logits[0, -1].log_softmax(-1) for each in (base, model)]
    divergences = [torch.nn.functional.kl_div(each, wanted, log_target=True, reduction="sum").item() for each in found]
    return divergences[0], divergences[1]


def main() -> None:
    tokenizer = make_tokenizer()
    base = make_base(len(tokenizer))
    config = PrefixPlusConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=8, decoupled=False, gating=False, position_free=False
    )
    study = SelfStudy(num_conversations=32, piece_tokens=16, max_prompt_tokens=6, max_answer_tokens=12)
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = TrainingArguments(
            output_dir=output_dir,
            max_steps=120,
            save_steps=40,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
        )
        # the same call again goes on where a run that was killed has stopped
        model = distill(
            make_base(len(tokenizer)), tokenizer, DOCUMENT, args=arguments, config=config, self_study=study
        ).eval()
        without, with_prefix = distances(model, tokenizer, base, "the captain is")
        print(
            f"distance from the answer with the document: {without:.3f} without it, {with_prefix:.3f} with the prefix"
        )


if __name__ == "__main__":
    main()
