"""What a trained judge says of itself: the reliability
diagram, its figures as a person reads them, its model card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path


def plot_reliability(table: list[dict], path: Path, title: str) -> None:
    """The diagram of `statistics.reliability`: how often the favourite was preferred, over how sure the judge
    was; a point's area is its number of pairs. Without matplotlib nothing is drawn, and that is said."""
    try:
        import matplotlib
    except ImportError:
        print("reliability.png not drawn: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    confidence, frequency, pairs = (
        [row[key] for row in table] for key in ("confidence", "frequency", "pairs")
    )
    figure, axis = plt.subplots(figsize=(4.6, 4.4))
    axis.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, linestyle="--", label="as sure as right")
    axis.plot(confidence, frequency, color="C0", linewidth=1.4)
    axis.scatter(confidence, frequency, s=[20 + 400 * n / sum(pairs) for n in pairs], color="C0")
    for x, y, n in zip(confidence, frequency, pairs, strict=True):
        axis.annotate(str(n), (x, y), textcoords="offset points", xytext=(7, -11), fontsize=7, color="0.3")
    axis.set_xlim(0.49, 1.01)
    axis.set_ylim(min(0.45, *frequency) - 0.03, 1.02)
    axis.set_xlabel("how sure the judge is of its favourite", fontsize=9)
    axis.set_ylabel("how often the favourite was preferred", fontsize=9)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report_text(summary: dict, folder: Path) -> str:
    """The result as a person reads it, and how to use the judge."""

    def cell(key: str) -> str:
        return "–" if summary[key] is None else f"{summary[key]:.3f}"

    low, high = summary["accuracy_interval"]
    lines = [
        "",
        f"{summary['kind']} model from {summary['train_pairs']} pairs, on {summary['eval_pairs']} held-out "
        f"pairs of {summary['eval_prompts']} prompts, {summary['eval_ties']} of them ties",
        f"  accuracy                               {cell('accuracy')}  [{low:.3f}, {high:.3f}]",
        f"  … where the shorter reply is preferred {cell('accuracy_shorter_preferred')}  "
        f"({summary['pairs_shorter_preferred']} pairs)",
        f"  … of preferring the longer reply       {cell('accuracy_of_length')}",
        f"  log-loss, nats                         {cell('log_loss')}  (a coin's: 0.693; the least: "
        f"{cell('log_loss_floor')})",
        f"  calibration error                      {cell('calibration_error')}",
    ]
    if summary["order_agreement"] is not None:
        lines.append(f"  same verdict with the order swapped    {cell('order_agreement')}")
        lines.append(
            f"  cyclic triples                         {cell('cyclic_triples')}  of {summary['triples']}"
        )
    if summary["eval_judge_agreement"] is not None:
        lines.append(f"  agreement with the second judge        {cell('eval_judge_agreement')}")
    lines += [
        "",
        f"{summary['steps']} steps, {summary['seconds'] / 60:.1f} minutes, peak memory "
        f"{summary['peak_memory_bytes'] / 1e9:.2f} GB",
        f"all of it in {folder}/; use it with --judge {summary['judge']}",
    ]
    return "\n".join(lines)


def judge_card(name: str, args, summary: dict) -> str:
    """README.md of a saved judge: what it learnt from, how good it is, how to ask it."""
    low, high = summary["accuracy_interval"]
    asked = {"reward": "hf", "pairwise": "pairwise"}[args.kind]
    return f"""---
library_name: transformers
tags: [cleanalign, preference_model, {args.kind}]
---

# {name}

{args.model}, trained by cleanalign's `preference_model.py --kind {args.kind}` on {summary["train_pairs"]} \
pairs of `{args.dataset}`. Use it with `--judge {asked}:FOLDER`.

On {summary["eval_pairs"]} held-out pairs its accuracy is {summary["accuracy"]:.3f} (95 % interval {low:.3f} \
to {high:.3f}), its log-loss {summary["log_loss"]:.3f} nats, its calibration error \
{summary["calibration_error"]:.3f}. All arguments:

```json
{json.dumps(dataclasses.asdict(args), indent=2)}
```
"""
