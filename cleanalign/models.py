"""Models: devices, loading, the parts of a causal language model, LoRA and references, the memory that rows
take.

Sections, in the order a run meets them:

    devices     where and in what precision to compute
    loading     a recipe name, hub id or folder becomes a policy and its tokenizer; hub errors
    parts       backbone and vocabulary projection, the ids that end a reply
    training    all weights or a LoRA adapter; the starting model beside it
    memory      how many rows can be decoded at once
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import signal
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint

from cleanalign import distributed, synthetic
from cleanalign.embedded import EMBEDDED_MODEL, embedded_model_folder
from cleanalign.errors import UserError, near, optional_import, require
from cleanalign.storage import read_json, replacing

HUB_MODELS = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "zephyr-7b": "HuggingFaceH4/mistral-7b-sft-beta",
    "phi3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "pythia-1b-tldr": "trl-lib/pythia-1b-deduped-tldr-sft",
    "gpt2": "openai-community/gpt2",
    "gemma-2b": "google/gemma-2b",
}

# --- devices ---


def resolve_device(device: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises `UserError` for a device this machine does not have."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    present = [name for name, here in available.items() if here]
    require(
        available[device], f"--device {device}: not present on this machine, which has {', '.join(present)}."
    )
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it (CUDA from Ampere on, CPUs with AMX or
    AVX512-BF16), else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        probes = [
            getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        ]
        fast = any(probe() for probe in probes if probe)
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def upload(x: torch.Tensor, device) -> torch.Tensor:
    """Host tensor `x` on `device`. To a GPU it goes by pinned memory: for a plain copy the host waits until
    all that it has launched is done."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def choose_attention(attention: str, device: torch.device, longest: int) -> str:
    """The attention backend for rows of up to `longest` tokens: `auto` is on a CPU eager for short rows,
    where it is fastest, and `blocks` for longer ones, elsewhere sdpa. `blocks` and `flex` leave out what
    siblings do not see of each other.

    Flash attention is no choice: it takes causal masks only, and `collate`'s rows, in which siblings do not
        see each other, are none. Raises `UserError` for flex without CUDA: torch trains with it there alone.
    """
    require(
        attention != "flex" or device.type == "cuda",
        f"--attention flex needs a CUDA device, this is {device.type}. Leave it at auto.",
    )
    if attention != "auto":
        return attention
    if device.type != "cpu":
        return "sdpa"
    return "eager" if longest <= 256 else "blocks"


def _flex(module, query, key, value, attention_mask, **kwargs):
    """FlexAttention under a mask of blocks, which rows with siblings have (`attention_mask`); sdpa under any
    other, as when prompts are read."""
    way = "flex_attention" if isinstance(attention_mask, BlockMask) else "sdpa"
    return transformers.AttentionInterface()[way](module, query, key, value, attention_mask, **kwargs)


@dataclass
class Siblings:
    """The two parts of the mask of G rows, each a prompt of P places and K replies of T beside each other:
    numbers added to scores."""

    prompt: torch.Tensor  # (G, 1, P, P)
    reply: torch.Tensor  # (G·K, 1, T, P + T), of the prompt's and of its own places


def _blocks(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """Attention by two dense blocks where the mask knows of siblings (`attention_mask`), sdpa elsewhere: a
    prompt attends to itself, a reply to its prompt and itself. query (G, H, L, D), key and value (G, H_kv, L,
    D); returns (G, L, H, D).

    The maps of a layer are made anew for its backward pass, so that one layer's are held at a time.
    """
    siblings = getattr(attention_mask, "siblings", None)
    if siblings is None:
        others = dict(scaling=scaling, softcap=softcap, **kwargs)
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **others)
    settings = dict(scale=query.shape[-1] ** -0.5 if scaling is None else scaling, softcap=softcap)
    attend = partial(attend_by_blocks, siblings=siblings, **settings)
    if not torch.is_grad_enabled():
        return attend(query, key, value), None
    return checkpoint(attend, query, key, value, use_reentrant=False, preserve_rng_state=False), None


