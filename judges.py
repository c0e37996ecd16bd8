"""Who prefers what. Every judge answers p(a ≻ b | prompt); some also have a scalar score.

    --judge sentiment          VADER's compound score; p = σ(4 · (compound(a) − compound(b)))
    --judge polarity           TextBlob's polarity, an independent lexicon; p as above
    --judge cycle              question ≻ exclamation ≻ statement ≻ question: no scalar can express it
    --judge hf:ID              a sequence-classification reward model; p = σ(r(a) − r(b))
    --judge pairrm             PairRM, SELM's judge, reads both replies at once; pairrm:ID for another copy
    --judge pairwise:ID        a causal language model that answers A or B, in RLHFlow's format
    --judge openai:MODEL       a model behind an OpenAI-compatible endpoint: OPENAI_BASE_URL, OPENAI_API_KEY
    --judge random             a number made of the reply's characters: for --dry-run; nothing to learn from
    --judge FILE.py:FUNCTION   your own f(prompts, a, b) -> p(a ≻ b) for each; it need not come from a scalar.
                               Or a reward f(prompts, replies) -> r for each; p = σ(r(a) − r(b))

Judges see text, batched. Nothing forces a judge through a scalar: ask `preference`, or `preference_matrix`
for more than two candidates; `score` is None where there is no scalar. docs/judges.md has formulas, cost and
what is untested.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
import transformers
from tqdm import tqdm
from transformers.utils.hub import cached_file

from cleanalign import distributed, synthetic
from cleanalign.data import Prompt, prompt_text, write_dialogue
from cleanalign.decoding import left_pad
from cleanalign.errors import JudgeFailure, UserError, near, optional_import, require
from cleanalign.models import backbone, head, head_logits, hub_errors, try_template
from cleanalign.openai_judge import JudgeSettings, OpenAIJudge

LEXICON_SCALE = 4.0  # p = σ(4 Δ): compound and polarity live in [−1, 1], so certain cases reach p = .98


@dataclass
class Judge:
    """A judge by name, with a `preference` and, where it has one, a scalar `score`.

    preference(prompts, a, b) -> (B,) float32 tensor of p(a ≻ b); score(prompts, replies) -> (B,) float32, or
    None. Where there is a score, p(a ≻ b) = σ(scale · (score(a) − score(b))). measure(replies) gives metrics
    of its own, to be logged. `symmetric` judges give p(a ≻ b) + p(b ≻ a) = 1 by construction, so asking in
    the other order would tell nothing. `account` of a judge that costs money foresees and counts it. `end` is
    what a judge reads behind a reply that its writer finished (`Experiment.texts` puts it there): without it
    a reply cut at its greatest length would look finished.
    """

    name: str
    preference: Callable[[list[Prompt], list[str], list[str]], torch.Tensor]
    score: Callable[[list[Prompt], list[str]], torch.Tensor] | None = None
    scale: float = 1.0
    measure: Callable[[list[str]], dict[str, float]] | None = None
    symmetric: bool = False
    account: OpenAIJudge | None = None
    end: str = ""


def load_judge(
    spec: str,
    device: torch.device | str = "cpu",
    flag: str = "--judge",
    settings: JudgeSettings | None = None,
) -> Judge:
    """The judge that `spec` names (see the module's docstring); `settings` say how one behind a network is
    asked. Raises `UserError` for one that is not there.

    Whatever goes wrong when it is asked (an exception, a time-out, a wrong number of values, NaN, a
    preference outside [0, 1]) is a `JudgeFailure`, by which a run knows to checkpoint first. Of several
    processes each asks its own copy about a share of the rows, and all get every answer, or the failure.
    """
    judge = _make_judge(spec, device, flag, settings or JudgeSettings())
    judge.preference = _checked(judge.preference, f"{flag} {spec}", "p(a ≻ b)", greatest=1.0)
    if judge.score is not None:
        judge.score = _checked(judge.score, f"{flag} {spec}", "score")
    if distributed.world() > 1:
        judge.preference, judge.score = _dealt(judge.preference), judge.score and _dealt(judge.score)
    return judge


def _dealt(ask: Callable) -> Callable:
    """`ask`, each process about its share of the rows. All must ask together."""

    def ask_together(*columns) -> torch.Tensor:
        own = [distributed.mine(column) for column in columns]
        answers = distributed.attempt(lambda: ask(*own).tolist() if own[0] else [])
        whole = torch.zeros(len(columns[0]))
        for rank, part in enumerate(distributed.gather(answers)):
            whole[rank :: distributed.world()] = torch.tensor(part)
        return whole

    return ask_together


def _checked(ask: Callable, judge: str, what: str, greatest: float = math.inf) -> Callable:
    """`ask`, its answers checked: one finite value for each
    row, and in [0, greatest] where that is finite."""

    def answer(*columns):
        try:
            values = ask(*columns)
        except torch.OutOfMemoryError:
            raise  # the run gives its own advice on that
        except UserError as error:
            raise JudgeFailure(str(error)) from error
        except Exception as error:
            raise JudgeFailure(f"{judge} failed: {type(error).__name__}: {error}") from error
        if len(values) != len(columns[0]):
            raise JudgeFailure(f"{judge}: {len(values)} values for {len(columns[0])} rows.")
        wrong = ~values.isfinite()
        if math.isfinite(greatest):
            wrong |= (values < 0) | (values > greatest)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            row = " and ".join(repr(str(column[i])[:60]) for column in columns)
            raise JudgeFailure(f"{judge}: its {what} is {values[i].item()} for {row}.")
        return values

    return answer


def _make_judge(spec: str, device: torch.device | str, flag: str, settings: JudgeSettings) -> Judge:
    if spec in LEXICONS:
        return scalar_judge(spec, LEXICONS[spec](), scale=LEXICON_SCALE)
    if spec == "cycle":
        return Judge("cycle", cycle_preference, measure=cycle_measure)
    if spec == "random":
        return scalar_judge(
            spec, lambda prompts, replies: torch.tensor([synthetic.coin(reply) for reply in replies])
        )
    if spec.startswith("hf:"):
        name = spec[3:]
        return replace(scalar_judge(spec, reward_model(name, device, flag)), end=end_read_by(name))
    if spec == "pairrm" or spec.startswith("pairrm:"):
        return Judge(
            spec,
            pairrm(PAIRRM_ID if spec == "pairrm" else spec[len("pairrm:") :], device, flag),
            symmetric=True,
        )
    if spec.startswith("pairwise:"):
        return Judge(spec, pairwise_model(spec[len("pairwise:") :], device, flag))
    if spec.startswith("openai:"):
        asked = OpenAIJudge(spec[len("openai:") :], flag, settings)
        return Judge(spec, asked.preference, account=asked)
    if ".py:" in spec:
        return function_judge(spec, flag)
    known = [
        *LEXICONS,
        "cycle",
        "hf:ID",
        "pairrm",
        "pairrm:ID",
        "pairwise:ID",
        "openai:MODEL",
        "FILE.py:FUNCTION",
    ]
    raise UserError(f"{flag} {spec}: no such judge. {near(spec, known)}")


def scalar_judge(name: str, score: Callable, scale: float = 1.0) -> Judge:
    """A judge from a scalar: p(a ≻ b) = σ(scale · (score(a) − score(b))), the Bradley-Terry model."""

    def preference(prompts, a, b):
        both = score([*prompts, *prompts], [*a, *b])
        return torch.sigmoid(scale * (both[: len(a)] - both[len(a) :]))

    return Judge(name, preference, score, scale)


# --- lexicons -------------------------------------------------------------------------------


def _vader() -> Callable:
    analyzer = optional_import("vaderSentiment.vaderSentiment", "vaderSentiment").SentimentIntensityAnalyzer()
    return lambda prompts, replies: torch.tensor(
        [analyzer.polarity_scores(reply)["compound"] for reply in replies]
    )


def _textblob() -> Callable:
    blob = optional_import("textblob", "textblob").TextBlob
    return lambda prompts, replies: torch.tensor([float(blob(reply).sentiment.polarity) for reply in replies])


LEXICONS = {"sentiment": _vader, "polarity": _textblob}

# --- an intransitive judge --------------------------------------------------------------------

STYLES = ("question", "exclamation", "statement")  # each beats the next, and the last the first


def style(reply: str) -> int:
    """Index into `STYLES`: by the last of the marks ? and ! in the text; without either it is a statement."""
    question, exclamation = reply.rfind("?"), reply.rfind("!")
    if max(question, exclamation) < 0:
        return 2
    return 0 if question > exclamation else 1


def cycle_preference(prompts, a, b) -> torch.Tensor:
    """(B,) p(a ≻ b): 1 where a's style beats b's, 0 where it loses, ½ where they are the same."""
    difference = torch.tensor([(style(y) - style(x)) % 3 for x, y in zip(a, b, strict=True)])
    return torch.tensor([0.5, 1.0, 0.0])[difference]


def cycle_measure(replies: list[str]) -> dict[str, float]:
    """Share of each style, and the exploitability of this
    mix: the best style's win rate against it, minus ½."""
    shares = torch.bincount(torch.tensor([style(reply) for reply in replies]), minlength=3).double() / len(
        replies
    )
    best = max((shares[(i + 1) % 3] + 0.5 * shares[i]).item() for i in range(3))
    return {
        **{f"style/{name}": share for name, share in zip(STYLES, shares.tolist(), strict=True)},
        "exploitability": best - 0.5,
    }


# --- reward models --------------------------------------------------------------------------


def reward_text(tokenizer, prompt: Prompt, reply: str) -> tuple[str, ...]:
    """What a reward model with this tokenizer is given to read of a prompt and a reply: one text, or for an
    encoder two.

    With a chat template the conversation goes through it. Without one, an encoder gets the pair (prompt,
    reply); a decoder what a policy without one reads and writes: a plain prompt and the reply after a space
    (TL;DR's reward models are trained so), or a list of messages as HH-RLHF's "Human: … Assistant: …" text.
    """
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    whole = [*messages, {"role": "assistant", "content": reply}]
    if tokenizer.chat_template:
        return (tokenizer.apply_chat_template(whole, tokenize=False),)
    if tokenizer.sep_token is not None:
        return (prompt_text(prompt), reply)
    return (f"{prompt.rstrip()} {reply}" if isinstance(prompt, str) else write_dialogue(whole),)


READ_AT_THE_END = {  # reward models that were trained on "prompt reply<end>", by the last part of their name
    "EleutherAI_pythia-1b-deduped__reward__tldr": "<|endoftext|>"  # its script: arXiv 2403.17031
}


def end_read_by(name: str) -> str:
    """The end token that a reward model (hub id or folder) waits for behind a finished reply, or ""."""
    return READ_AT_THE_END.get(Path(name).name, "")


def pad_beside(tokenizer, end: str) -> None:
    """Pad with another token than `end`: a classifier reads its reward at the last token that is not
    padding."""
    if tokenizer.pad_token == end:
        others = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content != end]
        require(bool(others), f"its tokenizer has no token to pad with beside {end}.")
        tokenizer.pad_token = others[0]


