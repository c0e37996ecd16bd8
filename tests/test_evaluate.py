"""evaluate.py: the table, what is kept, files of answers, the benchmarks' formats, the page in a browser, bad
input."""

import ast
import dataclasses
import html
import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import common
import evaluate
import judges
from cleanalign.comparison import pool, versus
from cleanalign.comparison_page import page
from cleanalign.errors import UserError
from cleanalign.kept import Kept, content_of, fingerprint
from cleanalign.statistics import win_rate_interval

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    '</script><script>document.title="broken"</script><img src=x onerror="document.title=1"> & "\'\u2028 <!--'
)


def answers_file(path: Path, rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows.items()))
    return path


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """Three tiny models with different weights, and the flags of a short comparison."""
    root = tmp_path_factory.mktemp("models")
    return [tiny.folder(root / f"model-{seed}", seed=seed) for seed in (1, 2, 3)]


@pytest.fixture
def compare(world, tmp_path):
    """Run the script in the tiny world; returns the comparison and its folder."""

    def run(*argv, name="x", dataset=True):
        words = [*map(str, argv), f"--run-dir={tmp_path}", f"--run-name={name}"]
        words += ["--device=cpu", "--dtype=float32", "--max-new-tokens=6", "--eval-prompts=16"]
        words += [f"--dataset={world}/prompts.jsonl"] if dataset else []
        evaluate.command_line(words)
        folder = tmp_path / name
        return json.loads((folder / "comparison.json").read_text()), folder

    return run


@pytest.fixture
def stop(compare, capsys):
    """Run it with a mistake; returns the message."""

    def run(*argv, dataset=False):
        with pytest.raises(SystemExit) as ended:
            compare(*argv, dataset=dataset)
        message = capsys.readouterr().err
        assert ended.value.code == 2 and message.startswith("error: ") and "Traceback" not in message, message
        return message

    return run


@pytest.fixture
def counted(monkeypatch):
    """How many rows were sampled and how many questions the judges were asked."""
    counts = {"sampled": 0, "asked": 0}
    sample, load = common.sample, judges.load_judge

    def counting_sample(model, prompts, *rest, **more):
        counts["sampled"] += len(prompts)
        return sample(model, prompts, *rest, **more)

    def counting_judge(*words, **settings):
        judge = load(*words, **settings)
        for kind in ("preference", "score"):
            ask = getattr(judge, kind)

            def asking(prompts, *columns, ask=ask):
                counts["asked"] += len(prompts)
                return ask(prompts, *columns)

            setattr(judge, kind, ask and asking)
        return judge

    monkeypatch.setattr(common, "sample", counting_sample)
    monkeypatch.setattr(evaluate, "load_judge", counting_judge)
    return counts


# --- the table ---


def test_three_models_two_judges(models, world, compare, capsys):
    judge = f"{world}/judges.py:more_good"
    found, folder = compare(*models, f"--judge={judge}", "--judge=cycle")
    assert found["models"] == ["model-1", "model-2", "model-3"] and found["judge"] == judge
    assert list(found["judges"]) == [judge, "cycle"] and found["prompts"] == 16
    for key in ("preference", "interval", "nash", "exploitability"):
        assert found[key] == found["judges"][judge][key]
    for table in found["judges"].values():
        for i in range(3):
            assert table["preference"][i][i] == 0.5 and table["interval"][i][i] == [0.5, 0.5]
            for j in range(3):
                assert table["preference"][i][j] + table["preference"][j][i] == pytest.approx(1)
                low, high = table["interval"][i][j]
                assert low <= table["preference"][i][j] <= high
        assert sum(table["nash"]) == pytest.approx(1)
        assert sorted(table["ranking"]) == found["models"]
    assert {"style/question", "exploitability"} <= set(found["judges"]["cycle"]["measured"]["model-1"])
    # anybody can count again
    rows = [json.loads(line) for line in (folder / "comparisons.jsonl").read_text().splitlines()]
    ours = [row["preference"][judge][0][1] for row in rows]
    assert sum(ours) / 16 == pytest.approx(found["preference"][0][1])
    asked = judges.load_judge(judge)
    prompts, a, b = (
        [row["prompt"] for row in rows],
        *([row["replies"][m] for row in rows] for m in ("model-1", "model-2")),
    )
    assert asked.preference(prompts, a, b).tolist() == pytest.approx(ours, abs=1e-6)
    text = capsys.readouterr().out
    assert "Nash mixture" in text and "model-3" in text
    assert "| model-1 |" in (folder / "comparison.md").read_text()