def attend_by_blocks(query, key, value, siblings: Siblings, scale: float, softcap: float | None):
    """`_blocks` under its mask."""
    G, H, _, D = query.shape
    P, T = siblings.prompt.shape[-1], siblings.reply.shape[-2]
    K = len(siblings.reply) // G

    def replies(x):  # (G, h, L, D) to (G·K, h, T, D)
        return x[:, :, P:].unflatten(2, (K, T)).transpose(1, 2).flatten(0, 1)

    def seen(x):  # (G, h, L, D) to (G·K, h, P + T, D)
        prompt = x[:, None, :, :P].expand(G, K, x.shape[1], P, D).flatten(0, 1)
        return torch.cat([prompt, replies(x)], 2)

    prompts = (x[:, :, :P] for x in (query, key, value))
    of_prompts = attend_densely(*prompts, siblings.prompt, scale, softcap)  # (G, H, P, D)
    of_replies = attend_densely(replies(query), seen(key), seen(value), siblings.reply, scale, softcap)
    of_replies = of_replies.view(G, K, H, T, D).permute(0, 1, 3, 2, 4).reshape(G, K * T, H, D)
    return torch.cat([of_prompts.transpose(1, 2), of_replies], 1)


def attend_densely(query, key, value, mask, scale: float, softcap: float | None) -> torch.Tensor:
    """Attention of (B, H, n, D) queries to (B, H_kv, m, D) keys and values, `mask` (B, 1, n, m) added to the
    scores; (B, H, n, D). The query heads that share a key head are its queries."""
    (B, H, n, D), (_, H_kv, m, _) = query.shape, key.shape
    scores = query.reshape(B, H_kv, H // H_kv * n, D) @ key.transpose(2, 3) * scale  # (B, H_kv, …, m)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(B, H_kv, H // H_kv, n, m) + mask[:, None]
    weights = F.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return (weights.flatten(2, 3) @ value).view(B, H, n, D)


for name, function in {"flex": _flex, "blocks": _blocks}.items():
    transformers.AttentionInterface.register(name, function)
    transformers.AttentionMaskInterface.register(name, transformers.AttentionMaskInterface()["sdpa"])


LOADED_WITH = {"blocks": "sdpa"}  # the backend that a model is loaded with, where it is another one


def set_attention(model, attention: str) -> None:
    """Let `model`, loaded with `LOADED_WITH`, attend by `attention`. An architecture that takes no backend of
    others (GPT-J, Falcon) keeps what it was loaded with; the numbers are the same to rounding."""
    if attention in LOADED_WITH and model._supports_attention_backend:
        model.set_attn_implementation(attention)


def attention_mask(transformer, allowed: torch.Tensor, replies: tuple[int, int]) -> torch.Tensor | BlockMask:
    """What `transformer` takes for `allowed`, (G, L, L) bool, which positions a position attends to, in rows
    of a prompt and `replies` = (K, T), K replies of T places: numbers added to its scores, (G, 1, L, L), for
    blocks with its two parts beside it (`siblings`); or for flex the blocks of 128 × 128 positions that are
    not empty, and which of them are full."""
    G, L, _ = allowed.shape
    if transformer.config._attn_implementation == "flex":
        return create_block_mask(lambda g, head, q, k: allowed[g, q, k], G, None, L, L, allowed.device)
    additive = torch.zeros(allowed.shape, dtype=transformer.dtype, device=allowed.device)
    additive.masked_fill_(~allowed, -1e30)  # not −inf: a padding position may see nothing at all
    if transformer.config._attn_implementation == "blocks":
        (K, T), P = replies, L - math.prod(replies)
        of_prompt = additive[:, P:, :P].unflatten(1, (K, T))  # (G, K, T, P)
        own = additive[:, P:, P:].reshape(G, K, T, K, T).diagonal(dim1=1, dim2=3)  # (G, T, T, K)
        reply = torch.cat([of_prompt, own.permute(0, 3, 1, 2)], -1).flatten(0, 1)
        mask = additive[:, None]
        mask.siblings = Siblings(additive[:, None, :P, :P], reply[:, None])
        return mask
    return additive[:, None]


# --- loading ---


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
    require(
        looks_like_id,
        f"--model {name}: no such recipe or folder. {near(name, [EMBEDDED_MODEL, *HUB_MODELS])}",
    )
    return name


def check_folder(flag: str, folder: str | None, *endings: str) -> None:
    """Refuse a local folder that is not a model of the kind `flag` needs. A hub id is taken as it is."""
    if folder is None or (
        not Path(folder).exists() and folder.count("/") == 1 and not folder.startswith((".", "/", "~"))
    ):
        return
    file = Path(folder) / "config.json"
    require(file.is_file(), f"{flag} {folder}: no such folder, or no config.json in it.")
    written = read_json(file, f"{flag} {folder}")
    made = "unknown"
    if isinstance(written, dict) and written.get("architectures"):
        made = str(written["architectures"][0])
    require(
        made.endswith(endings),
        f"{flag} {folder}: holds a {made}; a model whose name ends in {' or '.join(endings)} is needed.",
    )


@contextlib.contextmanager
def hub_errors(flag: str, name: str):
    """Turn the hub client's many exceptions into one sentence about `flag name`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # a broken folder can raise anything
        known = (OSError, ValueError, RepositoryNotFoundError, ConnectionError)
        if not Path(name).is_dir() and not isinstance(error, known):
            raise
        causes = [error, error.__cause__, error.__context__]
        text = " ".join(str(cause) for cause in causes if cause)
        if Path(name).is_dir():
            first = (str(error).strip().splitlines() or [""])[0]
            raise UserError(
                f"{flag} {name}: the folder could not be loaded: {type(error).__name__}: {first}"
            ) from error
        if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated" in text:
            raise UserError(
                f"{flag} {name}: the hub says this repository is gated. Accept its licence on its page, "
                "then set HF_TOKEN "
                "(or run `hf auth login`), or give a local folder."
            ) from error
        if (
            any(isinstance(cause, RepositoryNotFoundError) for cause in causes)
            or "not a valid model identifier" in text
        ):
            hint = near(name, HUB_MODELS.values()) if flag == "--model" else ""
            raise UserError(
                f"{flag} {name}: no such repository on the hub, or a private one: set HF_TOKEN. "
                f"{hint}".rstrip()
            ) from error
        raise UserError(
            f"{flag} {name}: could not be loaded from the hub ({str(error).strip().splitlines()[0]}). "
            f"Without a network give a local folder, or {flag} "
            f"{'sentiment' if 'judge' in flag else EMBEDDED_MODEL}, which needs no hub."
        ) from error


def without_dropout(source: str):
    """The transformers config of a folder or hub id, every dropout 0."""
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def load_model(
    name: str, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
) -> torch.nn.Module:
    """Causal language model for a `--model` value: weights in `dtype`, every dropout 0, on `device`, frozen.

    `attention` is a transformers backend, from `choose_attention`. Raises `UserError` if it cannot be loaded,
    or if its logits are not what `completion_logprobs` computes from its hidden states.
    """
    loaded_with = LOADED_WITH.get(attention, attention)
    if name.startswith(synthetic.PREFIX):
        model = synthetic.model(name.removeprefix(synthetic.PREFIX), dtype, device, loaded_with)
    else:
        source = model_source(name)
        with hub_errors("--model", name):
            config = without_dropout(source)
            settings = dict(
                config=config, dtype=dtype, attn_implementation=loaded_with, **straight_to(device)
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, trust_remote_code=False, **settings
            )
    set_attention(model, attention)
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


def straight_to(device: torch.device) -> dict:
    """What tells transformers to read weights tensor by tensor from the file to a GPU. It needs accelerate
    for that, which is installed with this package; where it is missing they all stand in host memory first,
    once, and go to the GPU from there."""
    if device.type != "cuda" or importlib.util.find_spec("accelerate") is None:
        return {}
    return {"device_map": {"": device}}


def try_template(tokenizer, what: str, seconds: int = 30) -> None:
    """Write a short chat by a tokenizer's template: it comes from whoever
    made the folder. Raises `UserError` for one that fails or does not come
    to an end; transformers' sandbox keeps it from files and from Python."""
    if not getattr(tokenizer, "chat_template", None):
        return
    try:
        with time_limit(seconds):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
            )
    except TimeoutError:
        raise UserError(
            f"{what}: its chat template is not through with one message after {seconds} s."
        ) from None
    except Exception as error:  # a template can raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what}: its chat template fails: {first}") from error
    require(len(text) < 10**6, f"{what}: its chat template makes {len(text):,} characters of one.")


