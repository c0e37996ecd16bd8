"""The claims ledger: docs/claims.md from the recorded results, and the studies that compute what is cheap.

    python benchmark/claims.py                    # writes the page's tables anew
    python benchmark/claims.py --check            # exits 1 where the page is not what the results say
    python benchmark/claims.py --list             # every row: verdict, name, command
    python benchmark/claims.py run nash_rate      # a study, or a row's; `run` alone runs what is not recorded

The rows stand in ledger_*.py and untested.py, the studies in tabular.py and bandit.py. Between the page's
marks everything is generated; the rest is prose and holds no result. A study's figures go to
results/claims.json with its command and commit; what is recorded there is reused unless --again.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

import ledger_demonstrations
import ledger_ipo
import ledger_nash
import ledger_selm
import record
import tyro
from ledger import NOT_TESTED, PAPERS, VERDICTS, Claim, Results, by_variant, point, seeds_for
from tabular import STUDIES
from untested import JOBS
from untested import ROWS as UNTESTED

CLAIMS = [*ledger_selm.ROWS, *ledger_ipo.ROWS, *ledger_nash.ROWS, *ledger_demonstrations.AFD]
CLAIMS += [*ledger_demonstrations.SPIN, *UNTESTED]
PAGE, FILE = record.ROOT / "docs" / "claims.md", record.RESULTS / "claims.json"
MARK = re.compile(r"(?s)(<!-- claims: (\w+) -->\n).*?(<!-- end -->)")
LETTER = {"selm": "S", "ipo": "O", "nash": "N", "afd": "D", "spin": "P"}


def main(
    words: tyro.conf.Positional[tuple[str, ...]] = (),
    check: bool = False,
    list: bool = False,
    again: bool = False,
) -> None:
    """Write docs/claims.md, check it, or run studies.

    Args:
        words: nothing, or `run` and names of studies or rows.
        check: change nothing; exit with 1 where the page is not what the results say.
        list: print every row's verdict, name and command.
        again: run studies that are recorded already.
    """
    if words:
        if words[0] != "run":
            sys.exit(f"error: {words[0]!r} is no command; there is `run`, and --check and --list.")
        return run(words[1:], again)
    results = Results()
    if list:
        return print(*listing(results), sep="\n")
    if check:
        wrong = drift(results, PAGE.read_text())
        print(*wrong or [f"{len(CLAIMS)} rows: every figure and verdict follows from the results"], sep="\n")
        sys.exit(bool(wrong))
    PAGE.write_text(page(results, PAGE.read_text()))
    print(f"{PAGE.relative_to(record.ROOT)}: {len(CLAIMS)} rows")


# --- studies ---------------------------------------------------------------------------------------


def run(names: tuple[str, ...], again: bool) -> None:
    """Run studies and record each as it ends."""
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in [study_of(name) for name in names] or STUDIES:
        if name in recorded and not again:
            print(f"{name}: recorded at {recorded[name]['git_commit'][:7]}")
            continue
        started = time.monotonic()
        figures = STUDIES[name]()
        seconds = round(time.monotonic() - started, 1)
        origin = {**record.origin(), "command": f"python benchmark/claims.py run {name}"}
        recorded[name] = {**origin, "seconds": seconds, "figures": figures}
        record.write(FILE, {name: recorded[name] for name in STUDIES if name in recorded})
        print(f"{name}: {seconds} s", flush=True)


def study_of(name: str) -> str:
    """The study of that name, or of the row of that name. Exits if there is none."""
    for row in CLAIMS:
        if row.name == name and row.command.startswith("python benchmark/claims.py run "):
            return row.command.split()[-1]
        if row.name == name:
            sys.exit(f"error: the row {name} is no cheap computation; its command is: {row.command}")
    if name not in STUDIES:
        sys.exit(f"error: no study or row {name!r}; the studies are {', '.join(STUDIES)}.")
    return name


# --- the page --------------------------------------------------------------------------------------


def page(results: Results, text: str) -> str:
    """The page with everything between its marks anew."""
    return MARK.sub(lambda found: found[1] + part(results, found[2]) + found[3], text)


def part(results: Results, name: str) -> str:
    """What stands between a pair of marks."""
    parts = {"counts": counts, "seeds": seeds, "gpu": gpu}
    return parts[name](results) if name in parts else ledger(results, name)


def numbered() -> dict[str, Claim]:
    """Every row by its number on the page: S1, S2, …, O1, …"""
    by_paper = {paper: itertools.count(1) for paper in PAPERS}
    return {f"{LETTER[row.paper]}{next(by_paper[row.paper])}": row for row in CLAIMS}


def counts(results: Results) -> str:
    """How many rows of each verdict, by paper."""
    verdicts = [(row.paper, row.outcome(results)[0]) for row in CLAIMS]
    total = Counter(verdict for _, verdict in verdicts)
    tested = len(CLAIMS) - total[NOT_TESTED]
    said = ", ".join(f"{total[verdict]} {verdict}" for verdict in VERDICTS)
    lines = [f"**{len(CLAIMS)} claims, {tested} of them tested: {said}.**", ""]
    lines += table(("paper", *VERDICTS))
    for paper, (heading, _) in PAPERS.items():
        own = Counter(verdict for key, verdict in verdicts if key == paper)
        lines.append(f"| {heading} | " + " | ".join(str(own[verdict] or "–") for verdict in VERDICTS) + " |")
    return "\n".join(lines) + "\n"


def ledger(results: Results, paper: str) -> str:
    """A paper's table, and below it each row's code, tests and command."""
    rows = {number: row for number, row in numbered().items() if row.paper == paper}
    lines = table(("", "claim", "outcome", "verdict"))
    for number, row in rows.items():
        verdict, text = row.outcome(results)
        lines.append(f"| {number} | {row.says} *{row.where}* | {text} | **{verdict}** |")
    lines.append("")
    for number, row in rows.items():
        lines.append(f"- {number}: {', '.join(link(each) for each in row.by)}; `{row.command}`")
    return "\n".join(lines) + "\n"


def link(place: str) -> str:
    """file:function as a link to the file, named module.function, or a test by its name."""
    file, name = place.split(":")
    shown = name if file.startswith("tests/") else f"{Path(file).stem}.{name}"
    return f"[`{shown}`](../{file})"


def table(heads: tuple[str, ...]) -> list[str]:
    """The first two lines of a Markdown table."""
    return ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]


def seeds(results: Results) -> str:
    """How many seeds of SELM and iterative DPO a difference would need, from the recorded spread."""
    runs, gaps = results["selm"]["runs"], (0.05, 0.02, 0.015, 0.01)
    minutes = mean([run["summary"]["seconds"] for run in runs]) / 60
    lines = table(
        ("", "differences, SELM less DPO", "their spread", *(f"seeds for {point(gap)}" for gap in gaps))
    )
    for key in ("win_rate", "eval_judge_win_rate", "score_after"):
        ours, dpo = by_variant(runs, key).values()
        found = [a - b for a, b in zip(ours, dpo, strict=True)]
        cells = [
            " / ".join(map(point, found)),
            point(stdev(found)),
            *(str(seeds_for(gap, found)) for gap in gaps),
        ]
        lines.append(f"| {key.replace('_', ' ')} | " + " | ".join(cells) + " |")
    ours, dpo = by_variant(runs, "win_rate").values()
    needed = seeds_for(0.015, [a - b for a, b in zip(ours, dpo, strict=True)])
    hours = 2 * needed * minutes / 60
    lines += [
        "",
        f"A run took {minutes:.1f} minutes on one thread: {needed} seeds of both, {hours:.0f} hours of it.",
    ]
    return "\n".join(lines) + "\n"


def gpu(results: Results) -> str:
    """What a GPU would run: reckoned hours, then the commands."""
    lines, commands = table(("what", "judge and data", "H200 hours, reckoned")), []
    for job in JOBS.values():
        lines.append(f"| {job.what} | {job.judge} | {job.hours()} |")
        commands += [f"# {job.what}", *job.commands]
    return "\n".join([*lines, "", "```bash", *commands, "```"]) + "\n"


def listing(results: Results) -> list[str]:
    """A line a row."""
    return [
        f"{number:<4}{row.outcome(results)[0]:<24}{row.name:<34}{row.command}"
        for number, row in numbered().items()
    ]


def drift(results: Results, text: str) -> list[str]:
    """A message for each line of the page that is not what the results give."""
    wrong = []
    missing = {"counts", "seeds", "gpu", *PAPERS} - {name for _, name, _ in MARK.findall(text)}
    wrong += [
        f"docs/claims.md has no place for {name}: <!-- claims: {name} --> … <!-- end -->"
        for name in sorted(missing)
    ]
    for found in MARK.finditer(text):
        shown = found[0].removeprefix(found[1]).removesuffix(found[3]).splitlines()
        for old, new in itertools.zip_longest(shown, part(results, found[2]).splitlines(), fillvalue=""):
            if old != new:
                wrong.append(f"docs/claims.md drifts ({found[2]})\n  page:    {old}\n  results: {new}")
    return wrong


if __name__ == "__main__":
    tyro.cli(main)