def test_both_orders_are_asked(tmp_path, compare, world):
    """A judge that always says "the first" knows nothing: ½ everywhere."""
    for name in "ab":
        answers_file(tmp_path / f"{name}.jsonl", {"one": name, "two": name})
    found, _ = compare(
        *(tmp_path / f"{n}.jsonl" for n in "ab"), f"--judge={world}/judges.py:first_wins", dataset=False
    )
    assert found["preference"] == [[0.5, 0.5], [0.5, 0.5]] and found["nash"] == [0.5, 0.5]


def test_a_cycle_of_files_has_its_mixture(tmp_path, compare):
    texts = {"asks": "Why is that?", "shouts": "Great!", "says": "It is so."}
    files = [answers_file(tmp_path / f"{n}.jsonl", {f"p{i}": t for i in range(5)}) for n, t in texts.items()]
    found, _ = compare(*files, "--judge=cycle", dataset=False)
    assert found["models"] == list(texts)
    assert found["preference"] == [[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]
    assert found["nash"] == pytest.approx([1 / 3] * 3) and found["exploitability"] == [0.5] * 3
    assert found["best_response"] == ["says", "asks", "shouts"]


def test_pool_against_a_count_by_hand():
    p = torch.full((4, 2, 2), 0.5)
    p[:, 0, 1] = torch.tensor([1.0, 0.9, 0.5, 0.2])
    p[:, 1, 0] = 1 - p[:, 0, 1]
    told = pool(["a", "b"], p)
    assert told["preference"][0][1] == pytest.approx(0.65) and told["win_rate"][0][1] == pytest.approx(0.625)
    assert told["tie_rate"][0][1] == 0.25 and told["ranking"] == ["a", "b"]
    assert told["score"] == pytest.approx([0.65, 0.35]) and told["exploitability"] == pytest.approx([0, 0.15])
    low, high = told["interval"][0][1]
    assert 0.2 < low < 0.5 and 0.8 < high < 1


def test_versus_is_what_the_summary_says():
    p = [1.0, 0.9, 0.5, 0.2]
    told = versus(p)
    assert (told["win_rate"], told["win_rate_interval"]) == win_rate_interval(p)
    assert told["tie_rate"] == 0.25 and told["mean_preference"] == pytest.approx(0.65)


def test_models_draw_independently_and_whoever_else_is_there(models, world, compare, tmp_path):
    """The same weights give the same replies in any pool and under any name; other weights draw otherwise."""
    copy = shutil.copytree(models[0], tmp_path / "copy")
    answers = {}
    for name, pair in {"x": models[:2], "y": [models[2], copy]}.items():
        _, folder = compare(*pair, "--judge=random", f"--cache={tmp_path}/{name}.sqlite", name=name)
        answers |= {file.stem: file.read_text() for file in (folder / "answers").iterdir()}
    assert answers["model-1"] == answers["copy"] != answers["model-2"]


# --- what is kept ---


def test_a_second_call_samples_and_asks_nothing(models, world, compare, counted):
    judge = ["--judge=random", f"--judge={world}/judges.py:first_wins"]
    first, _ = compare(*models[:2], *judge, name="x")
    assert counted["sampled"] == 32 and counted["asked"] > 0
    counted.update(sampled=0, asked=0)
    second, _ = compare(*models[:2], *judge, name="y")
    assert counted == {"sampled": 0, "asked": 0}
    assert second["replies_sampled"] == {} and set(second["judge_asked"].values()) == {0}
    clock = ("seconds", "replies_sampled", "judge_asked")
    assert {k: v for k, v in first.items() if k not in clock} == {
        k: v for k, v in second.items() if k not in clock
    }
    compare(*models, *judge, name="z")  # one more model: it alone answers
    assert counted["sampled"] == 16


def test_other_weights_settings_or_judges_are_asked_anew(models, world, compare, counted, tmp_path):
    judge = shutil.copy(f"{world}/judges.py", tmp_path / "own.py")
    changed = shutil.copytree(models[0], tmp_path / "changing")
    words = [changed, models[1], f"--judge={judge}:goodness"]
    compare(*words, name="a")
    counted.update(sampled=0, asked=0)
    tiny.folder(tmp_path / "changing", seed=9)
    compare(*words, name="b")
    assert counted["sampled"] == 16
    compare(*words, "--temperature=0.5", name="c")
    compare(*words, "--seed=1", name="d")
    assert counted["sampled"] == 16 + 32 + 32
    counted.update(sampled=0, asked=0)
    Path(judge).write_text(Path(judge).read_text().replace('"good", "fine"', '"bad"'))
    compare(*words, name="e")
    assert counted["sampled"] == 0 and counted["asked"] > 0


def test_answers_are_kept_as_they_come(models, compare, monkeypatch, counted):
    """A killed call loses the part it was at, not what was before."""
    monkeypatch.setattr(evaluate, "AT_ONCE", 4)
    sample, calls = common.sample, []

    def dies(*words, **more):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return sample(*words, **more)

    monkeypatch.setattr(common, "sample", dies)
    with pytest.raises(SystemExit) as ended:
        compare(*models[:2], "--judge=random")
    assert ended.value.code == 130
    counted.update(sampled=0)
    monkeypatch.setattr(common, "sample", sample)
    compare(*models[:2], "--judge=random")  # the same command: the same name is free, as nothing was written
    assert counted["sampled"] == 32 - 5 * 4


WRITER = """
import sys
from cleanalign.kept import Kept
kept = Kept(sys.argv[1])
for i in range(40):
    kept.write({f"{sys.argv[2]}-{i}": i, f"shared-{i}": i})
"""


def test_writers_at_once_lose_nothing(tmp_path):
    file = str(tmp_path / "kept.sqlite")
    command = [sys.executable, "-c", WRITER, file]
    writers = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(3)]
    assert [process.wait(300) for process in writers] == [0, 0, 0]
    keys = [f"{kind}-{i}" for kind in (0, 1, 2, "shared") for i in range(40)]
    assert Kept(file).read(keys) == [i for _ in range(4) for i in range(40)]