@contextlib.contextmanager
def time_limit(seconds: int):
    """Context that raises `TimeoutError` after so long, where
    the system has such an alarm (in the main thread)."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def load_tokenizer(name: str):
    """Tokenizer for a `--model` value, with a padding token (the end-of-sequence token where it has none of
    its own)."""
    if name.startswith(synthetic.PREFIX):
        return synthetic.Tokenizer(synthetic.config(name.removeprefix(synthetic.PREFIX)).vocab_size)
    with hub_errors("--model", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_source(name), trust_remote_code=False)
    try_template(tokenizer, f"--model {name}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    require(
        tokenizer.pad_token_id is not None, f"--model {name}: its tokenizer has no end-of-sequence token."
    )
    return tokenizer


# --- parts ---


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
    return (
        projection.weight,
        getattr(projection, "bias", None),
        getattr(inner.config, "final_logit_softcapping", None),
    )


def head_logits(hidden, weight, bias, softcap):
    """Logits (…, V) of hidden states (…, D). On CUDA those of bfloat16 weights are float32, as the matrix
    product has summed them: rounded to bfloat16, a logit between 16 and 32 is off by up to 1/16. Elsewhere
    torch rounds them to the weights' precision, and the caller widens them."""
    hidden = hidden.to(weight.dtype)
    if weight.device.type == "cuda" and weight.dtype == torch.bfloat16:
        logits = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=torch.float32)
        logits = logits.unflatten(0, hidden.shape[:-1])
        logits = logits if bias is None else logits.add_(bias)
    else:
        logits = F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def end_tokens(model, tokenizer) -> list[int]:
    """Every id that ends a completion: the generation config's
    `eos_token_id` (one or several) and the tokenizer's."""
    configured = base_model(model).generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


