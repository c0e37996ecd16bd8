"""The claims ledger: docs/claims.md says what the recorded results say, every row names code and a command
that exist, and a changed figure, on the page or in the results, is seen."""

import ast
import functools
import json
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from cleanalign import command_line

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))

import claims
import ledger
import record
import tabular
import untested

import afd
import ipo_md
import nash_md
import preference_model
import selm
import spin

ROOT = Path(__file__).parent.parent
SCRIPTS = {"selm.py": selm, "ipo_md.py": ipo_md, "nash_md.py": nash_md, "afd.py": afd, "spin.py": spin}
SCRIPTS["preference_model.py"] = preference_model
COMMANDS = sorted(
    {row.command for row in claims.CLAIMS} | {c for j in untested.JOBS.values() for c in j.commands}
)


@functools.cache
def names(file: str) -> set[str]:
    """What a Python file defines at its top level."""
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.fixture
def results(tmp_path) -> ledger.Results:
    """A copy of the recorded results."""
    for file in record.RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path)
    return ledger.Results(tmp_path)


# --- the page ---


def test_the_page_says_what_the_results_say():
    assert not claims.drift(ledger.Results(), claims.PAGE.read_text())


def test_enough_rows_enough_of_them_tested_and_only_known_verdicts():
    verdicts = [row.outcome(ledger.Results())[0] for row in claims.CLAIMS]
    assert len(verdicts) >= 30 and sum(v != ledger.NOT_TESTED for v in verdicts) >= 20
    assert set(verdicts) <= set(ledger.VERDICTS)
    assert {row.paper for row in claims.CLAIMS} == set(ledger.PAPERS)
    assert len({row.name for row in claims.CLAIMS}) == len(claims.CLAIMS)
    for row in claims.CLAIMS:
        assert row.says and row.where and row.by and "|" not in row.says + row.outcome(ledger.Results())[1]


def test_a_figure_changed_by_hand_on_the_page_is_seen(tmp_path, monkeypatch, capsys):
    text = claims.PAGE.read_text()
    for name in ("counts", "seeds", "gpu", *ledger.PAPERS):
        found = next(found for found in claims.MARK.finditer(text) if found[2] == name)
        digit = [m.start() for m in re.finditer(r"\d", found[0]) if m.start() > len(found[1])][-1]
        other = str((int(found[0][digit]) + 1) % 10)
        changed = text[: found.start() + digit] + other + text[found.start() + digit + 1 :]
        wrong = claims.drift(ledger.Results(), changed)
        assert len(wrong) == 1 and f"({name})" in wrong[0], name
    page = tmp_path / "claims.md"
    page.write_text(changed)
    monkeypatch.setattr(claims, "PAGE", page)
    with pytest.raises(SystemExit) as stop:
        claims.main(check=True)
    assert stop.value.code == 1 and "drifts" in capsys.readouterr().out
    page.write_text(text.replace("<!-- claims: nash -->", ""))
    with pytest.raises(SystemExit):
        claims.main(check=True)
    assert "no place for nash" in capsys.readouterr().out


def changed(results: ledger.Results, name: str, change) -> ledger.Results:
    """The results with one file changed by a function of its content."""
    content = results[name]
    change(content)
    (results.folder / f"{name}.json").write_text(json.dumps(content))
    return ledger.Results(results.folder)


@pytest.mark.parametrize(
    "name", ["selm", "ipo", "cycle_smollm2", "pool", "constructions", "scale", "adversarial"]
)
def test_a_changed_result_is_seen(name, results):
    """Every number of a file half as large: the page no longer follows from it."""

    def halve(value):
        if isinstance(value, dict):
            return {k: v if k in ("seed", "n") else halve(v) for k, v in value.items()}
        if isinstance(value, list):
            return [halve(inner) for inner in value]
        return value / 2 if isinstance(value, float) else value

    assert not claims.drift(results, claims.PAGE.read_text())
    other = changed(results, name, lambda content: content.update(halve(content)))
    assert claims.drift(other, claims.PAGE.read_text())