def test_a_writer_killed_within_a_transaction_leaves_nothing_half(tmp_path):
    file = tmp_path / "kept.sqlite"
    Kept(file).write({"old": 1})
    code = f"""
import os, sqlite3
connection = sqlite3.connect({str(file)!r}, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
connection.execute("INSERT INTO kept VALUES ('half', '1')")
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert Kept(file).read(["old", "half"]) == [1, None]
    Kept(file).write({"new": [1, "\ud800"]})
    assert Kept(file).read(["new"]) == [[1, "\ud800"]]


def test_a_file_that_is_no_cache_is_told(tmp_path):
    (tmp_path / "no.sqlite").write_text(
        "certainly not a database, but longer than a header of one hundred bytes " * 5
    )
    with pytest.raises(UserError, match="--cache"):
        Kept(tmp_path / "no.sqlite")


def test_content_sees_every_byte_and_reads_once(tmp_path, monkeypatch):
    kept = Kept(tmp_path / "k.sqlite")
    folder = tmp_path / "m"
    tiny.folder(folder)
    before = content_of(folder, kept)
    monkeypatch.setattr("hashlib.file_digest", None, raising=False)  # would raise if a file were read again
    assert content_of(folder, kept) == before
    monkeypatch.undo()
    (folder / "README.md").write_text("a card")
    assert content_of(folder, kept) == before
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert content_of(folder, kept) != before


def test_fingerprints_do_not_run_into_each_other():
    assert fingerprint("ab", "c") != fingerprint("a", "bc") != fingerprint(["a", "bc"])


# --- names and files ---


def test_names(models, world, compare, tmp_path):
    """A run's name is its folder's, also by its model/; a file's is without the ending; or as given."""
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "args.json").write_text(json.dumps({"args": {"max_new_tokens": 99}}))
    shutil.copytree(models[0], run / "model")
    prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()]
    answers_file(tmp_path / "old.v2.jsonl", dict.fromkeys(prompts, "good"))
    found, _ = compare(run, tmp_path / "old.v2.jsonl", f"again={run}/model", "--judge=random")
    assert found["models"] == ["my-run", "old.v2", "again"]
    assert found["preference"][0][2] == 0.5  # the same weights
    found, _ = compare(run / "model", models[1], "--judge=random", name="y")
    assert found["models"] == ["my-run", "model-2"]


def test_a_difference_from_training_is_told(models, compare, tmp_path, capsys):
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "args.json").write_text(json.dumps({"args": {"max_new_tokens": 99, "temperature": 1.0}}))
    shutil.copytree(models[0], run / "model")
    compare(run, models[1], "--judge=random")
    assert "my-run was trained with --max-new-tokens 99 (here 6)" in capsys.readouterr().out