def reward_limit(tokenizer, config) -> int:
    """Tokens that a reward model reads of a text; of a longer one it reads the end."""
    return min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 2048), 4096)


def reward_model(name: str, device, flag: str = "--judge", batch_size: int = 16) -> Callable:
    """score(prompts, replies) of a sequence-classification model, read through its own tokenizer and template
    (`reward_text`).

    One label is the reward; of two, the second's logit minus the first's. Texts longer than the model's limit
    lose their beginning, never the reply's end. The head computes in float32: in bfloat16, replies that are
    nearly as good would tie.
    """
    require(bool(name), f"{flag} hf:ID needs a hub id or folder after 'hf:'.")
    with hub_errors(flag, name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, truncation_side="left"
        )
        model = (
            transformers.AutoModelForSequenceClassification.from_pretrained(
                name, trust_remote_code=False, dtype="auto"
            )
            .to(device)
            .eval()
        )
    try_template(tokenizer, f"{flag} hf:{name}")
    labels = model.config.num_labels
    require(
        labels in (1, 2), f"{flag} hf:{name}: a reward model has one or two labels, this one has {labels}."
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if end_read_by(name):
        pad_beside(tokenizer, end_read_by(name))
    model.config.pad_token_id = tokenizer.pad_token_id
    limit = reward_limit(tokenizer, model.config)
    if isinstance(getattr(model, "score", None), torch.nn.Linear):
        model.score.float().register_forward_pre_hook(lambda _, hidden: (hidden[0].float(),))

    @torch.inference_mode()
    def score(prompts, replies):
        texts = [reward_text(tokenizer, *row) for row in zip(prompts, replies, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        scores = torch.zeros(len(texts))
        for start in tqdm(
            range(0, len(order), batch_size), desc="judge", leave=False, disable=len(order) < 8 * batch_size
        ):
            part = order[start : start + batch_size]
            columns = [list(column) for column in zip(*(texts[i] for i in part), strict=True)]
            inputs = tokenizer(
                *columns,
                padding=True,
                truncation=True,
                max_length=limit,
                add_special_tokens=not tokenizer.chat_template,
                return_tensors="pt",
            )
            logits = model(**inputs.to(model.device)).logits.float().cpu()  # (b, labels)
            scores[part] = logits[:, 0] if labels == 1 else logits[:, 1] - logits[:, 0]
        return scores

    return score


# --- judges that read both replies at once --------------------------------------------------


def conversation(prompt: Prompt) -> list[dict]:
    """The prompt as user and assistant messages. These judges know no system message: it goes in front of the
    first user's."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if messages[0]["role"] == "system" and len(messages) > 1:
        first = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages = [{**messages[1], "content": first}, *messages[2:]]
    return messages


def by_length(rows: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Indices of token rows, shortest first, in parts of at
    most `max_tokens` (or one row), padding included."""
    parts: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if parts and (len(parts[-1]) + 1) * len(rows[i]) <= max_tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


# the authors' conversion of llm-blender/PairRM; unlike that, it carries its DeBERTa config
PAIRRM_ID = "llm-blender/PairRM-hf"
PAIRRM_MARKS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
PAIRRM_LENGTHS = (1224, 412)  # tokens of source and candidate: PairRM-hf's card has them, its config does not
# sic: trained so
PAIRRM_TASK = (
    "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
)


class PairRM(torch.nn.Module):
    """DeBERTa-v2 over source and both candidates, each begun by a mark, and a head that scores a candidate
    (arXiv 2306.02561).

    Parameters have the names they have in both checkpoints of the hub, whose head has dropouts where the
    identities stand.
    """

    def __init__(self, config: transformers.DebertaV2Config, tasks: int):
        super().__init__()
        D, nn = config.hidden_size, torch.nn
        self.pretrained_model = transformers.DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Identity(), nn.Linear(2 * D, D), nn.Tanh(), nn.Identity(), nn.Linear(D, tasks)
        )

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, marks: torch.Tensor
    ) -> torch.Tensor:
        """(B,) log-odds, score of candidate 1 minus that of candidate 2, from (B, L) ids and mask and the (B,
        3) places of the marks."""
        hidden = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # (B, D) each
        source, *candidates = (
            hidden.gather(1, marks[:, :, None].expand(-1, -1, hidden.shape[-1])).float().unbind(1)
        )
        # (B, tasks)
        first, second = (self.head_layer(torch.cat([source, candidate], -1)) for candidate in candidates)
        return (first - second).mean(-1)


def load_pairrm(
    name: str, device, flag: str = "--judge"
) -> tuple[PairRM, tokenizers.Tokenizer, tuple[int, int]]:
    """Model, tokenizer and longest (source, candidate) of a hub id or folder, in the layout of PairRM-hf or
    of the original PairRM.

    The original's config.json describes a ranker and names the base model whose DeBERTa config holds;
    PairRM-hf's is that config. The tokenizer is tokenizer.json as it stands: `AutoTokenizer` of transformers
    5 would rebuild it without its normaliser. Float32, or as in the package float16 on CUDA; the head always
    in float32.
    """
    require(bool(name), f"{flag} pairrm:ID needs a hub id or folder after 'pairrm:'.")

    def find(*files: str, hint: str = "") -> str:
        with hub_errors(flag, name):
            paths = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in files]
            if not any(paths) and not Path(name).is_dir():
                # raises, saying why: no network, no such repository, no such file
                cached_file(name, files[0])
        require(any(paths), f"{flag} pairrm:{name}: no {files[0]} there.{hint}")
        return next(filter(None, paths))

    written = json.loads(Path(find("config.json")).read_text())
    original = written.get("ranker_type") == "pairranker"
    require(
        original or written.get("model_type") == "deberta-v2",
        f"{flag} pairrm:{name}: its config.json is neither PairRM's (ranker_type pairranker) nor "
        "PairRM-hf's (model_type deberta-v2).",
    )
    base = written["model_name"] if original else name
    with hub_errors(flag, base):
        config = transformers.DebertaV2Config.from_pretrained(base)

    tokenizer = tokenizers.Tokenizer.from_file(
        find("tokenizer.json", hint=f" Copy that of {PAIRRM_ID}: the tokenizer is the same.")
    )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    file = find("model.safetensors", "pytorch_model.bin")
    read = (
        safetensors.torch.load_file
        if file.endswith(".safetensors")
        else partial(torch.load, map_location="cpu", weights_only=True)
    )
    weights = read(file)
    embeddings, last = (
        weights.get(key)
        for key in ("pretrained_model.embeddings.word_embeddings.weight", "head_layer.4.weight")
    )
    require(
        embeddings is not None and last is not None,
        f"{flag} pairrm:{name}: its weights are not PairRM's (no head_layer.4.weight).",
    )
    for token in (*PAIRRM_MARKS, "[CLS]", "[SEP]"):
        id = tokenizer.token_to_id(token)
        require(
            id is not None and id < len(embeddings),
            f"{flag} pairrm:{name}: its tokenizer has no {token} that its weights know.",
        )

    config.vocab_size = len(embeddings)  # the base model's, and the marks
    model = PairRM(config, tasks=len(last))
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip()
        raise UserError(
            f"{flag} pairrm:{name}: its weights do not fit the config of {base}: {problem}"
        ) from error
    require(
        not missing,
        f"{flag} pairrm:{name}: {len(missing)} weights are missing, such as {', '.join(missing[:1])}.",
    )
    model.to(device).eval().requires_grad_(False)
    if torch.device(device).type == "cuda":
        model.pretrained_model.half()
    return (
        model,
        tokenizer,
        (written["source_maxlength"], written["candidate_maxlength"]) if original else PAIRRM_LENGTHS,
    )


