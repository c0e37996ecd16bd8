"""Adversarial imitation over its updates: afd.py --objective reverse-kl and js from one SFT model, several seeds,
curves in one plot.

    python benchmark/adversarial.py --seeds 3       # seven runs; finished ones are reused
    python benchmark/adversarial.py --redraw        # only plot and table anew

The judge's score of the policy's samples is there to look at; nothing learned from it. Writes
benchmark/results/adversarial.json, .md and .png.
"""

from __future__ import annotations

import json
from pathlib import Path

import record
import tyro
from compare import show, smooth

SFT = "afd.py --objective forward-kl --micro-batch-tokens 768 --save-every 0"
FLAGS = "--policy-steps 100 --batch-size 8 --samples-per-prompt 2 --micro-batch-tokens 768 --save-every 0"
OBJECTIVES = ("reverse-kl", "js")
PANELS = {
    "score": "judge's score of the policy's samples",
    "discriminator_accuracy": "discriminator's accuracy on its batch, before its update",
    "kl": "KL(π ‖ π_SFT), nats per reply",
    "length": "tokens per reply",
}
COLUMNS = ("score_after", "win_rate", "eval_judge_win_rate", "length_after", "distinct_2_after", "kl")


def main(seeds: int = 3, run_dir: str = "runs/adversarial", redraw: bool = False) -> None:
    """Run what is not finished yet; write curves, summaries and the table.

    Args:
        seeds: seeds 1 to this number.
        run_dir: where the run folders go.
        redraw: draw the recorded results again, run nothing.
    """
    file = record.RESULTS / "adversarial.json"
    if redraw:
        return report(json.loads(file.read_text()))
    folder = Path(run_dir).resolve()
    record.run_once(SFT, folder / "sft")
    result = {"command": record.command(), "sft": record.result(folder / "sft", SFT), "runs": []}
    for seed in range(1, seeds + 1):
        for objective in OBJECTIVES:
            where = folder / f"{objective}-seed{seed}"
            command = f"afd.py --objective {objective} --sft-model {folder}/sft/sft {FLAGS} --seed {seed}"
            record.run_once(command, where)
            steps = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
            curves = {}
            for key in PANELS:
                logged = f"adversarial/{key}"
                curves[key] = [step[logged] for step in steps if logged in step]
            row = {"objective": objective, "seed": seed, **record.result(where, command), "curves": curves}
            result["runs"].append(row)
            record.write(file, result)
    report(result)


def report(result: dict) -> None:
    """Write the plot and the table, and print the table."""
    plot(result["runs"])
    text = table(result)
    (record.RESULTS / "adversarial.md").write_text(text)
    print(text)


def table(result: dict) -> str:
    """Markdown: the SFT model and each objective, a cell with every seed's figure."""
    lines = [
        "| | " + " | ".join(column.replace("_", " ") for column in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    groups = {"SFT": [result["sft"]]}
    groups |= {name: [row for row in result["runs"] if row["objective"] == name] for name in OBJECTIVES}
    for name, rows in groups.items():
        cells = [" / ".join(show(row["summary"].get(column)) for row in rows) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict]) -> None:
    """A panel a metric over policy updates: a thin line a seed, a thick one the mean over seeds and five
    updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7))
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        for i, objective in enumerate(OBJECTIVES):
            curves = [row["curves"][key] for row in rows if row["objective"] == objective]
            for curve in curves:
                axis.plot(range(1, len(curve) + 1), curve, color=f"C{i}", alpha=0.3, linewidth=0.7)
            mean = smooth([sum(values) / len(values) for values in zip(*curves, strict=True)])
            axis.plot(range(1, len(mean) + 1), mean, color=f"C{i}", linewidth=2, label=objective)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("policy update")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(record.RESULTS / "adversarial.png", dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
