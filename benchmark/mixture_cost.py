"""What sampling from the mixture of policy and reference costs over sampling the policy alone, on the default model and its prompts.

    python benchmark/mixture_cost.py --policy runs/NAME/model     # a trained policy beside the untrained one; about three minutes on two cores

The price depends on how often the policy's drafts stand, so on how far it has gone from the reference: the same weights twice are the
best case. Replies cannot end early. Times are medians over rounds in which the variants take turns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from step_cost import in_turn  # noqa: E402

import common  # noqa: E402
import experiment  # noqa: E402

NEVER = [-1]  # no token ends a reply


def main(
    policy: str | None = None,
    model: str = "smollm2-135m",
    beta: float = 0.125,
    lengths: tuple[int, ...] = (32, 128),
    prompts: int = 16,
    rounds: int = 2,
    out: str = str(ROOT / "benchmark/results/mixture_cost.json"),
) -> None:
    """Time the variants and write the result.

    Args:
        policy: folder of a trained policy; None leaves it out.
        model: the reference: recipe, hub id or folder.
        beta: the reference's share.
        lengths: new tokens of every reply.
        prompts: held-out prompts of chitchat, one reply each.
        rounds: times every variant is timed.
        out: JSON file to write.
    """
    experiment.keep_freed_memory(experiment.SMALL_MICRO_BATCH)  # as the default runs do
    device = common.resolve_device("auto")
    load = lambda name: common.load_model(
        name, common.resolve_dtype("auto", device), device, common.choose_attention("auto", device, 128)
    )  # noqa: E731
    reference = load(model)
    policies = {"untrained": load(model)} | ({"trained": load(policy)} if policy else {})
    tokenizer = common.load_tokenizer(model)
    _, rows = common.load_rows("chitchat", held_out=prompts)
    _, asked = common.encode_rows(tokenizer, rows, 64, prompts, 0, "prompts")
    seconds, accepted = {}, {}
    for length in lengths:

        def draw(name, mixed, length=length):
            stats = {}
            settings = {"mixture": (reference, beta)} if mixed else {}
            common.sample(
                policies[name], asked, NEVER, max_new_tokens=length, seed=0, stats=stats, **settings
            )
            if mixed:
                accepted.setdefault(length, {})[name] = stats.get("draft_acceptance")

        variants = {"policy alone": lambda: draw("untrained", False)}
        variants |= {f"mixture, {name} policy": lambda name=name: draw(name, True) for name in policies}
        seconds[length] = in_turn(variants, rounds, warmup=int(length == lengths[0]))
    ratio = {
        length: {name: t / times["policy alone"] for name, t in times.items()}
        for length, times in seconds.items()
    }
    result = {
        "command": " ".join(["python", *sys.argv]),
        **experiment.environment(),
        "beta": beta,
        "seconds": seconds,
        "ratio": ratio,
        "draft_acceptance": accepted,
    }
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("seconds", "ratio", "draft_acceptance")}, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
