"""The run folder and everything written to it, from its lock to its summary.

Whatever ends a run, what was trained is lost for at most --save-every steps, nothing is written over, and a
resumed run has the numbers of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from cleanalign import distributed, dry_run
from cleanalign.checkpoint import Checkpoints
from cleanalign.errors import JudgeFailure, UserError, optional_import, require
from cleanalign.events import open_events
from cleanalign.lock import Lock
from cleanalign.phases import Phases, peak_memory
from cleanalign.reporting import device_name, environment, plot_curves, summary_text
from cleanalign.signals import signals
from cleanalign.storage import write_json, write_text, writing


class Run(Phases):
    """The run folder and everything written to it while training; and, as `Phases`, its clock. Of several
    processes the first writes; the others hold the same metrics and write their parts of the checkpoints.

    `create` makes a new folder (an existing one is refused: nothing is ever written over); with `args.resume`
    the folder is continued. Use: `phase(name)` around timed work, `log(step, metrics)` and `keep(step,
    state)` once a step, `finish(summary)` at the end.
    """

    current: Run | None = None  # the one that has its folder's lock, for whoever ends the program

    def __init__(self, script: str, args, steps: int):
        super().__init__()
        self.script, self.args, self.steps = script, args, steps
        if args.resume:
            self.folder = Path(args.resume)
        else:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            self.folder = Path(args.run_dir) / (args.run_name or default_name(script, args) + stamp)
        self.folder = distributed.from_first(self.folder)  # one clock names it
        self.writes = distributed.rank() == 0
        background = args.save_async == "on"
        if args.save_async == "auto":
            background = torch.cuda.is_available() and args.device in ("auto", "cuda")
        self.checkpoints = Checkpoints(self.folder / "checkpoint", args.keep_checkpoints, background)
        self.metrics: list[dict] = []
        self.unsaved: tuple[int, dict] | None = None  # step and state since the last checkpoint
        self.seconds_before = 0.0
        self.started = time.perf_counter()
        self.bar: tqdm | None = None
        self.lock: Lock | None = None
        self.events = self.wandb = None
        self.keeps_decoders: bool | None = None  # from step to step; None until the first has sampled

    def create(self) -> None:
        """Make the folder with args.json, or take an existing one's lock. Call once the arguments, model and
        data are known to be good."""
        if self.writes and self.args.resume:
            self.lock = Lock(self.folder)
        elif self.writes:
            self._make_folder()
        distributed.barrier()
        distributed.attempt(self._see_folder)
        Run.current = self
        print(f"run folder: {self.folder}", flush=True)
        if self.args.max_steps and self.steps < self.args.max_steps:
            print(
                f"--max-steps {self.args.max_steps}: the data are used up after {self.steps} steps, or "
                "another flag ends the run there",
                flush=True,
            )

    def _make_folder(self) -> None:
        """The folder appears by a rename, with args.json in it and its lock held."""
        folder = self.folder
        exists = f"{folder} exists already. Choose another --run-name, or continue it with --resume {folder}."
        require(not self.folder.exists(), exists)
        with writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=".starting-"))
            try:
                new.chmod(0o777 & ~umask())
                self.lock = Lock(new)
                origin = {"script": self.script, "args": dataclasses.asdict(self.args), **environment()}
                write_json(new / "args.json", origin, indent=2)
                try:
                    new.rename(self.folder)
                except OSError:
                    require(not self.folder.exists(), exists)  # another process was first
                    raise
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise

    def _see_folder(self) -> None:
        require(
            (self.folder / "args.json").exists(),
            f"{self.folder} cannot be seen. --run-dir must lie on a file system that all processes share.",
        )

    def _open_logs(self) -> None:
        if not self.writes:
            return
        self.events = open_events(self.folder, len(self.metrics) + 1)
        if self.args.track:
            wandb = optional_import("wandb", "'cleanalign[track]'")
            self.wandb = wandb.init(
                project="cleanalign",
                name=self.folder.name,
                config=dataclasses.asdict(self.args),
                dir=str(self.folder),
            )

    def close(self) -> None:
        """Give the folder up: the last checkpoint is written
        to its end, logs are closed, the lock is free."""
        Run.current = None
        try:
            self.checkpoints.wait()
        finally:
            if self.bar:
                self.bar.close()
            if self.lock:
                self.lock.release()

    # --- while training ---

    @contextlib.contextmanager
    def phase(self, name: str):
        """`Phases.phase`. While the phase "training" changes
        the weights, and until `keep`, a signal waits."""
        if name == "training":
            signals.busy, self.unsaved = True, None
        with super().phase(name):
            yield

    def fewer_steps(self, by: int) -> None:
        """Shorten the run's planned steps, for the progress bar's time left."""
        self.steps -= by
        if self.bar:
            self.bar.total = self.steps
            self.bar.refresh()

    def log(self, step: int, metrics: dict[str, float], show: tuple[str, ...] = ()) -> None:
        """Write one step's metrics everywhere; `show` names those beside the progress bar."""
        row = {"step": step, **metrics}
        padding = distributed.total(self.padding)
        if padding:
            row["padding_fraction"] = 1 - padding["tokens"] / padding["places"]
            self.padding.clear()
        self.metrics.append(row)
        if not self.writes:
            return
        file = self.folder / "metrics.jsonl"
        with writing(file), open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        if self.events:
            self.events.add(step, {k: v for k, v in row.items() if isinstance(v, (int, float))})
        if self.wandb:
            self.wandb.log(row, step=step)
        if self.bar is None:
            self.bar = tqdm(total=self.steps, initial=step - 1, desc=self.script, unit="step")
        self.bar.update(1)
        self.bar.set_postfix({k: f"{row[k]:.3g}" for k in show if k in row})

    def stop_unless_finite(self, step: int, loss: float, row_ids: list[str]) -> None:
        """A NaN or infinite loss ends the run, naming step and rows, before it can reach the weights."""
        if math.isfinite(loss):
            return
        where = "No checkpoint had been written yet"
        if found := self.checkpoints.found():
            where = f"The checkpoint before it is kept: {found[-1][1]}"
        raise UserError(
            f"step {step}: the loss is {loss}. Rows of this batch: {', '.join(row_ids)}. {where}. Lower the "
            "learning rate, or look at these rows."
        )

    # --- checkpoint ---

    def keep(self, step: int, state: dict) -> None:
        """Once a step, when it is logged: `state` is what a resumed run needs to go on from here.

        It is written every --save-every steps (not after the last: the weights are saved then), and when a
        signal asks the run to end, which it then does. Otherwise it is remembered until the next step trains,
        so that a judge that fails meanwhile costs nothing.
        """
        self.unsaved = (step, state)
        every = self.args.save_every
        due = every and step % every == 0 and step < self.steps
        if due or signals.asked is not None:
            self.save_unsaved()
        signals.busy = False
        signals.check()

    def save(self, state: dict) -> None:
        """Write a checkpoint now. Raises `UserError` when the disk refuses; the ones before it stay."""
        busy, signals.busy = signals.busy, True
        rows = "".join(json.dumps(row) + "\n" for row in self.metrics)
        with self.phase("saving"):
            self.checkpoints.save(len(self.metrics), {**state, "seconds": self.seconds()}, rows)
        self.unsaved = None
        signals.busy = busy

    def save_unsaved(self) -> None:
        """Write what `keep` remembers, if the last checkpoint is older."""
        if self.unsaved is not None:
            self.save(self.unsaved[1])

    def save_before_the_end(self, error: BaseException) -> str:
        """What can still be saved when `error` ends the program: the state that `keep` remembers, if the
        weights have not changed since. Returns a sentence that says where the run stands, or nothing."""
        ended_between_steps = isinstance(error, JudgeFailure) or not isinstance(error, Exception)
        if ended_between_steps:
            self.save_unsaved()
        self.checkpoints.wait()
        if ended_between_steps:  # so did the others: none may end them while they write
            distributed.barrier()
        found = self.checkpoints.found()
        if not found:
            return f"No checkpoint had been written: --resume {self.folder} starts from the first step."
        step = found[-1][1].name.partition("-step-")[2]
        return f"The last checkpoint is that of step {step}: continue with --resume {self.folder}."

    def restore(self) -> dict | None:
        """The last whole checkpoint's state when resuming,
        else None; metrics.jsonl is cut back to its step."""
        if not self.args.resume:
            self._open_logs()
            return None
        require(
            not (self.folder / "summary.json").exists(),
            f"--resume {self.folder}: this run is finished; see its summary.json.",
        )
        kept = self.checkpoints.load()
        log = self.folder / "metrics.jsonl"
        if kept is None:  # stopped before its first checkpoint: the same run from the beginning
            print(f"{self.folder}: no checkpoint yet, so the run starts from its first step", flush=True)
            if self.writes:
                with writing(log):
                    log.unlink(missing_ok=True)
            self._open_logs()
            return None
        state, rows = kept
        began = json.loads((self.folder / "args.json").read_text()).get("device_name")
        here = device_name()
        if began not in (None, here):
            print(
                f"the run began on {began} and goes on on {here}: its last digits may differ from those of a "
                "run without a stop",
                flush=True,
            )
        self.metrics = [json.loads(line) for line in rows.splitlines()]
        if self.writes:
            write_text(log, rows)
        self.seconds_before = state["seconds"]
        self._open_logs()
        return state

    # --- the end ---

    def seconds(self) -> float:
        """Wall-clock seconds of this run, resumed parts included."""
        return self.seconds_before + time.perf_counter() - self.started

    def finish(self, summary: dict, curves: tuple[str, ...], text: Callable = summary_text) -> None:
        """Write curves.png and summary.json, close the logs and print the result, as text(summary, folder)
        has it."""
        if self.bar:
            self.bar.close()
        peaks, rates = distributed.gather(max(self.peak_memory_bytes, peak_memory())), self.throughput()
        if not self.writes:
            return
        summary = {
            **summary,
            "steps": len(self.metrics),
            "seconds": round(self.seconds(), 1),
            "peak_memory_bytes": max(peaks),
        }
        if distributed.world() > 1:
            summary["processes"] = distributed.world()
            summary["bytes_sent_by_first_process"] = dict(distributed.sent)
        for name, value in rates.items():
            summary[name] = round(value, 1)
        summary["phase_seconds"] = {name: round(phase["seconds"], 1) for name, phase in self.phases.items()}
        summary["phase_peak_memory_bytes"] = {
            name: phase["peak_memory_bytes"] for name, phase in self.phases.items()
        }
        with writing(self.folder / "curves.png"):
            plot_curves(self.metrics, curves, self.folder / "curves.png", self.folder.name)
        if self.events:
            rates = {f"eval/{name}": summary.get(name) for name in ("win_rate", "eval_judge_win_rate")}
            self.events.add(len(self.metrics), {k: v for k, v in rates.items() if v is not None})
            self.events.close()
        write_json(
            self.folder / "summary.json", summary, indent=2
        )  # last: its presence says that all is done
        if self.wandb:
            self.wandb.summary.update(summary)
            self.wandb.finish()
        print(text(summary, self.folder))

    def finish_dry_run(self, policy) -> None:
        """End a `--dry-run` after its step: write dry_run.json and print what each phase took. Nothing is
        evaluated or saved."""
        if self.bar:
            self.bar.close()
        if self.events:
            self.events.close()
        if self.writes:
            dry_run.write(dry_run.report(self.args, policy, self.phases, environment()), self.folder)


def kept(file: Path, make: Callable):
    """make()'s value, from now on kept in `file` as JSON: it is made once."""
    first = distributed.rank() == 0
    text = distributed.from_first(file.read_text() if first and file.exists() else None)
    if text is None:
        value = make()
        text = json.dumps(value)
        if first:
            write_json(file, value)
    return json.loads(text)


def default_name(script: str, args) -> str:
    """What the names of runs without a --run-name begin with; the time they started at follows."""
    model = re.sub(r"[^\w.-]+", "-", Path(args.model).name)
    return f"{script}-{model}-seed{args.seed}-"


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
