"""One record of what each script's default run did: command, commit, versions, summary.

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

SCRIPTS = ("selm", "ipo_md", "nash_md", "afd", "spin", "preference_model")
COLUMNS = ("win_rate", "win_rate_interval", "eval_judge_win_rate", "accuracy", "accuracy_interval", "kl")
COLUMNS += ("seconds", "peak_memory_bytes")


def main(scripts: tyro.conf.Positional[tuple[str, ...]] = SCRIPTS, run_dir: str = "runs/default") -> None:
    """Run what is not finished yet, and record.

    Args:
        scripts: names without .py.
        run_dir: where the run folders go.
    """
    if unknown := set(scripts) - set(SCRIPTS):
        sys.exit(f"error: no default run of {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}.")
    file = record.RESULTS / "default_runs.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    folder = Path(run_dir).resolve()
    for script in scripts:
        record.run_once(f"{script}.py", folder / script)
        results[script] = record.result(folder / script, f"{script}.py")
        record.write(file, results)
        summary = results[script]["summary"]
        shown = {key: summary[key] for key in COLUMNS if summary.get(key) is not None}
        print(f"{script}.py, {results[script]['git_commit'][:7]}: {shown}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