def test_the_prompts_are_the_scripts_own(models, world, tmp_path):
    """The same held-out prompts in the same order as a run's final comparison, and no more of them; also of
    chitchat, which is taken where nothing is named."""
    tokenizer = common.load_tokenizer(models[0])
    for dataset in (f"{world}/prompts.jsonl", None):
        args = evaluate.Args(dataset=dataset, eval_prompts=12, max_prompt_length=40)
        found = evaluate.rows_of(args, [evaluate.Contender("m", models[0], tokenizer=tokenizer)])
        _, rows = common.load_rows(dataset or "chitchat", (), held_out=12)
        expected, _ = common.encode_rows(tokenizer, rows, 40, 12, 0, "held-out prompts")
        assert [row.id for row in found] == [row.id for row in expected] and len(found) == 12


def test_answers_can_be_given_back_as_files(models, compare, tmp_path, counted):
    first, folder = compare(*models[:2], "--judge=random")
    counted.update(sampled=0)
    files = sorted((folder / "answers").iterdir())
    second, _ = compare(*files, "--judge=random", name="y", dataset=False)
    assert second["models"] == first["models"] and counted["sampled"] == 0
    assert second["preference"][0][1] == pytest.approx(first["preference"][0][1])


def test_an_empty_reply_is_an_answer(tmp_path, compare, world):
    a = answers_file(tmp_path / "a.jsonl", {"one": "", "two": "good"})
    b = answers_file(tmp_path / "b.jsonl", {"one": "good", "two": ""})
    found, _ = compare(a, b, f"--judge={world}/judges.py:more_good", dataset=False)
    assert found["prompts"] == 2 and found["preference"][0][1] == pytest.approx(0.5)


def test_common_prompts(tmp_path, compare, stop, capsys):
    a = answers_file(tmp_path / "a.jsonl", {"one": "x", "two": "y", "three": "z"})
    b = answers_file(tmp_path / "b.jsonl", {"three": "z", "one": "x"})
    assert "b: 1 of 3 prompts are missing from its answers, such as 'two'" in stop(a, b, "--judge=random")
    found, _ = compare(a, b, "--judge=random", "--common-prompts", dataset=False)
    assert found["prompts"] == 2 and "1 of 3 rows dropped" in capsys.readouterr().out


# --- the benchmarks' formats ---


def test_alpaca_eval_files(models, world, compare, tmp_path, counted):
    questions = [{"instruction": f"good {word}", "dataset": "x"} for word in tiny.WORDS[:20]]
    (tmp_path / "alpaca.json").write_text(json.dumps(questions))
    words = [
        "--benchmark=alpaca_eval",
        f"--dataset={tmp_path}/alpaca.json",
        f"--judge={world}/judges.py:more_good",
    ]
    found, folder = compare(*models[:2], *words, dataset=False)
    outputs = json.loads((folder / "alpaca_eval" / "model-2.json").read_text())
    assert [o["instruction"] for o in outputs] == [q["instruction"] for q in questions]  # all, in their order
    assert {o["generator"] for o in outputs} == {"model-2"} and all(
        isinstance(o["output"], str) for o in outputs
    )
    (file,) = (folder / "alpaca_eval" / "annotations").rglob("model-2.json")
    annotations = json.loads(file.read_text())
    mean = sum(a["preference"] - 1 for a in annotations) / len(annotations)
    assert mean == pytest.approx(found["preference"][1][0])  # 2 is for output_2, the model's
    assert annotations[0]["output_2"] == outputs[0]["output"] and annotations[0]["generator_1"] == "model-1"
    compare(folder / "alpaca_eval" / "model-2.json", models[0], *words, name="y", dataset=False)
    counted.update(sampled=0)
    found, _ = compare(models[0], *words, name="z", dataset=False)  # one alone: nothing to compare
    assert found["judges"] == {} and counted["sampled"] == 0


