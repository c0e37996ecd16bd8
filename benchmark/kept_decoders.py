"""What a step's sampling gains when the decoders' buffers outlive the call, as in nash_md.py and ipo_md.py.

    python benchmark/kept_decoders.py            # a CPU, about a minute; writes results/kept_decoders.json

Default nash_md.py steps (12 prompts, two replies each and the mixture's one, 24 new tokens) of two models in
SmolLM2-135M's shapes with random weights; with and without in turn, each pair on the same prompts and seed.
"""

from __future__ import annotations

import statistics
import time

import record
import torch
import tyro

import common
from cleanalign import synthetic
from cleanalign.decoding import Decoders
from cleanalign.models import resolve_device, resolve_dtype


def main(
    rounds: int = 5, device: str = "auto", out: str = str(record.RESULTS / "kept_decoders.json")
) -> None:
    """Measure and write.

    Args:
        rounds: pairs of calls that are timed; one more warms up.
        device: auto, cpu or cuda.
        out: JSON file to write.
    """
    where = resolve_device(device)
    dtype = resolve_dtype("auto", where)
    policy, reference = (
        synthetic.model("smollm2-135m", dtype, where, "sdpa", seed).eval() for seed in (0, 1)
    )
    decoders = Decoders(longest=64)
    seconds: dict[str, list[float]] = {"anew": [], "kept": []}
    for i in range(1 + rounds):
        generator = torch.Generator().manual_seed(i)
        prompts = [torch.randint(5, 40_000, (40 + g,), generator=generator).tolist() for g in range(12)]
        replies = {}
        for name, kept in (("anew", None), ("kept", decoders)):
            settings = dict(completions=3, unmixed=2, mixture=(reference, 0.125), max_new_tokens=24, seed=i)
            start = time.perf_counter()
            replies[name] = common.sample(policy, prompts, [-1], decoders=kept, **settings)
            seconds[name].append(time.perf_counter() - start)
        assert replies["anew"] == replies["kept"]
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    result = {
        "dtype": str(dtype),
        "seconds": {name: times[1:] for name, times in seconds.items()},
        "median_seconds": medians,
        "times_as_fast": medians["anew"] / medians["kept"],
        "kept_bytes": decoders.bytes(),
    }
    record.write(out, {**record.origin(), **result})
    print(result)


if __name__ == "__main__":
    tyro.cli(main)
