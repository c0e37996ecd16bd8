"""Broken and hostile inputs for `survive.py fuzz`: made by hypothesis, given to a whole run in a process of its own.

Kinds: JSONL rows (bytes and odd values), parquet (odd columns and flipped bytes), a run folder's args.json, metrics.jsonl
and checkpoint files, a model folder's config, weights, tokenizer and chat template.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import hypothesis
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st
from tqdm import tqdm

LIMIT = 60.0  # seconds

WORDS = st.sampled_from("good bad fine the a cat dog sun moon </s> <s> : user assistant".split())
TEXT = st.one_of(st.text(max_size=30), st.lists(WORDS, max_size=8).map(" ".join))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(VALUE, st.sampled_from(["user", "assistant", "system"])),
        "content": st.one_of(TEXT, VALUE),
    },
)
FIELD = st.one_of(TEXT, VALUE, st.lists(MESSAGE, max_size=4))
ROW = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("prompt", "chosen", "rejected", "response", "completion"), FIELD)
)
READABLE = st.fixed_dictionaries({"prompt": st.one_of(TEXT, st.lists(MESSAGE, min_size=1, max_size=3))})
GOOD_ROWS = [json.dumps({"prompt": f"good cat number {i}"}) for i in range(20)]
TEMPLATES = st.sampled_from(
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{{ i }}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch /tmp/cleanalign-owned') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0]['content'] * 10 ** 9 }}",
        "{{ nothing.here }}",
        "{% for m in messages %}{{ m['content'] }}",
        "",
        "{{ raise_exception('no') }}",
    ]
)
CONFIG_CHANGES = st.dictionaries(
    st.sampled_from(
        "hidden_size num_hidden_layers vocab_size model_type architectures auto_map num_attention_heads head_dim torch_dtype "
        "rope_scaling rope_parameters quantization_config tie_word_embeddings eos_token_id max_position_embeddings".split()
    ),
    st.one_of(
        VALUE,
        st.sampled_from(
            [{"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "gpt2", 0, -1, 3]
        ),
    ),
    min_size=1,
    max_size=2,
)
DAMAGE = st.tuples(
    st.floats(0, 1),
    st.binary(min_size=1, max_size=12),
    st.sampled_from(["overwrite", "cut", "insert", "replace"]),
)


def damage(file: Path, change: tuple[float, bytes, str]) -> None:
    """Change a file's bytes at a relative place."""
    where, data, how = change
    whole = file.read_bytes()
    at = int(where * len(whole))
    changed = {
        "overwrite": whole[:at] + data + whole[at + len(data) :],
        "cut": whole[:at],
        "insert": whole[:at] + data + whole[at:],
        "replace": data,
    }
    file.write_bytes(changed[how])


# --- kinds of input: each makes a folder of its own and returns the flags that read it ---


def jsonl(folder: Path, draw) -> list[str]:
    """Rows as JSON, odd ones among good ones, or plain bytes."""
    file = folder / "rows.jsonl"
    if draw(st.integers(0, 3)) == 0:
        file.write_bytes(draw(st.binary(max_size=200)))
    else:
        rows = draw(st.lists(st.one_of(ROW, READABLE), min_size=1, max_size=4))
        odd = [json.dumps(row) for row in rows]
        good = GOOD_ROWS if draw(st.booleans()) else []
        file.write_text("\n".join([*odd, *good]) + "\n")
    return [f"--dataset={file}"]


def parquet(folder: Path, draw) -> list[str]:
    """A table with odd columns, or a good one with changed bytes."""
    file = folder / "rows.parquet"
    columns = {"prompt": [json.loads(row)["prompt"] for row in GOOD_ROWS]}
    if draw(st.booleans()):
        kinds = [[1] * 20, [None] * 20, [[{"role": "user", "content": "a"}]] * 20, [b"\xff"] * 20, [1.5] * 20]
        columns[draw(st.sampled_from(["prompt", "chosen", "x"]))] = draw(st.sampled_from(kinds))
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    if draw(st.booleans()):
        damage(file, draw(DAMAGE))
    return [f"--dataset={file}"]


def arguments(folder: Path, draw) -> list[str]:
    """A stopped run with another args.json."""
    run = a_stopped_run(folder)
    file = run / "args.json"
    if draw(st.booleans()):
        damage(file, draw(DAMAGE))
    else:
        saved = json.loads(file.read_text())
        names = sorted(saved["args"])
        for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
            saved["args"][name] = draw(VALUE)
        file.write_text(json.dumps(saved))
    return [f"--resume={run}"]


def logs(folder: Path, draw) -> list[str]:
    """A stopped run with another metrics.jsonl, beside or inside its checkpoints."""
    run = a_stopped_run(folder)
    files = [run / "metrics.jsonl", *run.glob("checkpoint/*/metrics.jsonl")]
    damage(draw(st.sampled_from(files)), draw(DAMAGE))
    return [f"--resume={run}"]