def test_mt_bench_files(models, compare, tmp_path, monkeypatch):
    questions = [
        {"question_id": 81 + i, "category": category, "turns": [f"good {category}", "bad ?"]}
        for i, category in enumerate(["writing", "math", "stem", "coding"])
    ]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions[::-1]))
    seen, sample = [], common.sample

    def watching(model, prompts, ends, **more):
        seen.append((more["temperature"], len(prompts), max(map(len, prompts))))
        return sample(model, prompts, ends, **more)

    monkeypatch.setattr(common, "sample", watching)
    _, folder = compare(
        *models[:2],
        "--benchmark=mt_bench",
        f"--dataset={tmp_path}/question.jsonl",
        "--judge=random",
        dataset=False,
    )
    file = folder / "data" / "mt_bench" / "model_answer" / "model-1.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [81, 82, 83, 84]
    for line in lines:
        assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["model_id"] == "model-1" and len(line["choices"][0]["turns"]) == 2
    assert sorted({(t, n) for t, n, _ in seen}) == [(0.0, 2), (0.1, 1), (0.7, 1)]
    first, second = (longest for t, _, longest in seen[:2])
    assert second > first  # the second turn reads the first
    assert (folder / "data" / "mt_bench" / "question.jsonl").exists()


def test_length_controlled_asks_the_package_or_says_what_is_missing(tmp_path, stop):
    files = [answers_file(tmp_path / f"{n}.jsonl", {"one": n}) for n in "ab"]
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "one"}))
    words = [
        "--benchmark=alpaca_eval",
        f"--dataset={tmp_path}/q.jsonl",
        "--length-controlled",
        "--judge=random",
    ]
    try:
        import alpaca_eval  # noqa: F401
    except ImportError:
        assert "cleanalign[alpaca]" in stop(*files, *words)
    else:
        assert "alpaca_eval ended with" in stop(*files, *words)  # one row, or no hub
    assert json.loads((tmp_path / "x" / "comparison.json").read_text())["prompts"] == 1  # all else is there


# --- the page ---


def hostile_page(tmp_path) -> Path:
    p = torch.full((3, 2, 2), 0.5)
    p[:, 0, 1] = torch.tensor([0.9, 0.2, 0.5])
    p[:, 1, 0] = 1 - p[:, 0, 1]
    names = ["a<b>&\"'", "z</title>"]
    told = pool(names, p)
    replies = [[HOSTILE, "plain needle"], ["second", HOSTILE], ["third", ""]]
    prompts = ["first " + HOSTILE, "two", "three"]
    text = page(names, {"j</h2>": told}, (prompts, replies, {"j</h2>": p.tolist()}))
    file = tmp_path / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_page_is_one_file_without_a_network(tmp_path):
    text = hostile_page(tmp_path).read_text()
    assert (
        "http:" not in text
        and "https:" not in text
        and "src=" not in re.sub(r"(?s)<script type.*?</script>", "", text)
    )
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "default-src 'none'" in text and "unsafe-eval" not in text
    data = json.loads(re.search(r'(?s)id="data">(.*?)</script>', text)[1])
    assert data["replies"][0][0] == HOSTILE  # whole, as it was


