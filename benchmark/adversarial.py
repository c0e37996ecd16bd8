"""Adversarial imitation over its updates: afd.py --objective reverse-kl and js from one SFT model, several
seeds, curves in one plot.

    python benchmark/adversarial.py --seeds 3                  # SmolLM2: half an hour a run on one thread
    python benchmark/adversarial.py --scale small --seeds 5    # a model of a million weights: a minute or two
    python benchmark/adversarial.py --redraw                   # only plot and table anew

The small model is the start of `benchmark/compare.py cycle`, which that makes (--run-dir). The judge's score
of the policy's samples is there to look at; nothing learned from it. Finished runs are reused; writes
benchmark/results/adversarial.json, .md and .png, or adversarial_small.*.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import record
import tyro
from compare import plot, table

SCALES = {  # name: (flags of both stages, of SFT, of the adversarial stage)
    "smollm2": ("--micro-batch-tokens 768", "", "--batch-size 8 --samples-per-prompt 2"),
    "small": (
        "--model {small} --dtype float32 --micro-batch-tokens 4096 --num-prompts 8000 --eval-prompts 512",
        "--learning-rate 1e-3 --batch-size 64 --epochs 1",
        "--batch-size 16 --samples-per-prompt 4 --policy-learning-rate 4e-4 --reward-learning-rate 4e-4",
    ),
}
OBJECTIVES = ("reverse-kl", "js")
PANELS = {
    "score": "judge's score of the policy's samples",
    "discriminator_accuracy": "discriminator's accuracy on its batch, before its update",
    "kl": "KL(π ‖ π_SFT), nats per reply",
    "length": "tokens per reply",
}


def main(
    scale: Literal["smollm2", "small"] = "smollm2",
    seeds: int = 3,
    updates: int = 100,
    run_dir: str = "runs/adversarial",
    small: str = "runs/compare/cycle-sft/model",
    redraw: bool = False,
) -> None:
    """Run what is not finished yet; write curves, summaries and the table.

    Args:
        scale: whose runs.
        seeds: seeds 1 to this number.
        updates: policy updates of a run.
        run_dir: where the run folders go.
        small: the small model's folder.
        redraw: draw the recorded results again, run nothing.
    """
    file = record.RESULTS / ("adversarial.json" if scale == "smollm2" else "adversarial_small.json")
    if redraw:
        return report(file)
    folder = Path(run_dir).resolve()
    both, of_sft, of_policy = (flags.format(small=Path(small).resolve()) for flags in SCALES[scale])
    both += " --save-every 0"
    command = " ".join(f"afd.py --objective forward-kl {both} {of_sft}".split())
    record.run_once(command, folder / "sft")
    result = {"command": record.command(), "sft": record.result(folder / "sft", command), "runs": []}
    for seed in range(1, seeds + 1):
        for objective in OBJECTIVES:
            where = folder / f"{objective}-seed{seed}"
            command = f"afd.py --objective {objective} --sft-model {folder}/sft/sft {both} {of_policy}"
            command += f" --policy-steps {updates} --seed {seed}"
            record.run_once(command, where)
            steps = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
            curves = {}
            for key in PANELS:
                logged = f"adversarial/{key}"
                curves[key] = [step[logged] for step in steps if logged in step]
            row = {"objective": objective, "seed": seed, **record.result(where, command), "curves": curves}
            result["runs"].append(row)
            record.write(file, result)
    report(file)


def report(file: Path) -> None:
    """Write the plot and the table beside the JSON `file`, and print the table."""
    result = json.loads(file.read_text())
    rows = [{"variant": row["objective"], "summary": row["summary"]} for row in result["runs"]]
    text = table([{"variant": "SFT", "summary": result["sft"]["summary"]}, *rows], ["SFT", *OBJECTIVES])
    file.with_suffix(".md").write_text(text)
    print(text)
    curves = [{"variant": row["objective"], **from_the_start(row["curves"])} for row in result["runs"]]
    plot(curves, list(OBJECTIVES), tuple(PANELS), file.with_suffix(".png"), PANELS)


def from_the_start(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    """The curves at equal length: KL and length are logged once the discriminator's steps alone are over."""
    longest = max(map(len, curves.values()))
    return {key: [math.nan] * (longest - len(values)) + values for key, values in curves.items()}


if __name__ == "__main__":
    tyro.cli(main)
