"""Data: named sets, hub ids and files become rows; what is
dropped is counted; what is held out stays out of training."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cleanalign import synthetic
from cleanalign.errors import UserError, near, optional_import, require

Prompt = str | list[dict]  # plain text, or chat messages [{"role": ..., "content": ...}, ...]


@dataclass
class Row:
    """One example. `chosen` and `rejected` are a preference
    pair, `response` a demonstration; each may be None."""

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


def load_rows(
    spec: str, columns: tuple[str, ...] = (), held_out: int = 128, response: str = "response"
) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows (at least `held_out` of them, where there are that many), with disjoint
    prompts.

    Args:
        spec: `chitchat`, a name of `HUB_DATASETS`, `ORG/NAME` or `ORG/NAME:SPLIT` on the hub, or a .jsonl,
            .jsonl.gz or .parquet file.
        columns: what each row must have beyond its prompt: "chosen", "rejected", "response".
        response: the column read as `response`.

    Rows that cannot be used are dropped and counted by reason. A set with a test split of its own keeps it;
    from any other, `held_out` prompts (at most a fifth) are set aside, always the same. Raises `UserError`
    for what cannot be read or used.
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
            f"--dataset {spec}: no such name, and not a .jsonl, .jsonl.gz or .parquet file. "
            f"{near(spec, ['chitchat', *HUB_DATASETS])}"
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
    """Every usable row of a .jsonl, .jsonl.gz or .parquet file given as `flag path`. Raises `UserError` as
    `load_rows` does."""
    require(
        path.endswith((".jsonl", ".jsonl.gz", ".parquet")),
        f"{flag} {path}: not a .jsonl, .jsonl.gz or .parquet file.",
    )
    return _usable_rows(path, _file_rows(Path(path), flag), columns)


def _random_rows(count: int, prompt_tokens: int, response_tokens: int) -> Iterator[tuple[str, dict]]:
    """Rows of random text, in tokens of `synthetic.Tokenizer`:
    what a dry run trains on, each as long as can be."""
    for i in range(count):
        lengths = {
            "prompt": prompt_tokens,
            "chosen": response_tokens,
            "rejected": response_tokens,
            "response": response_tokens,
        }
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
        parquet = optional_import("pyarrow.parquet", "pyarrow")
        try:
            rows = parquet.read_table(path).to_pylist()
        except Exception as error:  # pyarrow has many, OSError and ValueError among them
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{flag} {path}: cannot be read as parquet: {first}") from error
        yield from ((f"{path.name}:{i}", row) for i, row in enumerate(rows))
        return
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else open(path, encoding="utf-8") as file
    ):
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})."
                    ) from error
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{path}:{number}: not a JSON object that can be read: {error}"
                    ) from error
                require(
                    isinstance(row, dict),
                    f"{path}:{number}: a row must be a JSON object, this is a {type(row).__name__}.",
                )
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
            f"--dataset {name} (split {split}): could not be loaded from the hub ({first}). Give a local "
            ".jsonl or .parquet file."
        ) from error
    yield from ((f"{split}:{i}", row) for i, row in enumerate(loaded))


def _usable_rows(
    spec: str, raw: Iterable[tuple[str, dict]], columns: tuple[str, ...], response: str = "response"
) -> list[Row]:
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
    require(
        total > dropped.total(),
        f"{what}: no usable row" + (f" (dropped: {reasons})." if dropped else ": it is empty."),
    )


def parse_row(row_id: str, fields: dict, columns: tuple[str, ...], response: str = "response") -> Row | str:
    """One raw row in any accepted format as a `Row`, or the reason why it must be dropped.

    Formats: TRL's standard (`prompt`, `chosen`, `rejected`, `completion` as text) and conversational (each a
    list of messages; the prompt explicit, or implicit as what `chosen` and `rejected` share), and HH-RLHF's
    text dialogues. Raises `UserError` for a missing or mistyped column, naming the row.
    """
    names = ", ".join(fields) or "none"
    fields = dict(fields)
    if response != "response":
        require(
            "response" not in columns or response in fields,
            f"{row_id}: no column {response!r}; this row has {names}.",
        )
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
    if not all(map(is_unicode, [prompt_text(prompt), *texts.values()])):
        return "not valid Unicode"
    if not prompt_text(prompt).strip() or any(not texts[c].strip() for c in columns):
        return "empty"
    if {"chosen", "rejected"} <= set(columns) and texts["chosen"] == texts["rejected"]:
        return "identical chosen and rejected"
    return Row(row_id, prompt, texts.get("chosen"), texts.get("rejected"), texts.get("response"))


def is_unicode(text: str) -> bool:
    """Whether text can be encoded: JSON's escapes can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require_prompt(row_id: str, prompt) -> None:
    fine = isinstance(prompt, str) or (
        isinstance(prompt, list)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt)
        and all(isinstance(m.get("role"), str) for m in prompt)
    )
    require(
        fine,
        f"{row_id}: 'prompt' must be text or a list of {{role, content}} messages, this is a "
        f"{type(prompt).__name__}.",
    )


