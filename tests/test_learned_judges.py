"""benchmark/: a watched run is the very run, and what the baselines of real comparisons compute."""

import gzip
import json
import math
import subprocess
import sys

import pytest
from running import ROOT, metrics_of, start

import nash_md
import selm

sys.path.insert(0, str(ROOT / "benchmark"))
import real_comparisons


def watched(script: str, flags: list[str], gold: str) -> None:
    """Run benchmark/watched.py in a process of its own."""
    words = [sys.executable, "benchmark/watched.py", script, "--gold", gold, "--every", "2", *flags]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("script", [selm, nash_md], ids=lambda module: module.__name__)
def test_watching_a_run_changes_nothing(script, flags, world, tmp_path):
    flags = [f for f in flags if not f.startswith("--judge")]
    flags += [f"--judge={world}/judges.py:goodness", "--num-prompts=48", "--max-steps=4", "--save-every=0"]
    flags.append("--learning-rate=0.01")
    start(script, *flags, "--run-name=plain")
    watched(script.__name__, [*flags, "--run-name=watched"], f"{world}/judges.py:goodness")
    assert metrics_of(tmp_path / "watched") == metrics_of(tmp_path / "plain")
    lines = (tmp_path / "watched" / "watched.jsonl").read_text().splitlines()
    first, *rest = map(json.loads, lines)
    assert [row["step"] for row in rest] == [2, 4]
    assert first["step"] == 0 and first["kl"] == pytest.approx(0, abs=1e-5)  # nothing has been learnt yet
    assert rest[-1]["kl"] > 0.01 and rest[-1]["proxy"] > first["proxy"]
    assert all(row["proxy"] == row["gold"] for row in (first, *rest))  # one and the same judge


def test_strengths_are_the_bradley_terry_fit():
    rows = [{"chosen_model": "x", "rejected_model": "hub"}] * 3 + [
        {"chosen_model": "hub", "rejected_model": "x"}
    ]
    rows += [{"chosen_model": "hub", "rejected_model": "y"}] * 2
    strength = real_comparisons.strengths(rows)
    assert strength["hub"] == 0
    assert strength["x"] == pytest.approx(math.log(3.5 / 1.5)) and strength["y"] == pytest.approx(
        math.log(0.5 / 2.5)
    )


def test_baselines_by_hand(tmp_path):
    """The reply with more characters, and the stronger generator, on the pairs that a run measured."""

    def write(name, rows):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    models = {"chosen_model": "x", "rejected_model": "hub"}, {"chosen_model": "hub", "rejected_model": "x"}
    train, test = write("train.jsonl.gz", [models[0]] * 3 + [models[1]]), write("test.jsonl.gz", models)
    pairs = [("test.jsonl.gz:1", "aa", "b"), ("test.jsonl.gz:2", "a", "bb")]
    lines = [json.dumps({"id": i, "prompt": i, "a": a, "b": b}) + "\n" for i, a, b in pairs]
    (tmp_path / "predictions.jsonl").write_text("".join(lines))
    found = real_comparisons.baselines_of(tmp_path, [train, test])
    assert found["pairs"] == 2 and found["longer"]["accuracy"] == 0.5 == found["generator"]["accuracy"]
    lines[1] = lines[1].replace('"a": "a"', '"a": "aaa"')
    (tmp_path / "predictions.jsonl").write_text("".join(lines))
    assert real_comparisons.baselines_of(tmp_path, [train, test])["longer"]["accuracy"] == 1
    assert real_comparisons.longer({"a": "xx", "b": "yy"}) == 0.5