def pairrm_texts(prompt: Prompt, *replies: str) -> list[str]:
    """[source, candidate, …]: a single turn as it is; of a dialogue all user turns and all assistant turns,
    in the package's words."""
    messages = conversation(prompt)
    if len(messages) == 1:
        return [messages[0]["content"], *replies]
    users, before = ([m["content"] for m in messages if m["role"] == role] for role in ("user", "assistant"))
    source = PAIRRM_TASK + "\n".join(
        f"USER: {text}\nAssistant: <Response {i}>" for i, text in enumerate(users, 1)
    )
    return [
        source,
        *(
            "\n".join(f"<Response {i}>: {text}" for i, text in enumerate([*before, reply], 1))
            for reply in replies
        ),
    ]


def pairrm_ids(
    tokenizer: tokenizers.Tokenizer, lengths: tuple[int, int], texts: list[str]
) -> tuple[list[int], list[int]]:
    """Token ids of [source, candidate 1, candidate 2] in one row, and the places of their three marks.

    Each is [CLS] mark text [SEP], cut at the text's end. `lengths` are the longest source and candidate,
    those three included; what the source leaves free is shared by the candidates.
    """
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    row, places, longest = [], [], lengths[0]
    for mark, text in zip(PAIRRM_MARKS, texts, strict=True):
        ids = tokenizer.encode(mark + text.replace("[SEP]", " "), add_special_tokens=False).ids[: longest - 2]
        places.append(len(row) + 1)
        row += [cls, *ids, sep]
        if mark == PAIRRM_MARKS[0]:
            longest = (lengths[0] + 2 * lengths[1] - len(row)) // 2
    return row, places


