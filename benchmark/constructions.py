"""Reward models from demonstrations beside each other: the Best-of-N reports of several finished runs of
afd.py in one table and one plot.

    for seed in 1 2; do
        python afd.py --pairs init-sft init-demo sft-demo preference --extrapolate best-of-n \\
            --seed $seed --run-name four-$seed
    done
    python benchmark/constructions.py runs/four-1 runs/four-2    # writes results/constructions.*

The runs' settings and commits go into the JSON file with the curves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import record
import tyro


def main(runs: tyro.conf.Positional[tuple[Path, ...]], name: str = "constructions") -> None:
    """Read the reports, write the table, the plot and every curve.

    Args:
        runs: finished run folders of `afd.py --objective irl`, one a seed, with the same settings.
        name: of the files written to benchmark/results.
    """
    for run in runs:
        if not (run / "best_of_n.json").exists():
            sys.exit(f"error: {run}: no best_of_n.json there; give finished runs of afd.py --objective irl.")
    reports = [json.loads((run / "best_of_n.json").read_text()) for run in runs]
    rankers = [name for name in reports[0]["rankers"] if all(name in report["rankers"] for report in reports)]
    out, result = record.RESULTS, {"command": record.command(), "runs": []}
    for run, report in zip(runs, reports, strict=True):
        origin = record.of_run(run)
        kept = {key: origin[key] for key in ("args", "git_commit", "git_dirty", "versions", "device_name")}
        result["runs"].append({**kept, **report})
    record.write(out / f"{name}.json", result)
    (out / f"{name}.md").write_text(table(reports, rankers))
    plot(reports, rankers, out / f"{name}.png")
    print((out / f"{name}.md").read_text())


def table(reports: list[dict], rankers: list[str]) -> str:
    """Markdown: one line a ranker; cells are the seeds' values."""
    last = reports[0]["n"][-1]
    header = f"ranked by | score at N = 1 | 4 | {last} | win rate at {last} against 1 | 95 % intervals"
    lines = [f"| {header} | accuracy on held-out pairs of its kind |", "|---" * 7 + "|"]
    for name in rankers:
        curves = [report["rankers"][name] for report in reports]
        cells = [show([curve["score"][n - 1] for curve in curves]) for n in (1, min(4, last), last)]
        cells.append(show([curve["win_rate"][-1] for curve in curves]))
        bands = [(curve["win_rate_low"][-1], curve["win_rate_high"][-1]) for curve in curves]
        cells.append(" / ".join(f"[{low:.3f}, {high:.3f}]" for low, high in bands))
        separable = [curve.get("separability") for curve in curves]
        cells.append("" if separable[0] is None else show(separable))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def show(values: list[float | None]) -> str:
    """One cell: the seeds' values."""
    return " / ".join("" if value is None else f"{value:.3f}" for value in values)


def plot(reports: list[dict], rankers: list[str], path: Path) -> None:
    """Score and win rate over N: a thin line a seed, a thick one their mean; baselines dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6))
    panels = {"score": "judge's score of the best of N", "win_rate": "win rate against N = 1"}
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(rankers):
            curves = [report["rankers"][name][key] for report in reports]
            style = "-" if name.startswith("reward") or name == "log-ratio" else "--"
            for curve in curves:
                axis.plot(reports[0]["n"], curve, style, color=f"C{i}", alpha=0.35, linewidth=0.8)
            mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            axis.plot(reports[0]["n"], mean, style, color=f"C{i}", linewidth=2, label=name)
        axis.set_xlabel("N")
        axis.set_title(title, fontsize=10)
        # the judge's own choice, far above, would flatten the others
        axis.set_ylim(top=min(axis.get_ylim()[1], 0.8))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
