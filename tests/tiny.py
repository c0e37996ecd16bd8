"""Tiny random models, data and judges, made on the spot, in exactly the layout the hub has."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = "good bad fine the a cat dog sun moon sea you me we see like is was and or not very now then here there why how what yes no".split()
CHAT = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<s> assistant : {% endif %}"  # like SmolLM's, in words


def tokenizer(chat: bool = True, extra: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """One token a word; `</s>` ends a turn; with `chat`, a chat template."""
    words = ["<pad>", "<unk>", "<s>", "</s>", ":", "user", "assistant", "system", "Human", "Assistant", *WORDS, *extra]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT if chat else None
    return fast


def model(vocabulary: int, seed: int = 0, **overrides) -> transformers.LlamaForCausalLM:
    """A two-layer Llama with random weights, grouped-query attention and tied embeddings."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        initializer_range=0.2,
        **overrides,
    )
    made = transformers.LlamaForCausalLM(config).eval()
    made.generation_config.eos_token_id = [3]
    return made


def folder(path: Path, chat: bool = True, seed: int = 0, **overrides) -> str:
    """Save a tiny model with its tokenizer as a Hugging Face folder; returns its path."""
    words = tokenizer(chat)
    words.save_pretrained(path)
    model(len(words), seed, **overrides).save_pretrained(path)
    return str(path)


def prompts_file(path: Path, rows: int = 80, pairs: bool = False, responses: bool = False) -> str:
    """A JSONL of distinct short prompts, with chosen and rejected responses if `pairs`, with demonstrations full of good words if `responses`."""
    lines = []
    for i in range(rows):
        prompt = f"{WORDS[i % 30]} {WORDS[(i // 30) % 30]} {WORDS[(i * 7) % 30]}"
        row = {"prompt": prompt}
        if pairs:
            row |= {"chosen": f"good {WORDS[i % 30]}", "rejected": f"bad {WORDS[(i + 5) % 30]}"}
        if responses:
            row["response"] = " ".join(["good", "sun", "like", "we", "fine", "sea"][(i + j) % 6] for j in range(2 + i % 4))
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


JUDGE = """
import math

GOOD = {"good", "fine", "yes", "like", "sun", "sea", "we"}

def more_good(prompts, a, b):
    count = lambda text: sum(word in GOOD for word in text.split())
    return [1 / (1 + math.exp(-2 * (count(x) - count(y)))) for x, y in zip(a, b)]

def goodness(prompts, replies):
    return [float(sum(word in GOOD for word in text.split())) for text in replies]

def wrong_length(prompts, a, b):
    return [0.5]

def outside(prompts, a, b):
    return [1.5 for _ in a]

def not_a_number(prompts, a, b):
    return [float("nan") for _ in a]

def raises(prompts, a, b):
    return [1 / 0 for _ in a]

def always_tied(prompts, a, b):
    return [0.5 for _ in a]

def first_wins(prompts, a, b):
    return [1.0 for _ in a]
"""


def judge_file(path: Path) -> str:
    """A file of judge functions, good and bad; returns its path."""
    path.write_text(JUDGE)
    return str(path)
