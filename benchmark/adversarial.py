"""Adversarial imitation over its updates: the curves of finished runs of afd.py --objective reverse-kl and js
in one plot.

    python afd.py --objective reverse-kl --sft-model runs/NAME/sft --run-name rkl
    python afd.py --objective js --sft-model runs/NAME/sft --run-name js
    python benchmark/adversarial.py runs/rkl runs/js       # writes results/adversarial.png and .json

The judge's score of the policy's samples is there to look at; nothing learned from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import record
import tyro
from compare import smooth

PANELS = {
    "score": "judge's score of the policy's samples",
    "discriminator_accuracy": "discriminator's accuracy on its batch, before its update",
    "kl": "KL(π ‖ π_SFT), nats per reply",
    "length": "tokens per reply",
}


def main(runs: tyro.conf.Positional[tuple[Path, ...]], name: str = "adversarial") -> None:
    """Read the runs' metrics; write the plot, and summaries and curves as JSON.

    Args:
        runs: finished run folders.
        name: of the files written to benchmark/results.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7))
    result = {"command": record.command(), "runs": []}
    for i, run in enumerate(runs):
        if not (run / "summary.json").exists():
            finished = "give finished runs of afd.py --objective reverse-kl or js"
            sys.exit(f"error: {run}: no summary.json there; {finished}.")
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves = {}
        for key in PANELS:
            logged = f"adversarial/{key}"
            curves[key] = [step[logged] for step in steps if logged in step]
        summary = json.loads((run / "summary.json").read_text())
        result["runs"].append({**record.of_run(run), "summary": summary, "curves": curves})
        for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
            values, label = curves[key], summary["objective"]
            updates = range(1, len(values) + 1)
            axis.plot(updates, values, color=f"C{i}", alpha=0.35, linewidth=0.8)
            axis.plot(updates, smooth(values), color=f"C{i}", linewidth=2, label=label)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("policy update")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{name}.png", dpi=110)
    record.write(record.RESULTS / f"{name}.json", result)


if __name__ == "__main__":
    tyro.cli(main)