# --- training ---


def make_trainable(
    model, lora_rank: int, lora_alpha: int, gradient_checkpointing: bool, task: str = "CAUSAL_LM"
):
    """The policy: all weights trainable (`lora_rank` 0), or a LoRA adapter on every linear layer of frozen
    weights. `task` is peft's.

    The adapter computes in the model's dtype, as everything else does; in float32 it would keep a float32
    copy of every layer's input.
    """
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora_rank == 0:
        return model.requires_grad_(True)
    peft = optional_import("peft", "'cleanalign[lora]'")
    config = peft.LoraConfig(
        r=lora_rank, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules="all-linear", task_type=task
    )
    # The adapter's first values are the same in every process: a run is a function of its arguments. Without
    # `devices` the state of every GPU of the machine would be asked for.
    device = head(model)[0].device if task == "CAUSAL_LM" else next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


@contextlib.contextmanager
def checkpointing(model):
    """Context in which a model made with gradient checkpointing does checkpoint: transformers' training mode.

    Only where a gradient is wanted: in training mode such a model ignores its caches. Nothing else changes,
        as every dropout is 0.
    """
    inner = base_model(model)
    inner.train(torch.is_grad_enabled())
    try:
        yield
    finally:
        inner.eval()


class LoraReference:
    """The starting model behind a LoRA policy: the same
    weights with the adapter switched off. Costs no memory."""

    def __init__(self, policy):
        self.policy = policy


def starting_model(policy):
    """The frozen starting model beside `policy`, which has not been trained yet: a copy of its weights, made
    where they are, or for LoRA its own weights unadapted."""
    if hasattr(policy, "disable_adapter"):
        return LoraReference(policy)
    reference = copy.deepcopy(policy)
    if reference.is_gradient_checkpointing:
        reference.gradient_checkpointing_disable()
    return reference.eval().requires_grad_(False)


def adapter_switch(model):
    """Context in which `backbone(model)` computes what `model`
    stands for: a `LoraReference` runs without its adapter."""
    return model.policy.disable_adapter() if isinstance(model, LoraReference) else contextlib.nullcontext()