def states(folder: Path, draw) -> list[str]:
    """A stopped run with damaged checkpoints: one file or several of them, pickles that would run code among them."""
    run = a_stopped_run(folder)
    files = sorted(file for file in run.glob("checkpoint/*/*") if file.is_file())
    for file in draw(st.lists(st.sampled_from(files), min_size=1, max_size=4, unique=True)):
        if draw(st.integers(0, 4)) == 0:
            file.write_bytes(b"cos\nsystem\n(S'touch /tmp/cleanalign-owned'\ntR.")
        else:
            damage(file, draw(DAMAGE))
    return [f"--resume={run}"]


def models(folder: Path, draw) -> list[str]:
    """A model folder with a changed config, weights, tokenizer or template."""
    model = folder / "model"
    shutil.copytree("model", model)
    kind = draw(st.sampled_from(["config", "template", "bytes", "code"]))
    if kind == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **draw(CONFIG_CHANGES)}))
    elif kind == "template":
        (model / "chat_template.jinja").write_text(draw(TEMPLATES))
    elif kind == "bytes":
        damage(draw(st.sampled_from(sorted(model.iterdir()))), draw(DAMAGE))
    else:
        (model / "evil.py").write_text("open('/tmp/cleanalign-owned', 'w')\n")
        config = json.loads((model / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        config["model_type"] = draw(st.sampled_from(["llama", "evil"]))
        (model / "config.json").write_text(json.dumps(config))
    return [f"--model={model}"]


KINDS = (jsonl, parquet, arguments, logs, states, models)


def a_stopped_run(folder: Path) -> Path:
    """A copy of the stopped run that the world holds."""
    shutil.copytree("stopped", folder / "stopped")
    saved = json.loads((folder / "stopped" / "args.json").read_text())
    (folder / "stopped" / "args.json").write_text(json.dumps(saved))
    return folder / "stopped"


def fingerprint(*roots: Path) -> dict[str, str]:
    """SHA-256 of every file under some folders."""
    files = (file for root in roots for file in root.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def fuzz(world: Path, count: int, launch, common: list[str], script) -> dict:
    """`count` inputs, each given to a short run. See `survive.fuzz`."""
    here = Path.cwd()
    os.chdir(world)
    owned = Path("/tmp/cleanalign-owned")
    owned.unlink(missing_ok=True)
    short = [
        *common,
        "--num-prompts=8",
        "--max-steps=2",
        "--batch-size=4",
        "--eval-prompts=2",
        "--save-every=1",
    ]
    stopping = launch(
        world, script, [*short, "--num-prompts=64", "--max-steps=8", "--run-dir=.", "--run-name=stopped"]
    )
    while len(list(world.glob("stopped/checkpoint/*-step-*"))) < 2 or not list(
        world.glob("stopped/checkpoint/*-step-4")
    ):
        assert stopping.text().count("Traceback") == 0, stopping.text()
    os.kill(stopping.pid, 9)
    os.waitpid(stopping.pid, 0)
    shutil.rmtree(world / "stopped/checkpoint/.new", ignore_errors=True)

    wrong, ended, slowest = [], Counter(), 0.0
    bar = tqdm(total=count, desc="fuzz")
    number = 0

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.sampled_from(KINDS), st.data())
    def one(kind, data):
        nonlocal number, slowest
        number += 1
        bar.update(1)
        folder = world / "input"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(world / "runs", ignore_errors=True)
        folder.mkdir()
        flags = kind(folder, data.draw)
        resumed = any(flag.startswith("--resume") for flag in flags)
        before = fingerprint(world / "model", world / "stopped", *([] if resumed else [folder]))
        command = flags if resumed else [*short, *flags, "--run-dir=runs", "--run-name=x"]
        child = launch(world, script, command)
        code, text = child.wait(LIMIT), child.text()
        child.output.unlink()
        slowest = max(slowest, time.perf_counter() - child.started)
        ended[f"{kind.__name__}: {code}"] += 1
        problems = []
        if code not in (0, 2):
            problems.append("a hang" if code is None else f"exit code {code}")
        if "Traceback" in text:
            problems.append("a traceback")
        if fingerprint(world / "model", world / "stopped", *([] if resumed else [folder])) != before:
            problems.append("a file changed that is not the run's")
        if owned.exists():
            problems.append("foreign code ran")
            owned.unlink()
        if problems:
            wrong.append(f"{kind.__name__} {number}: {', '.join(problems)}: {text[-900:]}")

    try:
        one()
    finally:
        os.chdir(here)
    bar.close()
    told = Counter(
        problem
        for text in wrong
        for problem in ("traceback", "hang", "file changed", "foreign code")
        if problem in text
    )
    return {
        "inputs": number,
        "tracebacks": told["traceback"],
        "hangs": told["hang"],
        "foreign_files_changed": told["file changed"],
        "foreign_code_ran": told["foreign code"],
        "ended": dict(sorted(ended.items())),
        "slowest_seconds": round(slowest, 1),
        "wrong": wrong,
    }
