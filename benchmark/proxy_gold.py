"""What a learned judge is worth once a policy is optimised against it: proxy and gold over training, in the
shape of arXiv 2210.10760.

    python benchmark/proxy_gold.py --seeds 2

A reward model learns from the sentiment lexicon's verdicts (`python preference_model.py`). SELM and Nash-MD
are then aligned with the reward model, the proxy, and `benchmark/watched.py` has their policies scored by the
lexicon itself, the gold, which no step asks. Runs go to --run-dir and are reused if finished there;
`benchmark/results/proxy_gold.json` keeps each run's command, commit, versions, summary and curves,
proxy_gold.png the plot.
"""

from __future__ import annotations

import json
from pathlib import Path

import record
import tyro

JUDGE = "preference_model.py"
METHODS = {  # name: its script and flags; a third more steps than its default run has
    "SELM": "selm --num-prompts 256 --iterations 4 --max-new-tokens 16",
    "Nash-MD": "nash_md --max-steps 32 --epochs 2 --max-new-tokens 16",
}


def main(seeds: int = 2, run_dir: str = "runs/proxy_gold", judge: str | None = None, flags: str = "") -> None:
    """Train the judge and the policies, and write what came of it.

    Args:
        seeds: seeds 1 to this number.
        run_dir: where the run folders go; finished ones are reused.
        judge: run folder of a finished reward model, instead of training one.
        flags: more flags for the policies' runs, in one string.
    """
    folder = Path(run_dir).resolve()
    proxy = Path(judge).resolve() if judge else folder / "judge"
    record.run_once(JUDGE, proxy)
    rows = []
    for method, words in METHODS.items():
        for seed in range(1, seeds + 1):
            where = folder / f"{method}-seed{seed}"
            command = (
                f"benchmark/watched.py {words} --judge hf:{proxy}/model --seed {seed} --save-every 0 {flags}"
            )
            command = command.strip()
            record.run_once(command, where)
            lines = (where / "watched.jsonl").read_text().splitlines()
            rows.append(
                record.result(where, command)
                | {"method": method, "seed": seed, "curve": [json.loads(x) for x in lines]}
            )
    out = record.RESULTS / "proxy_gold"
    record.write(
        f"{out}.json", {"command": record.command(), "judge": record.result(proxy, JUDGE), "runs": rows}
    )
    plot(rows, f"{out}.png")
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Markdown: for each run the ends of both curves, and the step at which gold was highest."""
    lines = [
        "| run | KL, nats | proxy | gold | highest gold | proxy win rate | gold win rate | distinct bigrams|",
        "|---" * 8 + "|",
    ]
    for row in rows:
        start, last, best = (
            row["curve"][0],
            row["curve"][-1],
            max(row["curve"], key=lambda point: point["gold"]),
        )
        cells = [f"{last[key]:.2f}" for key in ("kl", "proxy", "gold")]
        cells.append(f"{best['gold']:.2f} at step {best['step']}, KL {best['kl']:.1f}")
        cells += [f"{last[key]:.3f}" for key in ("proxy_win_rate", "gold_win_rate")]
        cells.append(f"{start['distinct_2']:.3f} to {last['distinct_2']:.3f}")
        lines.append(f"| {row['method']}, seed {row['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], file: str) -> None:
    """Proxy (dashed) and gold (solid) over √KL, one panel a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(METHODS), figsize=(5.2 * len(METHODS), 4.2), sharey=True, squeeze=False
    )
    for axis, method in zip(axes.flat, METHODS, strict=True):
        for row in (row for row in rows if row["method"] == method):
            curve, color = row["curve"], f"C{row['seed'] - 1}"
            distance = [max(0.0, point["kl"]) ** 0.5 for point in curve]
            for name, style in (("proxy", "--"), ("gold", "-")):
                values = [point[name] for point in curve]
                label = f"{name}, seed {row['seed']}"
                axis.plot(distance, values, style, color=color, marker=".", linewidth=1.4, label=label)
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("√KL(policy ‖ starting model), nats a reply", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes.flat[0].set_ylabel("mean log-odds over the starting model's reply, nats", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
