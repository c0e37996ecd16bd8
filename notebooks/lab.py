"""What the notebooks share: a short run of a script, its samples before and after, a triangle, the checks of
the exercises.

CLEANALIGN_NOTEBOOK_TINY=FOLDER makes every run tiny, for a test: the folder holds model/, prompts.jsonl,
demonstrations.jsonl and judges.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import matplotlib.pyplot as plt
import play
import theory
import torch

from cleanalign.run import Run

TINY = os.environ.get("CLEANALIGN_NOTEBOOK_TINY")
COLORS = (theory.BLUE, theory.ORANGE, theory.GREEN, theory.PURPLE)


def short_run(script, demonstrations: bool = False, **flags) -> dict:
    """Run a script's own `main` on its laptop recipe with fewer prompts and steps; its summary, with the
    held-out prompts and both answers under "samples". Minutes on a laptop; its last lines say how many."""
    small = {"eval_prompts": 32, "eval_judge": None, "save_every": 0, **flags}
    if TINY:
        small |= {
            "model": f"{TINY}/model",
            "judge": f"{TINY}/judges.py:goodness",
            "device": "cpu",
            "dtype": "float32",
        }
        small |= {"dataset": f"{TINY}/{'demonstrations' if demonstrations else 'prompts'}.jsonl"}
        small |= {"eval_prompts": 8, "max_new_tokens": 6, "num_prompts": 32, "max_steps": 2}
        if demonstrations:
            small |= {"min_demonstration_score": None, "dev_prompts": 8}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        args = dataclasses.replace(script.RECIPES["smollm2-135m"], run_dir=folder, run_name="run", **small)
        try:
            script.main(args)
        finally:
            if Run.current:
                Run.current.close()
        run = Path(folder, "run")
        summary = json.loads((run / "summary.json").read_text())
        lines = (run / "samples.jsonl").read_text().splitlines()
        return {**summary, "samples": [json.loads(line) for line in lines]}


def show(run: dict, count: int = 4) -> None:
    """What the run changed: its figures and some answers before and after."""
    low, high = run["win_rate_interval"]
    print(f"win rate against the starting model  {run['win_rate']:.3f}  [{low:.3f}, {high:.3f}]")
    print(f"judge's score                        {run['score_before']:.3f} -> {run['score_after']:.3f}")
    print(f"KL from the starting model           {run['kl']:.2f} nats per reply")
    for sample in run["samples"][:count]:
        print(f"\nprompt  {sample['prompt']}\nbefore  {sample['start']}\nafter   {sample['policy']}")


def walk(
    family: str, game: str, knobs: tuple[float, ...], start: int = 0, steps: int = play.STEPS
) -> torch.Tensor:
    """(steps + 1, 3) the policies of a walk along a script's exact expected gradient; see docs/play.py."""
    chosen = next(one for one in play.all_games() if one.key == game)
    first, second = (*knobs, 0.0)[:2]
    policy = list(chosen.starts().values())[start]
    rows = chosen.preference.flatten(), chosen.reference.log(), chosen.reward(), policy.log()
    batch = play.Batch(*(row[None] for row in rows), theory.vector(first), theory.vector(second))
    return play.walk(family, batch, steps)[:, 0]


def triangle(paths: dict[str, torch.Tensor], marks: dict[str, torch.Tensor], corners=theory.RPS_CORNERS):
    """Draw walks and marked policies in the triangle."""
    figure, axes = plt.subplots(figsize=(6.2, 4.6))
    theory.simplex(axes, corners)
    for color, (name, path) in zip(COLORS, paths.items(), strict=False):
        theory.trajectory(axes, path, color)
        axes.plot([], [], color=color, label=name)
    for name, policy in marks.items():
        theory.star(axes, policy, theory.INK, name)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.66, 0.92))
    plt.show()
    plt.close(figure)


def check(number: int, answer, right, hint: str) -> None:
    """Say whether an exercise's answer is right, by `right`, a function of it; `...` is no answer yet."""
    if answer is ...:
        print(f"exercise {number}: not answered yet. {hint}")
    elif right(answer):
        print(f"exercise {number}: right")
    else:
        print(f"exercise {number}: not yet. {hint}")
