"""One record of what each script's default run did, and afd.py on real data: command, commit, versions,
summary.

    python benchmark/default_runs.py                             # all of them, one after the other
    python benchmark/default_runs.py preference_model --run-dir runs

Runs go to --run-dir and are reused if finished there. Writes its scripts' parts of
benchmark/results/default_runs.json, and prints the table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import record
import tyro

RUNS = {  # name: command
    **{name: f"{name}.py" for name in ("selm", "ipo_md", "nash_md", "afd", "spin", "preference_model")},
    "hh-harmless": "afd.py --dataset ../shared/data/hh_rlhf_harmless_base_test.jsonl.gz --demonstrations chosen"
    " --min-demonstration-score None --preferences data --pairs preference init-sft --max-prompt-length 128"
    " --max-new-tokens 32 --num-prompts 128 --dev-prompts 16 --eval-prompts 128 --reward-prompts 96 --max-n 2"
    " --extrapolate best-of-n --epochs 1 --micro-batch-tokens 768",
    "alpaca-eval": "afd.py --dataset ../shared/data/alpaca_eval_outputs.jsonl.gz"
    " --demonstrations response_gpt4_1106_preview --min-demonstration-score None --num-prompts 96"
    " --dev-prompts 12 --eval-prompts 32 --max-new-tokens 32 --reward-prompts 48 --max-n 4"
    " --micro-batch-tokens 768",
}
COLUMNS = ("win_rate", "win_rate_interval", "eval_judge_win_rate", "accuracy", "accuracy_interval", "kl")
COLUMNS += ("seconds", "peak_memory_bytes")


def main(names: tyro.conf.Positional[tuple[str, ...]] = tuple(RUNS), run_dir: str = "runs/default") -> None:
    """Run what is not finished yet, and record.

    Args:
        names: a script without .py; hh-harmless and alpaca-eval are afd.py on ../shared/data.
        run_dir: where the run folders go.
    """
    if unknown := set(names) - set(RUNS):
        sys.exit(f"error: no run called {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}.")
    file = record.RESULTS / "default_runs.json"
    folder = Path(run_dir).resolve()
    for name in names:
        record.run_once(RUNS[name], folder / name)
        row = record.result(folder / name, RUNS[name])
        if (folder / name / "best_of_n.json").exists():
            row["best_of_n"] = json.loads((folder / name / "best_of_n.json").read_text())
        results = json.loads(file.read_text()) if file.exists() else {}
        record.write(file, results | {name: row})
        shown = {key: row["summary"][key] for key in COLUMNS if row["summary"].get(key) is not None}
        print(f"{name}, {row['git_commit'][:7]}: {shown}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
