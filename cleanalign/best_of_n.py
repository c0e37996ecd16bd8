"""How good is a reward? Best-of-N by it, judged by another: report and plot; the estimators are in
statistics.

`best_of_n.json` holds for every ranker its curves over N on the test prompts and on the development prompts:
the judge's mean score of the reply the ranker likes best among N, and that reply's win rate against one more
sample, each with a 95 % bootstrap band over prompts. All rankers rank the same samples. `eval_judge` holds
the same by a second judge.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cleanalign import distributed
from cleanalign.statistics import best_of_n_score, best_of_n_win_rate, bootstrap
from cleanalign.storage import write_json, writing

BASELINES = ("length", "random", "judge (oracle)")


def compare_rankers(
    rankers: dict[str, dict], golden: dict[str, tuple], lengths: dict[str, torch.Tensor], judge: str
) -> dict:
    """The report: every ranker's Best-of-N curves on the same samples, beside length, random and the judge
    itself.

    Args:
        rankers: name: {split: (G, M) rewards}; any other entry of a ranker is kept as it is.
        golden: for the splits `test` and `dev`, the golden judge's scores (G, M) and preferences (G, M, M)
            (`judges.golden_of`).
        lengths: for the same splits the (G, M) lengths of the samples in tokens.
        judge: the golden judge's name. N runs from 1 to M − 1: the opponent of the win rate lies outside the
            N.
    """
    scores = {split: score for split, (score, _) in golden.items()}
    noise = {}
    for split, score in scores.items():
        noise[split] = torch.rand(score.shape, generator=torch.Generator().manual_seed(0))
    G, M = scores["test"].shape
    report = {
        "n": list(range(1, M)),
        "judge": judge,
        "prompts": G,
        "dev_prompts": len(scores["dev"]),
        "samples_per_prompt": M,
        "rankers": {},
    }
    baselines = dict(zip(BASELINES, (lengths, noise, scores), strict=True))
    for name, ranker in {**rankers, **baselines}.items():
        curves = {split: curves_of(ranker[split], *golden[split], report["n"]) for split in golden}
        more = {key: value for key, value in ranker.items() if key not in golden}
        report["rankers"][name] = {**curves["test"], **more, "dev": curves["dev"]}
    return report


def curves_of(rewards: torch.Tensor, score: torch.Tensor, preference: torch.Tensor, ns: list[int]) -> dict:
    """Golden score and win rate over N of the reply that (G,
    M) `rewards` like best, with 95 % bands over prompts."""
    curves = {}
    measures = {
        "score": best_of_n_score(rewards, score, ns),
        "win_rate": best_of_n_win_rate(rewards, preference, ns),
    }
    for key, values in measures.items():
        mean, low, high = bootstrap(values)
        curves |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return curves


def report_text(report: dict) -> str:
    """The report as a table."""
    width = max(map(len, report["rankers"]))
    preferences = any(curve.get("preference_accuracy") is not None for curve in report["rankers"].values())
    lines = [
        f"Best-of-{report['n'][-1]} among samples of π_SFT, {report['prompts']} held-out prompts, by the "
        f"judge {report['judge']}",
        f"  {'':<{width}}   {'':16}  {'':23}     accuracy on held-out" + preferences * "    on held-out",
        f"  {'ranked by':<{width}}   score, N = 1 → {report['n'][-1]:<4}  win rate against N = 1     pairs "
        "of its kind" + preferences * "       preferences",
    ]
    for name, curve in report["rankers"].items():
        band = f"[{curve['win_rate_low'][-1]:.3f}, {curve['win_rate_high'][-1]:.3f}]"
        separability, preference = (
            "" if curve.get(key) is None else f"{curve[key]:.3f}"
            for key in ("separability", "preference_accuracy")
        )
        lines.append(
            f"  {name:<{width}}   {curve['score'][0]:.3f} → {curve['score'][-1]:.3f}       "
            f"{curve['win_rate'][-1]:.3f}  {band}      "
            f"{separability:<22}  {preference}".rstrip()
        )
    if "eval_judge" in report:
        lines += ["", f"  the same by {report['eval_judge']['judge']}, which took no part"]
        for name, curve in report["eval_judge"]["rankers"].items():
            name = name.replace(BASELINES[-1], "itself")
            band = f"[{curve['win_rate_low'][-1]:.3f}, {curve['win_rate_high'][-1]:.3f}]"
            lines.append(
                f"  {name:<{width}}   {curve['score'][0]:.3f} → {curve['score'][-1]:.3f}       "
                f"{curve['win_rate'][-1]:.3f}  {band}"
            )
    return "\n".join(lines)


def plot_report(report: dict, path: Path) -> None:
    """Judge's score and win rate over N, a line a ranker with
    its 95 % band. Without matplotlib nothing is drawn."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    titles = {"score": f"score of the judge {report['judge']}", "win_rate": "win rate against N = 1"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, curve in report["rankers"].items():
            style = {"linestyle": "--", "linewidth": 1.2} if name in BASELINES else {"linewidth": 1.8}
            (line,) = axis.plot(report["n"], curve[key], label=name, **style)
            axis.fill_between(
                report["n"], curve[f"{key}_low"], curve[f"{key}_high"], color=line.get_color(), alpha=0.12
            )
        axis.set_xlabel("N, samples the best is chosen from")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[1].axhline(0.5, color="black", linewidth=0.8)
    axes[0].legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.9))
    figure.suptitle(f"Best-of-N among samples of π_SFT, {report['prompts']} held-out prompts", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(report: dict, folder: Path) -> None:
    """best_of_n.json and best_of_n.png in `folder`, and the table on the terminal."""
    if distributed.rank() != 0:
        return
    write_json(folder / "best_of_n.json", report, indent=1)
    with writing(folder / "best_of_n.png"):
        plot_report(report, folder / "best_of_n.png")
    print("\n" + report_text(report) + "\n", flush=True)


def best_of_n_summary(report: dict) -> dict:
    """What the run's summary says of the report: the favoured reward at the largest N."""
    favoured = report["favoured_on_dev"]
    best = report["rankers"][favoured]
    return {
        "sft_score": best["score"][0],
        "best_of_n": {
            "n": report["n"][-1],
            "favoured_on_dev": favoured,
            "score": best["score"][-1],
            "win_rate": best["win_rate"][-1],
            "win_rate_interval": [best["win_rate_low"][-1], best["win_rate_high"][-1]],
        },
    }
