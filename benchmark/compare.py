"""Studies: several variants of the scripts, several seeds each, one table and one plot.

    python benchmark/compare.py selm --seeds 3        # SELM against iterative DPO on the default task
    python benchmark/compare.py ipo --seeds 2         # IPO-MD, online-IPO, online DPO, online SLiC
    python benchmark/compare.py cycle --seeds 5       # who keeps all styles alive under an intransitive judge
    python benchmark/compare.py cycle --redraw        # only the plot anew, from results/cycle.json

Runs go to --run-dir and are reused if finished there; `benchmark/results/STUDY.json` keeps each run's
command, commit, versions and summary, STUDY.md the table and STUDY.png the curves. Runs side by side share
the machine's cores: their win rates count, their seconds do not.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import record
import tyro

sys.path.insert(0, str(record.ROOT / "docs"))

import theory

from cleanalign.games import mixture_exploitability
from judges import STYLES

# Hundreds of steps with five seeds: a small model that PREPARE teaches human replies, which hold more questions
# and exclamations than SmolLM2's.
CYCLE = (
    "--model {run_dir}/cycle-sft/model --dtype float32 --judge cycle --eval-judge None --eval-prompts 256"
    " --tau 0.1 --learning-rate 4e-4 --batch-size 16 --num-prompts None --max-steps 200"
    " --micro-batch-tokens 4096"
)
TITLES = {"score": "judge's score of the sampled replies"}  # of panels; else the metric's name
LATE = 100  # steps at the end of a run of the cycle study that are looked at together
# the scalar: Bradley-Terry fitted to the judge by benchmark/cycle_reward.py
CYCLE_SCALAR = CYCLE.replace("--judge cycle", "--judge benchmark/cycle_reward.py:small_reward")
PREPARE = {  # study: (file or folder made, the command that makes it)
    "cycle": (
        ("{run_dir}/small", "benchmark/small_model.py --out {run_dir}/small"),
        (
            "{run_dir}/cycle-sft/model",
            "afd.py --objective forward-kl --model {run_dir}/small --dtype float32"
            " --min-demonstration-score None --num-prompts 32000 --epochs 1 --learning-rate 3e-3"
            " --batch-size 64 --micro-batch-tokens 4096 --judge cycle --eval-judge None --eval-prompts 256"
            " --save-every 0 --run-dir {run_dir} --run-name cycle-sft",
        ),
        (
            str(record.RESULTS / "cycle_small_reward.json"),
            "benchmark/cycle_reward.py --model {run_dir}/cycle-sft/model --prompts 4096"
            " --name cycle_small_reward",
        ),
    )
}
STUDIES = {  # study: (metrics of the plot, {variant: command})
    "selm": (("score",), {"SELM, α = 0.001": "selm.py", "iterative DPO, α = 0": "selm.py --alpha 0"}),
    "ipo": (
        ("score",),
        {
            "IPO-MD, β = .125": "ipo_md.py",
            "online-IPO": "ipo_md.py --beta 0",
            "online DPO": "ipo_md.py --loss dpo --beta 0 --tau 0.1",
            "online SLiC": "ipo_md.py --loss slic --beta 0 --tau 0.1",
        },
    ),
    "cycle": (
        ("exploitability", "style/question", "style/exclamation", "style/statement"),
        {
            "Nash-MD, self": f"nash_md.py {CYCLE} --opponent self",
            "Nash-MD, mixture": f"nash_md.py {CYCLE}",
            "IPO-MD": f"ipo_md.py {CYCLE}",
            "online DPO": f"ipo_md.py {CYCLE} --loss dpo --beta 0",
            # near p = ½ that is IPO's strength at τ = .1: docs/theory.md
            "online DPO, 4τ": f"ipo_md.py {CYCLE.replace('--tau 0.1', '--tau 0.4')} --loss dpo --beta 0",
            "RLHF": f"nash_md.py {CYCLE_SCALAR} --objective rlhf",
        },
    ),
}
COLUMNS = (
    "win_rate",
    "eval_judge_win_rate",
    "score_after",
    "kl",
    "distinct_2_after",
    "length_after",
    "exploitability_after",
)
COLUMNS += tuple(f"style/{style}_after" for style in STYLES)
COLUMNS += ("late_exploitability", *(f"late_style/{style}" for style in STYLES), "late_swing")


def main(
    study: tyro.conf.Positional[str],
    seeds: int = 2,
    jobs: int = 1,
    run_dir: str = "runs/compare",
    flags: str = "",
    redraw: bool = False,
) -> None:
    """Run a study and write its results.

    Args:
        study: selm, ipo or cycle.
        seeds: seeds 1 to this number.
        jobs: runs at once, among which the CPU's cores are divided.
        run_dir: where the run folders go; finished ones are reused.
        flags: more flags for every run, in one string.
        redraw: draw the recorded results again, run nothing.
    """
    if study not in STUDIES:
        sys.exit(f"error: no study {study!r}; there are {', '.join(STUDIES)}.")
    metrics, variants = STUDIES[study]
    out = record.RESULTS
    if redraw:
        rows = json.loads((out / f"{study}.json").read_text())["runs"]
        return plot(rows, list(variants), metrics, out / f"{study}.png")
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    run_dir = str(Path(run_dir).resolve())
    runs = [
        (name, seed, f"{command} --seed {seed} {flags}".strip())
        for seed in range(1, seeds + 1)
        for name, command in variants.items()
    ]

    def start(command: str, log: Path) -> None:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
        with open(log, "w") as lines:
            words = [sys.executable, *command.format(run_dir=run_dir).split()]
            where = dict(cwd=record.ROOT, stdout=lines, stderr=lines)
            done = subprocess.run(words, **where, env={**os.environ, **threads}, check=False)
        if done.returncode:
            print(f"failed: {command}; see {log}", file=sys.stderr)

    def run(item) -> tuple[str, int, str, Path]:
        name, seed, command = item
        folder = Path(run_dir) / f"{study}-{list(variants).index(name)}-seed{seed}"
        if not (folder / "summary.json").exists():
            start(
                f"{command} --save-every 0 --run-dir {run_dir} --run-name {folder.name}",
                folder.with_suffix(".log"),
            )
        print(f"done: {name}, seed {seed}", flush=True)
        return name, seed, command.format(run_dir=run_dir), folder

    for i, (made, command) in enumerate(PREPARE.get(study, ())):
        if not Path(made.format(run_dir=run_dir)).exists():
            start(command, Path(run_dir) / f"{study}-prepare-{i}.log")
    with ThreadPoolExecutor(jobs) as pool:
        finished = [item for item in pool.map(run, runs) if (item[3] / "summary.json").exists()]
    rows = []
    for name, seed, command, folder in finished:
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        row = {"variant": name, "seed": seed, **record.result(folder, command)}
        row |= {metric: [step.get(metric) for step in steps] for metric in metrics}
        rows.append(row | (late(row) if study == "cycle" else {}))
    record.write(out / f"{study}.json", {"command": record.command(), "runs": rows})
    (out / f"{study}.md").write_text(table(rows, list(variants)))
    plot(rows, list(variants), metrics, out / f"{study}.png")
    print((out / f"{study}.md").read_text())


def late(row: dict) -> dict:
    """A cycle run's last `LATE` steps taken together: the styles' mean shares, the exploitability of that mix,
    and how far a share swings (the standard deviation of running means over five steps, averaged over styles).

    A step's own exploitability is a maximum over the noisy shares of one batch and so reads high; of the mean
    shares it hardly does. A policy that circles has a safe mean and a large swing.
    """
    shares = [row[f"style/{style}"][-LATE:] for style in STYLES]
    means = [sum(values) / len(values) for values in shares]
    swings = [statistics.pstdev(smooth(values)) for values in shares]
    return {
        "late_exploitability": mixture_exploitability(theory.rock_paper_scissors().tolist(), means),
        **{f"late_style/{style}": value for style, value in zip(STYLES, means, strict=True)},
        "late_swing": sum(swings) / len(swings),
    }


def table(rows: list[dict], variants: list[str]) -> str:
    """Markdown: one line a variant, in each cell what `show_all` makes of the seeds' values."""
    rows = [{"variant": row["variant"], **row["summary"], **row} for row in rows]
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    lines = [
        "| variant | " + " | ".join(c.replace("_", " ") for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in variants:
        mine = [row for row in rows if row["variant"] == name]
        cells = [show_all([row.get(column) for row in mine]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def show_all(values: list[float | None]) -> str:
    """Each seed's figure; of more than three the mean ± its standard error."""
    if len(values) <= 3 or None in values:
        return " / ".join(map(show, values))
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{show(sum(values) / len(values))} ± {error:.3f}"


def show(value: float | None) -> str:
    """A figure with about four digits."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def smooth(values: list[float]) -> list[float]:
    """Running mean over five steps, fewer at the ends."""
    near = (values[max(0, t - 2) : t + 3] for t in range(len(values)))
    return [sum(part) / len(part) for part in near]


def plot(
    rows: list[dict], variants: list[str], metrics: tuple[str, ...], path: Path, titles: dict = TITLES
) -> None:
    """A panel a metric over steps: a thin line a seed, a thick one the mean over seeds and five steps; of the
    cycle study also where each algorithm would come to rest, dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(metrics))
    figure, axes = plt.subplots(
        -(-len(metrics) // columns),
        columns,
        figsize=(7 if columns == 1 else 11, 4 * -(-len(metrics) // columns)),
        squeeze=False,
        layout="constrained",
    )
    for axis, metric in zip(axes.flat, metrics, strict=True):
        for i, name in enumerate(variants):
            curves = [row[metric] for row in rows if row["variant"] == name]
            for curve in curves:
                axis.plot(range(1, len(curve) + 1), curve, color=f"C{i}", alpha=0.3, linewidth=0.8)
            if curves:
                mean = [sum(values) / len(values) for values in zip(*curves, strict=False)]
                axis.plot(range(1, len(mean) + 1), smooth(mean), color=f"C{i}", linewidth=2, label=name)
            rest = resting(name, metric)
            if curves and rest is not None:
                axis.axhline(rest, color=f"C{i}", linestyle=":", linewidth=1.5)
        axis.set_xlabel("optimiser step")
        axis.set_title(titles.get(metric, metric), fontsize=10)
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)


def resting(variant: str, metric: str) -> float | None:
    """The metric at the variant's resting point, if `benchmark/resting_points.py` knows one."""
    known = json.loads((record.RESULTS / "resting_points.json").read_text())["cycle"]
    if variant not in known["points"]:
        return None
    if metric == "exploitability":
        return known["exploitability"][variant]
    return known["points"][variant][[f"style/{style}" for style in STYLES].index(metric)]


if __name__ == "__main__":
    tyro.cli(main)
