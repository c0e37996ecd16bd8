"""benchmark/vs_trl.py: our side does equal work, and an environment that is missing is said with the cure.
(TRL's side needs its environment.)"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import vs_trl  # noqa: E402
import vs_trl_ours  # noqa: E402

import experiment  # noqa: E402
from cleanalign.data import load_rows  # noqa: E402
from cleanalign.errors import UserError  # noqa: E402


@pytest.mark.parametrize("algorithm", ["nash", "ipo"])
def test_our_side_samples_every_token_and_changes_the_policy(world, monkeypatch, algorithm):
    rows = load_rows(f"{world}/prompts.jsonl", held_out=8)
    monkeypatch.setattr(experiment, "load_rows", lambda *_, **__: rows)
    optimisers = []
    make_optimiser = vs_trl_ours.make_optimiser

    def made(*args):
        optimisers.append(make_optimiser(*args))
        return optimisers[-1]

    monkeypatch.setattr(vs_trl_ours, "make_optimiser", made)
    settings = dict(
        algorithm=algorithm, model=f"{world}/model", batch_size=4, new_tokens=12, micro_batch_tokens=0
    )
    requests = [json.dumps({"new_tokens": n, "batch": i, "seed": 0}) for i, n in enumerate((3, 12))]
    side = vs_trl_ours.serve(settings, requests)
    next(side)
    before = [master.clone() for master in optimisers[0].masters]
    steps = list(side)
    assert [step["new_tokens"] for step in steps] == [2 * 4 * 3, 2 * 4 * 12]
    assert all(0 < step["sampling"] + step["training"] < step["seconds"] for step in steps)
    assert any((master != old).any() for master, old in zip(optimisers[0].masters, before, strict=True))


def test_unequal_work_is_refused():
    step = {"new_tokens": 64, "prompt_tokens": 40}
    vs_trl.check_step("TRL", step, 64, {"prompt_tokens": 40})
    with pytest.raises(UserError, match="64 tokens were sampled, not 65"):
        vs_trl.check_step("TRL", step, 65, {"prompt_tokens": 40})
    with pytest.raises(UserError, match="40 tokens, ours 41"):
        vs_trl.check_step("TRL", step, 64, {"prompt_tokens": 41})


def test_missing_environment_names_the_command_that_makes_it(tmp_path):
    command = [sys.executable, str(ROOT / "benchmark/vs_trl.py"), "nash", "--trl-env", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"python -m venv {tmp_path}/none" in done.stderr and "pip install trl==1.13.0" in done.stderr


def test_a_side_that_dies_is_told_with_its_last_words(tmp_path):
    with pytest.raises(UserError, match="(?s)ours ended with 3.*no such model"):
        vs_trl.Side(
            "ours",
            [sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(3)"],
            tmp_path / "log",
        )
