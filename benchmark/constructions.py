"""Reward models from demonstrations beside each other: the Best-of-N reports of several finished runs of afd.py in one table and one plot.

    for seed in 1 2; do python afd.py --pairs init-sft init-demo sft-demo preference --extrapolate best-of-n --seed $seed --run-name four-$seed; done
    python benchmark/constructions.py runs/four-1 runs/four-2        # writes results/constructions.json, .md and .png

The runs' settings and commits go into the JSON file with the curves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent


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
    origins = [json.loads((run / "args.json").read_text()) for run in runs]
    rankers = [name for name in reports[0]["rankers"] if all(name in report["rankers"] for report in reports)]
    out = ROOT / "benchmark" / "results"
    keep = ("args", "git_commit", "git_dirty", "versions", "device_name")
    result = {
        "command": " ".join(["python", *sys.argv]),
        "runs": [
            {key: origin[key] for key in keep} | report
            for origin, report in zip(origins, reports, strict=True)
        ],
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text(table(reports, rankers))
    plot(reports, rankers, out / f"{name}.png")
    print((out / f"{name}.md").read_text())


def table(reports: list[dict], rankers: list[str]) -> str:
    """Markdown: one line a ranker; cells are the seeds' values."""
    last = reports[0]["n"][-1]
    lines = [
        f"| ranked by | score at N = 1 | 4 | {last} | win rate at {last} against 1 | 95 % intervals | accuracy on held-out pairs of its kind |",
        "|---" * 7 + "|",
    ]
    show = lambda values: " / ".join("" if value is None else f"{value:.3f}" for value in values)  # noqa: E731
    for name in rankers:
        curves = [report["rankers"][name] for report in reports]
        at = [show(curve["score"][n - 1] for curve in curves) for n in (1, min(4, last), last)]
        band = " / ".join(
            f"[{curve['win_rate_low'][-1]:.3f}, {curve['win_rate_high'][-1]:.3f}]" for curve in curves
        )
        separability = (
            show(c.get("separability") for c in curves) if curves[0].get("separability") is not None else ""
        )
        lines.append(
            f"| {name} | {' | '.join(at)} | {show(c['win_rate'][-1] for c in curves)} | {band} | {separability} |"
        )
    return "\n".join(lines) + "\n"


def plot(reports: list[dict], rankers: list[str], path: Path) -> None:
    """Score and win rate over N: a thin line a seed, a thick one their mean; baselines dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6))
    for axis, key, title in zip(
        axes, ("score", "win_rate"), ("judge's score of the best of N", "win rate against N = 1"), strict=True
    ):
        for i, name in enumerate(rankers):
            curves = [report["rankers"][name][key] for report in reports]
            style = "-" if name.startswith("reward") or name == "log-ratio" else "--"
            for curve in curves:
                axis.plot(reports[0]["n"], curve, style, color=f"C{i}", alpha=0.35, linewidth=0.8)
            axis.plot(
                reports[0]["n"],
                [sum(v) / len(v) for v in zip(*curves, strict=True)],
                style,
                color=f"C{i}",
                linewidth=2,
                label=name,
            )
        axis.set_xlabel("N")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(
            top=min(axis.get_ylim()[1], 0.8)
        )  # the judge's own choice, far above, would flatten the others
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