def pairrm(name: str, device, flag: str = "--judge", max_tokens: int = 4096) -> Callable:
    """preference(prompts, a, b) of PairRM: p(a ≻ b) = σ(½ [s(a, b) − s(b, a)]), with s(first, second) the
    model's logit for `first`.

    s was trained as the log-odds of a single order (loss −log σ(s)). The package's `compare` adds both
    orders, s(a, b) − s(b, a), which has the same sign and twice the size; half of it is the mean, the scale
    that was trained. `max_tokens` bounds a forward pass, padding included.
    """
    model, tokenizer, lengths = load_pairrm(name, device, flag)

    @torch.inference_mode()
    def preference(prompts, a, b):
        texts = [pairrm_texts(*row) for row in zip(prompts, a, b, strict=True)]
        swapped = [[source, second, first] for source, first, second in texts]
        rows, places = map(
            list, zip(*(pairrm_ids(tokenizer, lengths, row) for row in texts + swapped), strict=True)
        )
        logits = torch.zeros(len(rows))
        for part in tqdm(by_length(rows, max_tokens), desc="judge", leave=False, disable=len(rows) < 128):
            # (b, L)
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in part], batch_first=True)
            mask = torch.arange(ids.shape[1]) < torch.tensor([[len(rows[i])] for i in part])
            marks = torch.tensor([places[i] for i in part])
            logits[part] = model(ids.to(device), mask.long().to(device), marks.to(device)).cpu()
        return torch.sigmoid((logits[: len(a)] - logits[len(a) :]) / 2)

    return preference