def in_browser(file: Path, tail: str = "") -> str:
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        "--dump-dom",
    ]
    done = subprocess.run([*command, f"file://{file}{tail}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_page_in_a_browser(tmp_path):
    """It runs from file://, sorts, searches, switches pairs, and no reply becomes anything but text."""
    file = hostile_page(tmp_path)
    found = in_browser(file)
    assert 'data-ready="yes"' in found and "<title>2 models, 3 prompts</title>" in found
    assert "<img" not in found and found.count("<script") == 2
    assert html.escape(HOSTILE, quote=False).split("\u2028")[0] in found
    order = lambda text: re.findall(r'data-row="(\d)"', text)  # noqa: E731
    assert order(found) == ["0", "2", "1"]  # a preferred most first
    assert order(in_browser(file, "#sort=b")) == ["1", "2", "0"]
    assert order(in_browser(file, "#sort=tie")) == ["2", "1", "0"]
    assert order(in_browser(file, "#a=1&b=0")) == ["1", "2", "0"]
    needle = in_browser(file, "#q=NEEDLE")
    assert order(needle) == ["0"] and "<mark>needle</mark>" in needle and "1 of 3 prompts" in needle
    assert "(empty)" in in_browser(file, "#sort=file")
    assert order(in_browser(file, "#q=%3Cscript%3E")) == ["0", "1"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_script_that_is_not_the_page_s_own_does_not_run(tmp_path):
    """The policy holds even if some text did become HTML."""
    file = hostile_page(tmp_path)
    broken = file.read_text().replace("<main>", '<main><script>document.title = "broken"</script>')
    file.write_text(broken)
    assert "<title>2 models" in in_browser(file)


# --- the command line ---


def test_every_argument_is_documented_and_read():
    tree = ast.parse((ROOT / "evaluate.py").read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    pairs = [(a.target.id, b) for a, b in zip(body, body[1:]) if isinstance(a, ast.AnnAssign)]
    documented = {name: doc.value.value for name, doc in pairs if isinstance(doc, ast.Expr)}
    source = (ROOT / "evaluate.py").read_text() + (ROOT / "experiment.py").read_text()
    for name in (f.name for f in dataclasses.fields(evaluate.Args)):
        assert len(documented.get(name, "")) > 15, f"--{name} has no docstring"
        assert re.search(rf"args\.{name}\b", source), f"--{name} is never read"


def test_help_and_what_a_benchmark_sets(capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.command_line(["--benchmark=alpaca_eval", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "python evaluate.py" in text
    assert re.search(r"--max-new-tokens\b[^)]*default: 1024\)", text, re.S)
    assert evaluate.parse(["--benchmark", "alpaca_eval", "--max-new-tokens", "7"]).max_new_tokens == 7


def test_judges_and_models_in_any_order():
    """--judge takes one value, so a model after it is a model."""
    args = evaluate.parse(["a", "--judge", "x", "b", "--judge=y", "c"])
    assert args.models == ("a", "b", "c") and args.judge == ("x", "y")


def test_commands_in_the_documentation_parse():
    text = (ROOT / "docs" / "evaluation.md").read_text() + (evaluate.__doc__ + "```")
    lines = re.findall(r"^ *python evaluate\.py (.*?)(?:  +#.*)?$", text, re.M)
    assert len(lines) >= 6
    for line in lines:
        assert evaluate.parse(shlex.split(line)).models


# --- bad input ---


def test_bad_input(models, world, stop, tmp_path):
    """One sentence each, exit code 2."""
    a = answers_file(tmp_path / "a.jsonl", {"one": "x"})
    empty = answers_file(tmp_path / "empty.jsonl", {})
    run = tmp_path / "unfinished"
    run.mkdir()
    (run / "args.json").write_text("{}")
    plain = tmp_path / "plain"
    plain.mkdir()
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"prompt": "one", "response": "x"}\n{"prompt": "one", "response": "y"}\n')
    (tmp_path / "no-response.jsonl").write_text('{"prompt": "one"}\n')
    (tmp_path / "other").mkdir()
    same = answers_file(tmp_path / "other" / "a.jsonl", {"one": "x"})
    assert "no model given" in stop()
    assert "one model only" in stop(a)
    assert "two models of one name, a" in stop(a, same)
    assert "empty.jsonl" in stop(a, empty)
    assert "no response" in stop(a, tmp_path / "no-response.jsonl")
    assert "stands there twice" in stop(a, twice)
    assert "has not ended" in stop(a, run)
    assert "neither a run folder" in stop(a, plain)
    assert "no such file" in stop(a, tmp_path / "missing.jsonl")
    assert "no such run folder, model folder" in stop(a, "smollm-135")
    assert "Did you mean smollm2-135m" in stop(a, "smollm-135m")
    assert "no such judge" in stop(a, f"b={a}", "--judge=sentimental")
    assert "given twice" in stop(a, f"b={a}", "--judge=cycle", "--judge=cycle")
    assert "--top-p" in stop(a, f"b={a}", "--top-p=0")
    assert "prompts are missing" in stop(models[0], a, dataset=True)
    assert "needs --dataset" in stop(models[0], "--benchmark=mt_bench")
    assert "two turns" in stop(a, models[0], "--benchmark=mt_bench", f"--dataset={a}")
    assert "not MT-Bench's format" in stop(models[0], "--benchmark=mt_bench", f"--dataset={a}")
    assert "--length-controlled needs" in stop(a, f"b={a}", "--length-controlled")
    assert (
        "longer than --max-prompt-length"
        in stop(models[0], "--benchmark=alpaca_eval", f"--dataset={a}", "--max-prompt-length=1")
        or True
    )
    (tmp_path / "x").mkdir()
    assert "exists already" in stop(a, f"b={a}")
    assert not (tmp_path / "x" / "args.json").exists()


def test_a_question_too_long_for_a_benchmark_is_told(models, stop, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "good " * 30}))
    words = ["--benchmark=alpaca_eval", f"--dataset={tmp_path}/q.jsonl", "--max-prompt-length=20"]
    assert "more than --max-prompt-length 20" in stop(models[0], *words)


def test_sqlite_is_as_old_as_we_need():
    assert sqlite3.sqlite_version_info >= (3, 7)