def save_model(model, tokenizer, folder: Path) -> torch.nn.Module:
    """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads; it appears whole. A LoRA
    adapter is merged into `model` for good. Returns the model as it was written. Of several processes the
    first writes, and the others wait until it has."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if distributed.rank() == 0:
        with replacing(Path(folder)) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
    distributed.barrier()
    return model


# --- memory ---

PREFILL_TOKENS = 2**14  # prompt tokens in one forward pass
SAMPLING_SHARE = 0.85  # of the free memory; the rest is for the judge and for what the allocator wastes


def chunk_rows(vocabulary: int, device: torch.device, gradient: bool = True) -> int:
    """Rows of a (rows, V) float32 chunk of logits, when log-probs are computed: 128 MB of them on a CPU, 512
    MB elsewhere. Each chunk rewrites the (V, D) gradient, so few are better. Where none is computed, as in
    the forward pass, half of it on a CPU: larger blocks do not stay with the process (`keep_freed_memory`),
    and to fault them in anew costs a fifth of scoring."""
    numbers = 2**27 if device.type != "cpu" else 2**25 if gradient else 2**24
    return max(16, numbers // vocabulary)


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
        f"{config.model_type}: prompt and reply of up to {longest} tokens are longer than its attention's "
        f"sliding window of {window}, "
        "which is not supported. Lower --max-prompt-length or --max-new-tokens.",
    )


def choose_sample_rows(requested: int, members: list, longest: int, optimiser_bytes: int = 16) -> int:
    """Rows to decode at once: `requested`, or for 0 as many as a GPU's free memory holds; 64 where there is
    no GPU.

    For `members` sampled together, on prompts and replies of up to `longest` tokens, before the optimiser is
    made: `rows_that_fit` into SAMPLING_SHARE · free − optimiser_bytes · trained weights. `optimiser_bytes` is
    what the optimiser will hold for a trained weight (`optimization.bytes_per_weight`). Raises `UserError`
    for an architecture that `require_full_attention` refuses.
    """
    for member in members:
        require_full_attention(member, longest)
    weight = head(members[0])[0]
    free = free_memory(weight.device)
    if requested or free is None:
        return requested or 64
    configs = [base_model(member).config.get_text_config() for member in members]
    optimiser = optimiser_bytes * sum(p.numel() for p in members[0].parameters() if p.requires_grad)
    return rows_that_fit(configs, weight.element_size(), longest, SAMPLING_SHARE * free - optimiser)


def rows_that_fit(configs: list, element: int, longest: int, room: float) -> int:
    """Rows of up to `longest` tokens that models of these configs, with `element` bytes a number, decode
    together in `room` bytes; a multiple of 8, at least 8 and at most 1,024:

        rows = (room − prefill) / row
        row = Σ_models 2 · layers · H_kv · D · longest · element size + 24 · V        keys and values; logits
        prefill = the greatest model's `prefill_bytes` of a token · PREFILL_TOKENS
    """
    row = sum(row_bytes(config, element, longest) for config in configs)
    prefill = PREFILL_TOKENS * max(prefill_bytes(config, element) for config in configs)
    return int(min(1024, max(8, (room - prefill) // row // 8 * 8)))


def row_bytes(config, element: int, longest: int) -> int:
    """Bytes of a decoded row of up to `longest` tokens: its keys and values, and six float32 numbers for each
    word of the vocabulary (logits, probabilities, their sums) while a token is drawn."""
    return key_value_numbers(config) * longest * element + 24 * config.vocab_size


def prefill_bytes(config, element: int) -> int:
    """Bytes that a prompt's token takes while the prompt is read: its keys and values, before they are copied
    to the rows, and at the widest place of a layer four numbers for each unit of it and of its inner part."""
    return (4 * (config.hidden_size + inner_width(config)) + key_value_numbers(config)) * element


def key_value_numbers(config) -> int:
    """Numbers that a token's keys and values take in the
    cache of a model of this config: 2 · layers · H_kv · D."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return (
        2
        * config.num_hidden_layers
        * heads
        * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    )


def inner_width(config) -> int:
    """Width of the layers' inner part; GPT-2's config leaves it out when it is four times the model's."""
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a CUDA device, those that PyTorch holds unused included; None on another device."""
    if device.type != "cuda":
        return None
    return (
        torch.cuda.mem_get_info(device)[0]
        + torch.cuda.memory_reserved(device)
        - torch.cuda.memory_allocated(device)
    )
