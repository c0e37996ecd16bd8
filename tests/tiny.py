"""Tiny random models, data and judges, made on the spot, in exactly the layout the hub has."""

import json
from pathlib import Path

import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

WORDS = (
    "good bad fine the a cat dog sun moon sea you me we see like is was and or not very now then here there "
    "why how what yes no"
).split()
CHAT = (  # like SmolLM's, in words
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


def tokenizer(chat: bool = True, extra: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """One token a word; `</s>` ends a turn; with `chat`, a chat template."""
    words = [
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
        ":",
        "user",
        "assistant",
        "system",
        "Human",
        "Assistant",
        *WORDS,
        *extra,
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT if chat else None
    return fast


def ordinary_config(attention: str) -> transformers.LlamaConfig:
    """A small Llama of the proportions that large ones have."""
    return transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation=attention,
    )


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


def pairrm_folder(
    path: Path,
    original: bool = False,
    lengths: tuple[int, int] = (24, 12),
    dtype: torch.dtype = torch.float32,
) -> str:
    """PairRM with random weights, in the layout of llm-blender/PairRM-hf or the original's; returns its path.

    The tokenizer has one token a word, the normaliser's kind the real one has (NFKC), and the four marks
    after its vocabulary.
    """
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", ":", "USER:", "Assistant:", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    inner.add_tokens(["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"])
    config = transformers.DebertaV2Config(
        vocab_size=inner.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,  # shorter than the rows: relative positions fall into buckets
        position_buckets=4,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    weights = {
        f"pretrained_model.{key}": tensor
        for key, tensor in transformers.DebertaV2Model(config).state_dict().items()
    }
    weights |= {"head_layer.1.weight": torch.randn(16, 32) / 4, "head_layer.1.bias": torch.randn(16)}
    weights |= {"head_layer.4.weight": 2 * torch.randn(1, 16), "head_layer.4.bias": torch.randn(1)}
    weights = {key: tensor.to(dtype).contiguous() for key, tensor in weights.items()}
    path.mkdir()
    if original:  # its config describes a ranker and names the base model, whose vocabulary is another
        transformers.DebertaV2Config.from_dict({**config.to_dict(), "vocab_size": 7}).save_pretrained(
            path / "base"
        )
        ranker = {
            "ranker_type": "pairranker",
            "model_type": "deberta",
            "model_name": str(path / "base"),
            "n_tasks": 1,
        }
        ranker |= {"source_maxlength": lengths[0], "candidate_maxlength": lengths[1]}
        (path / "config.json").write_text(json.dumps(ranker))
    else:
        marks = {
            "source_prefix_id": "<|source|>",
            "cand1_prefix_id": "<|candidate1|>",
            "cand2_prefix_id": "<|candidate2|>",
        }
        extra = {key: inner.token_to_id(mark) for key, mark in marks.items()}
        extra |= {
            "cand_prefix_id": inner.token_to_id("<|candidate|>"),
            "sep_token_id": 2,
            "n_tasks": 1,
            "drop_out": 0.05,
        }
        transformers.DebertaV2Config.from_dict({**config.to_dict(), **extra}).save_pretrained(path)
    inner.save(str(path / "tokenizer.json"))
    safetensors.torch.save_file(weights, path / "model.safetensors")
    return str(path)


def prompts_file(path: Path, rows: int = 80, pairs: bool = False, responses: bool = False) -> str:
    """A JSONL of distinct short prompts, with chosen and rejected responses if `pairs`, with demonstrations
    full of good words if `responses`."""
    lines = []
    for i in range(rows):
        prompt = f"{WORDS[i % 30]} {WORDS[(i // 30) % 30]} {WORDS[(i * 7) % 30]}"
        row = {"prompt": prompt}
        if pairs:
            row |= {"chosen": f"good {WORDS[i % 30]}", "rejected": f"bad {WORDS[(i + 5) % 30]}"}
        if responses:
            row["response"] = " ".join(
                ["good", "sun", "like", "we", "fine", "sea"][(i + j) % 6] for j in range(2 + i % 4)
            )
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

def one_reward(prompts, replies):
    return [0.5]

def endless(prompts, replies):
    return [float("inf") for _ in replies]

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