@pytest.mark.parametrize("name", tabular.STUDIES)
def test_every_study_is_recorded_clean_and_printed(name, results):
    """Its figures stand on the page: other figures change it."""
    recorded = results["claims"][name]
    assert recorded["git_dirty"] is False and recorded["command"] == f"python benchmark/claims.py run {name}"

    def shift(value):
        if isinstance(value, dict):
            return {key: shift(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [shift(inner) for inner in value]
        return value + 0.5 if isinstance(value, int | float) else value

    other = changed(
        results, "claims", lambda content: content[name].update(figures=shift(recorded["figures"]))
    )
    assert claims.drift(other, claims.PAGE.read_text())


def test_a_verdict_follows_its_condition(results):
    """Not only figures: other results, another verdict."""
    rows = {row.name: row for row in claims.CLAIMS}

    def verdict(row, name, change):
        return rows[row].outcome(changed(results, name, change))[0]

    def rlhf(value):
        def change(content):
            for run in content["runs"]:
                mine = run["variant"] == "RLHF"
                run["summary"]["exploitability_after"] = run["late_exploitability"] = value if mine else 0.2

        return change

    for study in results.recorded(*ledger.CYCLES):
        changed(results, study, rlhf(0.4))
    assert rows["rlhf_is_exploitable_on_text"].outcome(results)[0] == ledger.IN_SHAPE
    assert verdict("rlhf_is_exploitable_on_text", "cycle_smollm2", rlhf(0.1)) == ledger.NOT_SEEN

    def curves(rise):
        def change(content):
            for n, run in enumerate(content["runs"]):
                count, noise = len(run["curves"]["score"]), random.Random(n)
                run["curves"]["score"] = [rise * i / count + noise.gauss(0, 0.1) for i in range(count)]

        return change

    assert verdict("adversarial_improves_on_sft", "adversarial_small", curves(1)) == ledger.IN_SHAPE
    assert verdict("adversarial_improves_on_sft", "adversarial_small", curves(0)) == ledger.NOT_SEEN
    assert verdict("adversarial_improves_on_sft", "adversarial_small", curves(-1)) == ledger.CONTRADICTED

    def distilled(score):
        told = {"samples_per_prompt": 6, "best_of_6_score": 0.6}
        return lambda content: content.update(
            afd={"summary": {"sft_score": 0.5, "score_after": score, "distil": told}}
        )

    assert verdict("distil_is_best_of_n", "default_runs", distilled(0.6)) == ledger.IN_SHAPE
    assert verdict("distil_is_best_of_n", "default_runs", distilled(0.5)) == ledger.NOT_SEEN
    without = changed(results, "default_runs", lambda content: content.pop("afd"))
    assert rows["distil_is_best_of_n"].outcome(without)[0] == ledger.NOT_TESTED


# --- what a row names ---


@pytest.mark.parametrize("place", sorted({place for row in claims.CLAIMS for place in row.by}))
def test_the_code_of_a_row_exists(place):
    file, name = place.split(":")
    assert (ROOT / file).exists() and name in names(file), place


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_of_a_row_exists(command):
    python, *words = shlex.split(command)
    assert python == "python"
    if words[:2] == ["-m", "pytest"]:
        assert any(words[4] in name for name in names(words[2]) if name.startswith("test_"))
        return
    file, rest = words[0], words[1:]
    if file in SCRIPTS:
        assert command_line.parse(SCRIPTS[file].RECIPES, rest)
        return
    tree = ast.parse((ROOT / file).read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    accepted = {arg.arg.replace("_", "-") for arg in main.args.args}
    flags = {word[2:].split("=")[0] for word in rest if word.startswith("--")}
    assert flags <= accepted, command
    if file == "benchmark/claims.py":
        assert rest[0] == "run" and rest[1] in tabular.STUDIES


# --- studies ---


@pytest.mark.parametrize("name", ["token_mixture", "sweep", "nash_guarantee", "selm_force"])
def test_a_study_gives_the_recorded_figures(name):
    if name == "selm_force":
        recorded = ledger.Results().study("selm_identities")["force"]
        assert {
            f"{a:g}": pytest.approx(tabular.force(a), rel=1e-6) for a in (1e-4, 1e-3, 1e-2, 1.0)
        } == recorded
        return
    recorded, again = ledger.Results().study(name), tabular.STUDIES[name]()
    assert flat(again) == pytest.approx(flat(recorded), rel=1e-4, abs=1e-8)


def flat(value) -> list[float]:
    """The numbers of nested figures, in order."""
    if isinstance(value, dict | list):
        return [x for inner in (value.values() if isinstance(value, dict) else value) for x in flat(inner)]
    return [float(value)] if isinstance(value, int | float) else []


def test_studies_that_are_recorded_are_not_run_again(tmp_path, monkeypatch, capsys):
    ran = []
    for name in ("one", "other"):
        monkeypatch.setitem(tabular.STUDIES, name, lambda name=name: ran.append(name) or {"figure": 1.0})
    monkeypatch.setattr(claims, "FILE", tmp_path / "claims.json")
    claims.main(("run", "one"))
    claims.main(("run", "one", "other"))
    assert ran == ["one", "other"] and "one: recorded at" in capsys.readouterr().out
    claims.main(("run", "one"), again=True)
    assert ran == ["one", "other", "one"]
    recorded = json.loads((tmp_path / "claims.json").read_text())
    assert recorded["other"]["command"] == "python benchmark/claims.py run other"
    assert recorded["other"]["figures"] == {"figure": 1.0} and "git_commit" in recorded["one"]
    assert claims.study_of("nash_bound_holds") == "nash_rate"
    for name, message in (("nowhere", "no study or row"), ("ipo_is_ahead", "its command is: python")):
        with pytest.raises(SystemExit, match=message):
            claims.study_of(name)
    with pytest.raises(SystemExit, match="no command"):
        claims.main(("walk",))


def test_the_list_names_every_row(capsys):
    claims.main(list=True)
    assert len(capsys.readouterr().out.splitlines()) == len(claims.CLAIMS)


def test_how_figures_are_written():
    assert [ledger.point(x) for x in (0.1234, -0.5, 1.5, -0.0001, 10.25)] == [
        ".123",
        "−.500",
        "1.500",
        ".000",
        "10.250",
    ]
    assert (ledger.tiny(3e-14), ledger.tiny(0.0)) == ("< 1e-13", "0")
    assert ledger.seeds_for(0.02, [0.0, 0.02, 0.04]) == 8  # (2.802 · .02 / .02)² = 7.85
    assert ledger.told(1.0, 0.4) == ledger.IN_SHAPE and ledger.told(-1.0, 0.4) == ledger.CONTRADICTED
    assert ledger.told(0.7, 0.4) == ledger.NOT_SEEN
