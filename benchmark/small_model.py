"""A small random language model for studies that need hundreds of steps and several seeds in minutes: two
layers and a vocabulary of 4,096 learnt from chitchat's training replies.

    python benchmark/small_model.py --out runs/small        # then afd.py teaches it human replies
"""

from __future__ import annotations

from pathlib import Path

import record  # noqa: F401  makes the checkout's modules importable
import torch
import transformers
import tyro

from cleanalign.data import load_rows
from cleanalign.models import load_tokenizer

VOCABULARY = 4096
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # SmolLM2's without its system prompt


def main(out: Path, seed: int = 0) -> None:
    """Write the folder.

    Args:
        out: a folder that is not there yet.
        seed: of the weights.
    """
    rows, _ = load_rows("chitchat", ("response",))
    large = load_tokenizer("smollm2-135m")
    tokenizer = large.train_new_from_iterator((row.response for row in rows), VOCABULARY, show_progress=False)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    out.mkdir(parents=True)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(weight.numel() for weight in model.parameters()):,} weights")


if __name__ == "__main__":
    tyro.cli(main)
