"""Random weights, a stand-in tokenizer and random text at a real model's sizes: what `--dry-run` and the
benchmarks run on.

The sizes are those of the published config.json files. Nothing is downloaded.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import torch
import transformers

PREFIX = "random:"  # `--model random:NAME` is what a dry run makes of `--model NAME`

_LLAMA = dict(
    attention_bias=False, hidden_act="silu", bos_token_id=None, eos_token_id=None, pad_token_id=None
)
CONFIGS = {  # name: (transformers' config class, published sizes)
    "llama3-8b": (
        "LlamaConfig",
        dict(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            **_LLAMA,
        ),
    ),
    "zephyr-7b": (  # Mistral-7B
        "MistralConfig",
        dict(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            sliding_window=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        ),
    ),
    "gemma-2b": (
        "GemmaConfig",
        dict(
            vocab_size=256000,
            hidden_size=2048,
            intermediate_size=16384,
            num_hidden_layers=18,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=256,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
    ),
    "phi3-mini": (
        "Phi3Config",
        dict(
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            sliding_window=2047,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
    ),
    "pythia-1b-tldr": (
        "GPTNeoXConfig",
        dict(
            vocab_size=50304,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=8,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        ),
    ),
    "smollm2-135m": (
        "LlamaConfig",
        dict(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            **_LLAMA,
        ),
    ),
    "gpt2": (
        "GPT2Config",
        dict(
            vocab_size=50257,
            n_embd=768,
            n_layer=12,
            n_head=12,
            n_positions=1024,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
    ),
}


def known(name: str) -> bool:
    """Whether `config` has sizes for `name`: one of `CONFIGS`, or a model folder."""
    return name in CONFIGS or (Path(name) / "config.json").is_file()


def config(name: str) -> transformers.PretrainedConfig:
    """The published configuration of `name`, or that of a
    model folder; every dropout 0, and nothing ends a reply."""
    if name in CONFIGS:
        kind, sizes = CONFIGS[name]
        made = getattr(transformers, kind)(**sizes)
    else:
        made = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    for key, value in vars(made).items():
        if "drop" in key and isinstance(value, float):
            setattr(made, key, 0.0)
    return made


def model(
    name: str, dtype: torch.dtype, device: torch.device, attention: str, seed: int = 0
) -> transformers.PreTrainedModel:
    """A causal language model in the shapes of `name` with random weights, made on `device` in `dtype`: no
    copy elsewhere, no float32 one."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        made = transformers.AutoModelForCausalLM.from_config(
            config(name), dtype=dtype, attn_implementation=attention
        )
    made.generation_config.eos_token_id = None
    return made


def meta_model(name: str) -> transformers.PreTrainedModel:
    """The model without its weights: every tensor has a shape and no memory."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config(name))


class Tokenizer:
    """One token a word: the word `w17` is the id 17. No special tokens and no chat template, so every length
    is exactly what was asked for."""

    chat_template = None
    eos_token_id = pad_token_id = -1  # no sampled token is ever −1: replies run to their greatest length

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def __call__(self, text: str, add_special_tokens: bool = True):
        return transformers.BatchEncoding(
            {"input_ids": [int(word[1:]) % self.vocabulary for word in text.split()]}
        )

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The words of `ids`."""
        return " ".join(f"w{i}" for i in ids)


def text(words: int, *seed: int | str) -> str:
    """Random text of `words` words for `Tokenizer`, a function of `seed`."""
    draw = random.Random(repr(seed))
    return " ".join(f"w{draw.randrange(5, 2**20)}" for _ in range(words))


def coin(reply: str) -> float:
    """A number in [0, 1) that only looks random: a function of the reply."""
    return zlib.crc32(reply.encode()) / 2**32
