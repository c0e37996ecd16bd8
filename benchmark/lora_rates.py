"""Which learning rate an adapter needs: `selm.py` on all weights beside LoRA at three rates, and what the first
Adam step says beforehand.

    python benchmark/lora_rates.py                    # four default runs; finished ones are reused

Adam's first step moves every number by the rate, against the sign of its gradient, so it lowers the loss by
rate · Σ|gradient|. Of an adapter only B has a gradient at first (B = 0), and that of one layer is
(α/r) · G Aᵀ, where G is the layer's own. The ratio of the two sums is how many times greater an adapter's
rate must be for the same first step: `first_step` measures it on SmolLM2, and `reckoned` reckons it for
random G and peft's A from the layers' inputs: √3 n / α.

Writes benchmark/results/lora_rates.json and .png.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import record
import torch
import tyro

import common
from cleanalign.data import load_rows
from cleanalign.models import load_model, load_tokenizer, make_trainable

RANK, ALPHA = 32, 64
RUNS = {  # name: flags of selm.py
    "all weights, 4e-5": "",
    "LoRA, 4e-5": f"--lora-rank {RANK} --lora-alpha {ALPHA} --learning-rate 4e-5",
    "LoRA, 2e-4": f"--lora-rank {RANK} --lora-alpha {ALPHA} --learning-rate 2e-4",
    "LoRA, 6e-4": f"--lora-rank {RANK} --lora-alpha {ALPHA} --learning-rate 6e-4",
}
PANELS = {"score": "judge's score of the sampled replies", "kl": "KL from the iteration's start, nats"}


def main(run_dir: str = "runs/lora_rates", flags: str = "", runs: bool = True) -> None:
    """Run what is not finished yet; write the plot and the JSON.

    Args:
        run_dir: where the run folders go.
        flags: more flags for every run, in one string.
        runs: --no-runs measures the first step alone.
    """
    folder = Path(run_dir).resolve()
    rows = []
    for name, more in RUNS.items() if runs else ():
        where = folder / name.replace(", ", "-").replace(" ", "-")
        command = " ".join(f"selm.py {more} {flags}".split())
        record.run_once(command, where)
        steps = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        curves = {key: [step[key] for step in steps] for key in PANELS}
        rows.append({"name": name, **record.result(where, command), "curves": curves})
        told = ("win_rate", "win_rate_interval", "kl", "score_after")
        print(name, {key: rows[-1]["summary"].get(key) for key in told}, flush=True)
    ratios = first_step()
    print(ratios)
    record.write(record.RESULTS / "lora_rates.json", {**record.origin(), "first_step": ratios, "runs": rows})
    if runs:
        plot(rows)


def first_step() -> dict:
    """How many times smaller an adapter's first Adam step is at one and the same rate: measured on SmolLM2 by
    its gradients on 16 human replies, in float32, and reckoned from the layers' shapes."""
    sums = {}
    tokenizer = load_tokenizer("smollm2-135m")
    rows = [row for row in load_rows("chitchat", ("response",), 64)[0] if row.response][:16]
    prompts = [common.encode_prompt(tokenizer, row.prompt) for row in rows]
    replies = [[tokenizer(row.response, add_special_tokens=False).input_ids[:24]] for row in rows]
    for rank in (0, RANK):
        base = load_model("smollm2-135m", torch.float32, torch.device("cpu"))
        model = make_trainable(base, rank, ALPHA, False)
        for prompt, reply in zip(prompts, replies, strict=True):
            batch = common.collate([prompt], [reply], torch.device("cpu"))
            (-common.completion_logprobs(model, batch).sum() / len(rows)).backward()
        linear = [
            weight.grad
            for name, weight in model.named_parameters()
            if weight.grad is not None and ("_proj" in name)
        ]
        sums[rank] = sum(gradient.abs().sum().item() for gradient in linear)
    shapes = [
        module.in_features
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith("base_layer")
    ]
    return {
        "measured": sums[0] / sums[RANK],
        "reckoned": reckoned(sum(shapes) / len(shapes)),
        "reckoned for 4,096 inputs": reckoned(4096),
    }


def reckoned(inputs: float, alpha: int = ALPHA) -> float:
    """Σ|G| over Σ|(α/r) G Aᵀ| of a layer of n inputs and m outputs: √3 n / α, whatever r.

    The entries of G random, of size g: the first is .8 g for each of m·n numbers. A is uniform within ±1/√n,
    so the entries of G Aᵀ have size g √n / √(3n), and the second is .8 g / √3 · α/r for each of m·r.
    """
    return math.sqrt(3) * inputs / alpha


def plot(rows: list[dict]) -> None:
    """Score and KL over steps, and the win rate over the change: the runs in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    axes[2].set_title("held-out win rate over KL from the starting model", fontsize=10)
    axes[2].set_xlabel("nats a reply")
    for i, row in enumerate(rows):
        summary = row["summary"]
        low, high = summary["win_rate_interval"]
        bars = [[summary["win_rate"] - low], [high - summary["win_rate"]]]
        axes[2].errorbar(summary["kl"], summary["win_rate"], bars, color=f"C{i}", fmt="o", capsize=3)
        for axis, (key, title) in zip(axes, PANELS.items(), strict=False):
            values = row["curves"][key]
            axis.plot(range(1, len(values) + 1), values, color=f"C{i}", label=row["name"])
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("optimiser step")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(record.RESULTS / "lora_rates.png", dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
