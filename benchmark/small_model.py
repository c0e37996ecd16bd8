"""A small random language model with SmolLM2's tokenizer and chat template, for studies that need hundreds of
steps and several seeds in minutes.

    python benchmark/small_model.py --out runs/small        # then afd.py teaches it human replies
"""

from __future__ import annotations

from pathlib import Path

import record  # noqa: F401  makes the checkout's modules importable
import torch
import transformers
import tyro

from cleanalign.models import load_tokenizer


def main(out: Path, seed: int = 0) -> None:
    """Write the folder.

    Args:
        out: a folder that is not there yet.
        seed: of the weights.
    """
    tokenizer = load_tokenizer("smollm2-135m")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
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