def _split_response(row_id: str, key: str, value) -> tuple[list[dict], str]:
    """(messages before the last assistant turn, or [] if
    there are none; that turn's text) of a response column."""
    if isinstance(value, str):
        if value.startswith("\n\nHuman:") and "\n\nAssistant:" in value:
            messages = parse_dialogue(value)
            if messages[-1]["role"] == "assistant":
                return messages[:-1], messages[-1]["content"]
        return [], value
    _require_prompt(f"{row_id}, column {key!r}", value)
    require(
        bool(value) and value[-1]["role"] == "assistant",
        f"{row_id}: column {key!r} must end with an assistant message.",
    )
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


# --- demonstrations ---


def bare(prompt: Prompt) -> str:
    """A prompt's text however it is written: messages, plain text, or HH-RLHF's dialogue with or without the
    last "Assistant:"."""
    if isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
        prompt = [message for message in parse_dialogue(prompt) if message["content"]]
    return prompt_text(prompt).strip()


def require_no_leak(flag: str, rows: list[Row], held_out: list[Row]) -> None:
    """Raise `UserError` if a prompt of `rows`, given by `flag`, is held out for evaluation."""
    aside = {bare(row.prompt) for row in held_out}
    leaked = [row.id for row in rows if bare(row.prompt) in aside]
    require(
        not leaked,
        f"{flag}: {len(leaked)} of its prompts are held out for evaluation ({', '.join(leaked[:3])}). "
        "Remove them, or hold out others with another --dataset or --eval-prompts.",
    )


def select_by_score(rows: list[Row], judge, least: float | None, count: int | None, seed: int) -> list[Row]:
    """Rows whose demonstration `judge` scores at least `least` (None keeps all), in an order fixed by the
    seed: a few more than `count`.

    Raises `UserError` if the judge has no scalar score, or no row scores that much.
    """
    if least is None:
        return rows
    require(
        judge.score is not None,
        f"--min-demonstration-score needs a judge with a scalar score; {judge.name} has none. Give None to "
        "keep all.",
    )
    rows, kept, seen = list(rows), [], 0
    random.Random(seed).shuffle(rows)
    for start in range(0, len(rows), 1024):
        part = rows[start : start + 1024]
        scores = judge.score([row.prompt for row in part], [row.response for row in part])
        kept += [row for row, score in zip(part, scores.tolist(), strict=True) if score >= least]
        seen += len(part)
        if count is not None and len(kept) >= 1.25 * count + 16:  # some will be too long, or share a prompt
            break
    print(f"demonstrations: {len(kept):,} of {seen:,} score at least {least} by the judge {judge.name}")
    require(
        bool(kept),
        f"--min-demonstration-score {least}: no demonstration scores that much; lower it, or None.",
    )
    return kept