def pairwise_question(prompt: Prompt, a: str, b: str) -> str:
    """What RLHFlow's preference models are asked (card of RLHFlow/pair-preference-model-LLaMA3-8B); the
    answer is the token A or B."""
    context = "".join(
        f"\n<turn> {message['role']}\n {message['content']}" for message in conversation(prompt)
    )
    return f"[CONTEXT] \n{context}\n [RESPONSE A] {a} [RESPONSE B] {b} \n"


def question_ids(tokenizer, prompt: Prompt, a: str, b: str) -> list[int]:
    """`pairwise_question` as token ids: a user's message in the chat template, without the
    beginning-of-sequence token, up to the assistant's header. The answer is the next token."""
    message = {"role": "user", "content": pairwise_question(prompt, a, b)}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    text = text.replace(tokenizer.bos_token, "") if tokenizer.bos_token else text
    return tokenizer.encode(text, add_special_tokens=False)


def answer_tokens(tokenizer, what: str) -> tuple[int, int]:
    """The ids of A and B. Raises `UserError`, which begins
    with `what`, for a tokenizer that cannot be asked so."""
    require(
        bool(tokenizer.chat_template), f"{what}: its tokenizer has no chat template, so it cannot be asked."
    )
    try_template(tokenizer, what)
    answers = [tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
    single = all(len(ids) == 1 for ids in answers) and answers[0] != answers[1]
    require(
        single,
        f"{what}: A and B must be one token each, and not the same; they are {answers[0]} and {answers[1]}.",
    )
    return answers[0][0], answers[1][0]


def pairwise_model(name: str, device, flag: str = "--judge", max_tokens: int = 16_384) -> Callable:
    """preference(prompts, a, b) of a causal model that answers A or B: p(a ≻ b) = σ(logit of A − logit of B),
    at temperature 1.

    One order; `both_orders` averages the two, as the model's card does. A question (`question_ids`) longer
    than the model's limit loses its beginning. The two logits are computed in float32: in bfloat16 those of
    size 20 are an eighth apart. `max_tokens` bounds a forward pass, padding included.
    """
    require(bool(name), f"{flag} pairwise:ID needs a hub id or folder after 'pairwise:'.")
    with hub_errors(flag, name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = (
            transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, dtype="auto")
            .to(device)
            .eval()
            .requires_grad_(False)
        )
    letters = answer_tokens(tokenizer, f"{flag} pairwise:{name}")
    weight, bias, softcap = head(model)
    weight = weight[list(letters)].float()  # (2, D)
    bias = None if bias is None else bias[list(letters)].float()
    limit = getattr(model.config, "max_position_embeddings", 8192)

    @torch.inference_mode()
    def preference(prompts, a, b):
        rows = [question_ids(tokenizer, *row)[-limit:] for row in zip(prompts, a, b, strict=True)]
        difference = torch.zeros(len(rows))
        for part in tqdm(by_length(rows, max_tokens), desc="judge", leave=False, disable=len(rows) < 128):
            ids, mask = left_pad([rows[i] for i in part], device)  # (b, L)
            places = (mask.cumsum(1) - 1).clamp(min=0)
            hidden = backbone(model)(
                input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False
            ).last_hidden_state[:, -1]  # (b, D)
            logits = head_logits(hidden.float(), weight, bias, softcap)  # (b, 2)
            difference[part] = (logits[:, 0] - logits[:, 1]).cpu()
        return torch.sigmoid(difference)

    return preference


# --- your own function ----------------------------------------------------------------------


def function_judge(spec: str, flag: str = "--judge") -> Judge:
    """`FILE.py:FUNCTION`, f(prompts: list[str], a: list[str], b: list[str]) -> sequence of p(a ≻ b), checked
    on every call.

    A function of two arguments, f(prompts, replies) -> sequence of rewards, makes a judge with a scalar. An
    attribute `measure` of the function, replies -> {name: value}, is the judge's own.
    """
    path, _, name = spec.rpartition(":")
    require(Path(path).is_file(), f"{flag} {spec}: no file {path}.")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{flag} {spec}: {path} does not import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    offered = [
        n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__
    ]
    require(
        callable(function),
        f"{flag} {spec}: no function {name!r} in {path}, which has {', '.join(offered) or 'none'}.",
    )

    scalar = len(inspect.signature(function).parameters) == 2
    kind, one = ("replies", "reward") if scalar else ("pairs", "p(a ≻ b)")

    def ask(prompts, *replies) -> list:
        texts = [prompt_text(prompt) for prompt in prompts]
        try:
            answer = list(function(texts, *map(list, replies)))
        except Exception as error:
            where = _line_in(path, error)
            raise UserError(f"{flag} {spec}: raised {type(error).__name__}: {error}{where}") from error
        require(
            len(answer) == len(texts),
            f"{flag} {spec}: returned {len(answer)} values for {len(texts)} {kind}; one {one} for each is "
            "needed.",
        )
        for i, value in enumerate(answer):
            try:
                fine = math.isfinite(value) if scalar else 0.0 <= float(value) <= 1.0
            except (TypeError, ValueError):
                fine = False
            shown = " and ".join(repr(column[i][:60]) for column in replies)
            require(
                fine,
                f"{flag} {spec}: value {i} is {value!r}; "
                f"{'a reward is a number' if scalar else 'a preference lies in [0, 1]'}. For: {shown}.",
            )
        return [float(value) for value in answer]

    own_measure = getattr(function, "measure", None)

    def measure(replies) -> dict[str, float]:
        try:
            return {key: float(value) for key, value in own_measure(list(replies)).items()}
        except Exception as error:
            raise UserError(
                f"{flag} {spec}: its measure raised {type(error).__name__}: {error}{_line_in(path, error)}"
            ) from error

    measure = measure if own_measure else None
    if scalar:
        judge = scalar_judge(spec, lambda prompts, replies: torch.tensor(ask(prompts, replies)))
        judge.measure = measure
        return judge
    return Judge(spec, lambda prompts, a, b: torch.tensor(ask(prompts, a, b)), measure=measure)


def _line_in(path: str, error: BaseException) -> str:
    """' (FILE:LINE)' of the innermost frame of `error` inside `path`."""
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" ({path}:{lines[-1]})" if lines else ""


# --- both orders ----------------------------------------------------------------------------


def both_orders(judge: Judge, prompts: list[Prompt], a: list[str], b: list[str]) -> torch.Tensor:
    """(B,) p(a ≻ b) free of position bias: ½ [p(a ≻ b) + 1 − p(b ≻ a)]. A scalar or symmetric judge has none
    and is asked once."""
    p = judge.preference(prompts, a, b)
    return (
        p if judge.score is not None or judge.symmetric else 0.5 * (p + 1 - judge.preference(prompts, b, a))
    )


# --- more than two candidates ---------------------------------------------------------------


def preference_matrix(judge: Judge, prompts: list[Prompt], candidates: list[list[str]]) -> list[torch.Tensor]:
    """For each prompt the (K, K) matrix of p(candidate i ≻ candidate j), ½ on the diagonal, as in
    `judge_candidates`."""
    return judge_candidates(judge, prompts, candidates)[1]


def judge_candidates(
    judge: Judge, prompts: list[Prompt], candidates: list[list[str]], average: bool = True
) -> tuple[list[torch.Tensor] | None, list[torch.Tensor]]:
    """For each prompt its candidates' scores (K,), and the (K, K) matrix of p(candidate i ≻ candidate j), ½
    on the diagonal.

    A scalar judge scores each candidate once (its preferences have no position bias). Any other judge has no
    scores, None, and is asked about every pair by `both_orders`, p = ½ [p(i ≻ j) + 1 − p(j ≻ i)]; without
    `average` once, the earlier candidate first.
    """
    if judge.score is not None:
        flat = [(prompt, reply) for prompt, group in zip(prompts, candidates, strict=True) for reply in group]
        scores = judge.score([prompt for prompt, _ in flat], [reply for _, reply in flat]).split(
            [len(group) for group in candidates]
        )
        return list(scores), [torch.sigmoid(judge.scale * (s[:, None] - s[None, :])) for s in scores]
    pairs = [
        (g, i, j)
        for g, group in enumerate(candidates)
        for i in range(len(group))
        for j in range(i + 1, len(group))
    ]
    asked = [prompts[g] for g, _, _ in pairs]
    first, second = [candidates[g][i] for g, i, _ in pairs], [candidates[g][j] for g, _, j in pairs]
    p_first = both_orders(judge, asked, first, second) if average else judge.preference(asked, first, second)
    matrices = [torch.full((len(group), len(group)), 0.5) for group in candidates]
    for (g, i, j), p in zip(pairs, p_first.tolist(), strict=True):
        matrices[g][i, j], matrices[g][j, i] = p, 1 - p
    return None, matrices


def golden_of(
    judge: Judge, prompts: list[Prompt], texts: list[list[str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The judge's score (G, M) and preferences (G, M, M) of M replies to each prompt; without a scalar, the
    mean preference is the score."""
    scores, matrices = judge_candidates(judge, prompts, texts)
    preference = torch.stack(matrices)
    return preference.mean(2) if scores is None else torch.stack(scores), preference
