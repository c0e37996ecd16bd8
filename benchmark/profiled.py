"""Where a script's seconds go: its phases by operator, and the rate at which matrix products run, beside the
best rate of this machine.

    python benchmark/profiled.py ipo_md             # two steps of the default run; 2.5 minutes on two cores
    python benchmark/profiled.py afd --flags="--max-steps 2 --num-prompts 24 --eval-prompts 8 --max-n 16"

The profiler itself takes time: shares are what to read. A first step, in which kernels are compiled, is in it.
Writes benchmark/results/profile_SCRIPT.json.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections import Counter, defaultdict

import record
import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from cleanalign import command_line
from cleanalign.dry_run import matmul_peak
from cleanalign.models import resolve_dtype
from cleanalign.phases import Phases, keep_freed_memory

# operators whose FLOPs torch counts, and the one of rearranged weights, whose it does not
COUNTED, PACKED = ("aten::mm", "aten::addmm", "aten::bmm"), "mkldnn::_linear_pointwise"
SHOWN = 12  # operators of a phase


class ByOperator:
    """By outermost phase: seconds of each operator, and FLOPs of the products."""

    def __init__(self):
        self.seconds: dict[str, Counter] = defaultdict(Counter)
        self.flops, self.open = Counter(), 0

    @contextlib.contextmanager
    def watch(self, name: str):
        """Profile what happens within; inner phases are part of the outermost."""
        self.open += 1
        try:
            if self.open > 1:
                yield
                return
            with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
                yield
            for event in profiler.key_averages():
                self.seconds[name][event.key] += event.self_cpu_time_total / 1e6
                self.flops[name] += event.flops if event.key in COUNTED else 0
        finally:
            self.open -= 1

    def report(self, peak: float) -> dict:
        """What is written, phase by phase."""
        result, whole = {}, sum(seconds.total() for seconds in self.seconds.values())
        for name, seconds in self.seconds.items():
            if seconds.total() < whole / 100:
                continue
            counted = sum(seconds[operator] for operator in COUNTED)
            products, total = counted + seconds[PACKED], seconds.total()
            result[name] = {
                "profiled_seconds": round(total, 2),
                "share_of_products": round(products / total, 3),
                "rate_of_products_over_peak": round(self.flops[name] / counted / peak, 3)
                if counted
                else None,
                "shares": {op: round(s / total, 3) for op, s in seconds.most_common(SHOWN)},
            }
        return result


def main(script: tyro.conf.Positional[str], flags: str = "--max-steps 2 --eval-prompts 16") -> None:
    """Profile and write.

    Args:
        script: selm, ipo_md, nash_md or afd.
        flags: its flags in one string, given as --flags="…".
    """
    keep_freed_memory()  # before the first tensor, as a run does
    device = torch.device("cpu")
    dtype = resolve_dtype("auto", device)
    watched, phase, peaks = ByOperator(), Phases.phase, [matmul_peak(device, dtype)]

    @contextlib.contextmanager
    def both(self, name):
        with watched.watch(name), phase(self, name):
            yield

    Phases.phase = both
    module = importlib.import_module(script)
    with tempfile.TemporaryDirectory() as folder:
        where = [f"--run-dir={folder}", "--run-name=profiled"]
        command_line.command_line(module.main, module.RECIPES, [*flags.split(), *where])
    peak = max(*peaks, matmul_peak(device, dtype))  # before and after: a machine's speed wanders
    result = {**record.origin(), "script": script, "flags": flags, "peak_flops_per_second": round(peak)}
    result["phases"] = watched.report(peak)
    record.write(record.RESULTS / f"profile_{script}.json", result)
    for name, told in result["phases"].items():
        rate = told["rate_of_products_over_peak"]
        print(
            f"{name:<12} {told['profiled_seconds']:7.1f} s; products {told['share_of_products']:.0%} at {rate} of the peak"
        )
        print("   " + ", ".join(f"{op} {share:.0%}" for op, share in told["shares"].items()))


if __name__ == "__main__":
    tyro.cli(main)
