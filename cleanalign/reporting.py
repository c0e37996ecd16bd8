"""What a run says of itself: where it came from, its
curves, its result as a person reads it, its model card."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import random
import subprocess
import sys
from pathlib import Path

import torch

from cleanalign.models import HUB_MODELS


def environment() -> dict:
    """Where a run came from: git commit and dirty flag of this code, package versions, device."""
    here = Path(__file__).parent.parent

    def git(*words):
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "transformers", "tyro", "numpy", "peft", "cleanalign"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    status = None
    with contextlib.suppress(OSError):
        status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": git("rev-parse", "HEAD") if status is not None else None,
        "git_dirty": bool(status) if status is not None else None,
        "versions": versions,
        "device_name": device_name(),
    }


def device_name() -> str:
    """The GPU's name, or the CPU's number of threads, on which the order of its sums depends."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def plot_curves(metrics: list[dict], names: tuple[str, ...], path: Path, title: str) -> None:
    """One small panel for each metric over steps. Without matplotlib nothing is drawn, and that is said."""
    try:
        import matplotlib
    except ImportError:
        print("curves.png not drawn: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = tuple(n for n in names if any(n in row for row in metrics))
    if not names:
        return
    columns = min(3, len(names))
    figure, axes = plt.subplots(
        -(-len(names) // columns),
        columns,
        figsize=(4.2 * columns, 2.7 * -(-len(names) // columns)),
        squeeze=False,
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in metrics if isinstance(row.get(name), (int, float))]
        axis.plot(*zip(*points, strict=True), linewidth=1.4, marker="." if len(points) < 12 else None)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("optimiser step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary_text(summary: dict, folder: Path) -> str:
    """The result as a person reads it: before and after in a table, three samples, where everything lies."""

    def rate(key):
        if summary.get(key) is None:
            return "–"
        low, high = summary[f"{key}_interval"]
        return f"{summary[key]:.3f}  [{low:.3f}, {high:.3f}]"

    def cell(key):
        return "–" if summary.get(key) is None else f"{summary[key]:.3f}"

    lines = [
        "",
        f"policy against the starting model, {summary['eval_prompts']} held-out prompts",
        f"  win rate, judge {summary['judge']:<22} {rate('win_rate')}",
        f"  win rate, judge {summary['eval_judge'] or '–':<22} {rate('eval_judge_win_rate')}   (never "
        "trained on)",
        "                                         before    after",
    ]
    for label, key in (
        ("judge's score", "score"),
        ("reply length, tokens", "length"),
        ("distinct bigrams", "distinct_2"),
    ):
        lines.append(f"  {label:<38} {cell(key + '_before'):>6}   {cell(key + '_after'):>6}")
    lines.append(f"  KL from the starting model: {summary['kl']:.2f} nats per reply")
    with open(folder / "samples.jsonl") as file:
        samples = [json.loads(line) for line in file]
    for sample in random.Random(0).sample(samples, min(3, len(samples))):
        lines += [
            "",
            f"  prompt   {_one_line(sample['prompt'])}",
            f"  before   {_one_line(sample['start'])}",
            f"  after    {_one_line(sample['policy'])}",
        ]
    minutes = summary["seconds"] / 60
    lines += [
        "",
        f"{summary['steps']} steps, {minutes:.1f} minutes, peak memory "
        f"{summary['peak_memory_bytes'] / 1e9:.2f} GB",
        f"all of it in {folder}/ (model/ loads with transformers)",
    ]
    return "\n".join(lines)


def _one_line(text: str, width: int = 150) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def model_card(script: str, name: str, args, summary: dict) -> str:
    """README.md of a saved model: how it was made and how it scored."""
    low, high = summary["win_rate_interval"]
    source = HUB_MODELS.get(args.model, args.model)
    base = f"base_model: {source}\n" if "/" in source and not Path(source).exists() else ""
    return f"""---
library_name: transformers
{base}tags: [cleanalign, {script}]
---

# {name}

{args.model}, trained by cleanalign's `{script}.py` on the prompts of `{args.dataset}` \
with the judge `{args.judge}`.

Win rate against the starting model on {summary["eval_prompts"]} held-out prompts: {summary["win_rate"]:.3f} \
(95 % interval {low:.3f} to {high:.3f}), by that judge. All arguments:

```json
{json.dumps(dataclasses.asdict(args), indent=2)}
```
"""
