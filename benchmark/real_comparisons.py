"""Judges trained on real comparisons, beside the obvious baselines: GPT-4's choices on AlpacaEval, people's
on HH-RLHF harmless.

    python benchmark/real_comparisons.py alpaca-eval --data ../shared/data
    python benchmark/real_comparisons.py hh-harmless --data ../shared/data

Runs go to --run-dir and are reused if finished there; `benchmark/results/comparisons_SET.json` keeps each
run's command, commit, versions and summary, and the baselines on the same held-out pairs:

    chance       ½
    longer       the reply with more characters
    generator    AlpacaEval only: Bradley-Terry strengths of the models that wrote the replies, fitted to all
                 training pairs. It never reads a reply; the same models wrote the test set's.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections import Counter
from pathlib import Path

import record
import tyro

sys.path.insert(0, str(record.ROOT))

from cleanalign.statistics import clustered_interval, judged_right

SETS = {  # set: (training file, test file or None, flags)
    "alpaca-eval": (
        "alpaca_eval_gpt4_preferences_train.jsonl.gz",
        "alpaca_eval_gpt4_preferences_test.jsonl.gz",
        "--num-prompts None --pairs-per-prompt 3 --eval-prompts 125 --max-prompt-length 128"
        " --max-new-tokens 128",
    ),
    "hh-harmless": (
        "hh_rlhf_harmless_base_test.jsonl.gz",
        None,
        "--num-prompts None --max-prompt-length 192 --max-new-tokens 96 --eval-prompts 400",
    ),
}


def main(
    name: tyro.conf.Positional[str],
    data: str,
    kinds: tuple[str, ...] = ("reward", "pairwise"),
    run_dir: str = "runs/comparisons",
    flags: str = "",
) -> None:
    """Train judges on a set and write how they do beside the baselines.

    Args:
        name: alpaca-eval or hh-harmless.
        data: folder with the sets' files.
        kinds: kinds of judges to train.
        run_dir: where the run folders go; finished ones are reused.
        flags: more flags for every run, in one string.
    """
    if name not in SETS:
        sys.exit(f"error: no set {name!r}; there are {', '.join(SETS)}.")
    train, test, words = SETS[name]
    files = [Path(data).resolve() / file for file in (train, test) if file]
    command = (
        f"preference_model.py --dataset {files[0]} {words} --eval-judge None --save-every 0 {flags}".strip()
    )
    if test:
        command += f" --eval-dataset {files[1]}"
    runs, baselines = [], None
    for kind in kinds:
        folder = Path(run_dir).resolve() / f"{name}-{kind}"
        whole = f"{command} --kind {kind}"
        record.run_once(whole, folder)
        runs.append({"kind": kind, **record.result(folder, whole)})
        baselines = baselines or baselines_of(folder, files)
    out = record.RESULTS / f"comparisons_{name.replace('-', '_')}.json"
    record.write(out, {"command": record.command(), "baselines": baselines, "runs": runs})
    print(table(runs, baselines))


def read(file: Path) -> list[dict]:
    """The rows of a .jsonl.gz file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def baselines_of(folder: Path, files: list[Path]) -> dict:
    """Accuracy and interval of each baseline on a run's held-out pairs, of which a is the preferred one."""
    pairs = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    guesses = {"longer": [longer(pair) for pair in pairs]}
    if "chosen_model" in (test := read(files[-1]))[0]:
        strength = strengths(read(files[0]))
        by_id = {f"{files[-1].name}:{number}": row for number, row in enumerate(test, 1)}
        rows = [by_id[pair["id"]] for pair in pairs]
        odds = [strength[row["chosen_model"]] - strength[row["rejected_model"]] for row in rows]
        guesses["generator"] = [1 / (1 + math.exp(-x)) for x in odds]
    prompts = [pair["prompt"] for pair in pairs]
    result = {"pairs": len(pairs), "chance": 0.5}
    for name, guess in guesses.items():
        right = judged_right(guess, [1.0] * len(pairs))
        result[name] = {"accuracy": sum(right) / len(right), "interval": clustered_interval(right, prompts)}
    return result


def longer(pair: dict) -> float:
    """1 if a is longer than b, 0 if shorter, ½ if neither; in characters."""
    difference = len(pair["a"]) - len(pair["b"])
    return 0.5 if difference == 0 else float(difference > 0)


def strengths(rows: list[dict]) -> dict[str, float]:
    """Bradley-Terry log-strengths of the generators. One side of every pair is the same model, so each
    other's is its log-odds against that one; half a win is added to both sides."""
    names = Counter(name for row in rows for name in (row["chosen_model"], row["rejected_model"]))
    hub, count = names.most_common(1)[0]
    assert count == len(rows), f"{hub} is not in every pair"
    wins = Counter(row["chosen_model"] for row in rows)
    losses = Counter(row["rejected_model"] for row in rows)
    fitted = {name: math.log((wins[name] + 0.5) / (losses[name] + 0.5)) for name in names}
    return {**fitted, hub: 0.0}


def table(runs: list[dict], baselines: dict) -> str:
    """Markdown: one line a judge or baseline."""
    lines = [
        "| judge | accuracy | … where the shorter reply is preferred | log-loss | calibration error "
        "| order agreement |",
        "|---" * 6 + "|",
    ]
    for row in runs:
        s = row["summary"]
        low, high = s["accuracy_interval"]
        cells = [f"{s['accuracy']:.3f} [{low:.3f}, {high:.3f}]"]
        for key in ("accuracy_shorter_preferred", "log_loss", "calibration_error", "order_agreement"):
            cells.append("–" if s[key] is None else f"{s[key]:.3f}")
        lines.append(f"| `--kind {row['kind']}`, {s['train_pairs']:,} pairs | " + " | ".join(cells) + " |")
    for name in ("longer", "generator"):
        if name in baselines:
            low, high = baselines[name]["interval"]
            lines.append(
                f"| {name} | {baselines[name]['accuracy']:.3f} [{low:.3f}, {high:.3f}] | – | – | – | – |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
