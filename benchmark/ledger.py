"""The claims ledger as data: a row for each claim of the papers that code can test, and for each that would
take more than this project has run. benchmark/claims.py makes docs/claims.md of it.

A tested row is a function of the recorded results: its docstring is the claim, in our words, and it returns
the verdict with the outcome's text. The condition on which a verdict rests stands in it, so that new results
change the verdict as well as the figures. The rows stand in ledger_selm.py, ledger_ipo.py, ledger_nash.py and
ledger_demonstrations.py; those that nobody has run in untested.py. Here: what they share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

import record

REPRODUCED, IN_SHAPE, NOT_SEEN = "reproduced", "reproduced in shape", "not seen at this scale"
CONTRADICTED, NOT_TESTED = "contradicted", "not tested"
TABULAR = "benchmark/tabular.py"
VERDICTS = (REPRODUCED, IN_SHAPE, NOT_SEEN, CONTRADICTED, NOT_TESTED)
PAPERS = {  # key: (heading, what it is)
    "selm": ("SELM", "Self-Exploring Language Models, arXiv 2405.19332 v3"),
    "ipo": (
        "Online-IPO and IPO-MD",
        "Human Alignment through Online Preference Optimisation, arXiv 2403.08635",
    ),
    "nash": ("Nash-MD", "Nash Learning from Human Feedback, arXiv 2312.00886 v4"),
    "afd": ("Alignment from demonstrations", "Inverse-RLignment, arXiv 2405.15624 v2"),
    "spin": ("SPIN", "Self-Play Fine-Tuning, arXiv 2401.01335"),
}


class Results:
    """The recorded results, by file name without .json."""

    def __init__(self, folder: Path = record.RESULTS):
        self.folder, self.read = folder, {}

    def __getitem__(self, name: str) -> dict:
        if name not in self.read:
            self.read[name] = json.loads((self.folder / f"{name}.json").read_text())
        return self.read[name]

    def study(self, name: str) -> dict:
        """The figures of a study of benchmark/tabular.py."""
        return self["claims"][name]["figures"]

    def recorded(self, *names: str) -> list[str]:
        """Those of the names that are there."""
        return [name for name in names if (self.folder / f"{name}.json").exists()]

    def default_run(self, script: str) -> dict | None:
        """Summary of a script's default run, None if it is not recorded."""
        runs = self["default_runs"]
        return runs[script]["summary"] if script in runs else None


@dataclass(frozen=True)
class Claim:
    """A row of the ledger."""

    name: str
    paper: str
    says: str
    where: str
    by: tuple[str, ...]  # file:function or file:test
    command: str
    outcome: Callable[[Results], tuple[str, str]]  # to (verdict, text)


def rows(paper: str) -> tuple[list[Claim], Callable]:
    """An empty list of a paper's rows, and the decorator that enters a function of the results into it:

    @claim(where, by, command), where `by` names files and functions, `file:function`, one a word.
    """
    entered: list[Claim] = []

    def claim(where: str, by: str, command: str):
        def enter(function):
            says = " ".join(function.__doc__.split())
            entered.append(Claim(function.__name__, paper, says, where, tuple(by.split()), command, function))
            return function

        return enter

    return entered, claim


def study(name: str) -> str:
    """The command of a study."""
    return f"python benchmark/claims.py run {name}"


# --- how figures are written, and what they are compared by --------------------------------------


def point(value: float, digits: int = 3) -> str:
    """.123, −1.234"""
    text = f"{value:.{digits}f}".replace("-", "−")
    if not text.strip("−0."):  # no minus before a zero
        text = text.strip("−")
    return text.replace("0.", ".", 1) if text.lstrip("−").startswith("0.") else text


def tiny(value: float) -> str:
    """An error, as the power of ten that it is below."""
    return "0" if value == 0 else f"< 1e{math.floor(math.log10(abs(value))) + 1:d}"


def spread(pair: list[float]) -> str:
    """Mean ± standard error."""
    return f"{point(pair[0])} ± {point(pair[1])}"


def listed(values: list[float], digits: int = 3) -> str:
    """One value a seed."""
    return " / ".join(point(value, digits) for value in values)


def interval(low: float, high: float) -> str:
    """[low, high]"""
    return f"[{point(low)}, {point(high)}]"


def error(values: list[float]) -> float:
    """Standard error of their mean."""
    return stdev(values) / math.sqrt(len(values))


def told(difference: float, standard_error: float, above: str = IN_SHAPE) -> str:
    """`above` where a difference is above 0 by two standard errors, contradicted where it is below by as
    many, else not seen."""
    if difference > 2 * standard_error:
        return above
    return CONTRADICTED if difference < -2 * standard_error else NOT_SEEN


def exact(*errors: float, tolerance: float = 1e-6) -> str:
    """Reproduced where an identity holds to the tolerance."""
    return REPRODUCED if max(map(abs, errors)) < tolerance else CONTRADICTED


def by_variant(runs: list[dict], key: str) -> dict[str, list[float]]:
    """A summary's value of each variant of a study of benchmark/compare.py, seeds in order."""
    found: dict[str, list[float]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found.setdefault(run["variant"], []).append(run["summary"][key])
    return found


def share(value: float) -> str:
    """A share as per cent."""
    return f"{100 * value:.0f} %"


def seeds_for(difference: float, gaps: list[float]) -> int:
    """Pairs of runs that show a mean difference at 5 %, two-sided, with 80 % power, from some pairs' spread
    (normal approximation)."""
    return math.ceil(((1.960 + 0.842) * stdev(gaps) / difference) ** 2)


# --- the cycle judge, in both studies of it that may be recorded ---------------------------------

STYLES = ("question", "exclamation", "statement")  # in the order of the resting points
CYCLES = {"cycle": "a small model", "cycle_smollm2": "SmolLM2"}


def cycle_studies(results: Results) -> dict[str, list[dict]]:
    """The recorded studies' runs."""
    return {name: results[name]["runs"] for name in results.recorded(*CYCLES)}


def cycle_value(run: dict, key: str) -> float:
    """Exploitability, or a style's share: of the run's last steps together where the study took them so, else
    of the final comparison."""
    return run.get(f"late_{key}", run["summary"][f"{key}_after"])


def at_rest(results: Results, study: str) -> dict:
    """Points and exploitability at rest in that study's game."""
    known = results["resting_points"]
    return known.get(study, known)


def each_seed(values: list[float]) -> str:
    """Every seed's figure, of more than three the mean ± its standard error."""
    return listed(values) if len(values) <= 3 else spread([mean(values), error(values)])


def cycle_said(name: str, runs: list[dict]) -> str:
    """Which study: model, steps, seeds."""
    seeds = len({run["seed"] for run in runs})
    return f"{CYCLES[name]}, {runs[0]['summary']['steps']} steps, {seeds} seeds: "
