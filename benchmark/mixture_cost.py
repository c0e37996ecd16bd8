"""What sampling from the mixture of policy and reference costs over sampling the policy alone, on the default
model and its prompts.

    python benchmark/mixture_cost.py                              # about three minutes on two cores
    python benchmark/mixture_cost.py --policy runs/NAME/model     # a trained policy beside the untrained one

The price depends on how often the policy's drafts stand, so on how far it has gone from the reference: the
same weights twice are the best case. Replies cannot end early. Times are medians over rounds in which the
variants take turns.
"""

from __future__ import annotations

import json

import record
import tyro
from step_cost import in_turn

import common
from cleanalign.data import load_rows
from cleanalign.models import choose_attention, load_model, load_tokenizer, resolve_device, resolve_dtype
from cleanalign.phases import keep_freed_memory

NEVER = [-1]  # no token ends a reply


def main(
    policy: str | None = None,
    model: str = "smollm2-135m",
    beta: float = 0.125,
    lengths: tuple[int, ...] = (32, 128),
    prompts: int = 16,
    rounds: int = 2,
    out: str = str(record.RESULTS / "mixture_cost.json"),
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
    keep_freed_memory()  # as the default runs do
    device = resolve_device("auto")
    how = resolve_dtype("auto", device), device, choose_attention("auto", device, 128)
    reference = load_model(model, *how)
    policies = {"untrained": load_model(model, *how)}
    if policy:
        policies["trained"] = load_model(policy, *how)
    tokenizer = load_tokenizer(model)
    _, rows = load_rows("chitchat", held_out=prompts)
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
    ratio = {}
    for length, times in seconds.items():
        ratio[length] = {name: time / times["policy alone"] for name, time in times.items()}
    result = {
        **record.origin(),
        "beta": beta,
        "seconds": seconds,
        "ratio": ratio,
        "draft_acceptance": accepted,
    }
    record.write(out, result)
    print(json.dumps({key: result[key] for key in ("seconds", "ratio", "draft_acceptance")}, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
