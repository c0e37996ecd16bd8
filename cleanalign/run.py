"""The run folder and everything written to it; checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from cleanalign import dry_run
from cleanalign.errors import UserError, optional_import, require
from cleanalign.phases import SMALL_MICRO_BATCH, Phases, peak_memory
from cleanalign.reporting import environment, plot_curves, summary_text


class Run(Phases):
    """The run folder and everything written to it while training; and, as `Phases`, its clock.

    `create` makes a new folder (an existing one is refused: nothing is ever written over); with `args.resume`
    the folder is continued. Use: `log(step, metrics)` once a step, `phase(name)` around timed work,
    `save`/`restore` for checkpoints, `finish(summary)` at the end.
    """

    def __init__(self, script: str, args, steps: int):
        super().__init__(lean=args.micro_batch_tokens <= SMALL_MICRO_BATCH)
        self.script, self.args, self.steps = script, args, steps
        if args.resume:
            self.folder = Path(args.resume)
        else:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            model = re.sub(r"[^\w.-]+", "-", Path(args.model).name)
            self.folder = Path(args.run_dir) / (args.run_name or f"{script}-{model}-seed{args.seed}-{stamp}")
        self.metrics: list[dict] = []
        self.seconds_before = 0.0
        self.started = time.perf_counter()
        self.bar: tqdm | None = None
        self.writer = self.wandb = None

    def create(self) -> None:
        """Make the folder and write args.json. Call once the arguments, model and data are known to be
        good."""
        if not self.args.resume:
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError:
                raise UserError(
                    f"{self.folder} exists already. Choose another --run-name, or continue it with --resume "
                    f"{self.folder}."
                ) from None
            except OSError as error:
                raise UserError(f"--run-dir {self.args.run_dir}: cannot be written: {error}") from error
            text = json.dumps(
                {"script": self.script, "args": dataclasses.asdict(self.args), **environment()}, indent=2
            )
            (self.folder / "args.json").write_text(text + "\n")
        print(f"run folder: {self.folder}", flush=True)
        if self.args.max_steps and self.steps < self.args.max_steps:
            print(
                f"--max-steps {self.args.max_steps}: the data are used up after {self.steps} steps, or "
                "another flag ends the run there",
                flush=True,
            )
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder))
        if self.args.track:
            wandb = optional_import("wandb", "'cleanalign[track]'")
            self.wandb = wandb.init(
                project="cleanalign",
                name=self.folder.name,
                config=dataclasses.asdict(self.args),
                dir=str(self.folder),
            )

    def fewer_steps(self, by: int) -> None:
        """Shorten the run's planned steps, for the progress bar's time left."""
        self.steps -= by
        if self.bar:
            self.bar.total = self.steps
            self.bar.refresh()

    def log(self, step: int, metrics: dict[str, float], show: tuple[str, ...] = ()) -> None:
        """Write one step's metrics everywhere; `show` names those beside the progress bar."""
        row = {
            "step": step,
            **{k: (v.item() if isinstance(v, torch.Tensor) else v) for k, v in metrics.items()},
        }
        if self.padding:
            row["padding_fraction"] = 1 - self.padding["tokens"] / self.padding["places"]
            self.padding.clear()
        self.metrics.append(row)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if self.writer and isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(row, step=step)
        if self.bar is None:
            self.bar = tqdm(total=self.steps, initial=step - 1, desc=self.script, unit="step")
        self.bar.update(1)
        self.bar.set_postfix({k: f"{row[k]:.3g}" for k in show if k in row})

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`: every --save-every steps, but not after the last."""
        every = self.args.save_every
        return bool(every) and step % every == 0 and step < self.steps

    def stop_unless_finite(self, step: int, loss: float, row_ids: list[str]) -> None:
        """A NaN or infinite loss ends the run, naming step and rows, before it can reach the weights."""
        if not math.isfinite(loss):
            kept = self.folder / "checkpoint"
            where = (
                f"The checkpoint before it is kept: {kept}"
                if kept.exists()
                else "No checkpoint had been written yet"
            )
            raise UserError(
                f"step {step}: the loss is {loss}. Rows of this batch: {', '.join(row_ids)}. {where}. Lower "
                "the learning rate, or look at these rows."
            )

    # --- checkpoint ---

    def save(self, state: dict) -> None:
        """Write checkpoint/ atomically: the old one stays whole until the new one is complete."""
        state = {**state, "metrics": len(self.metrics), "seconds": self.seconds()}
        new, old, current = (
            self.folder / name for name in ("checkpoint.new", "checkpoint.old", "checkpoint")
        )
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        try:
            with open(new / "state.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            shutil.rmtree(new, ignore_errors=True)
            raise UserError(
                f"{new}: the checkpoint could not be written ({error}). The one before it is kept."
            ) from error
        if current.exists():
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)

    def restore(self) -> dict | None:
        """The last checkpoint's state when resuming, else None; metrics.jsonl is cut back to its step."""
        if not self.args.resume:
            return None
        require(
            not (self.folder / "summary.json").exists(),
            f"--resume {self.folder}: this run is finished; see its summary.json.",
        )
        file = next(
            (
                f
                for f in (self.folder / "checkpoint/state.pt", self.folder / "checkpoint.old/state.pt")
                if f.exists()
            ),
            None,
        )
        log = self.folder / "metrics.jsonl"
        if file is None:  # stopped before its first checkpoint: the same run from the beginning
            print(f"{self.folder}: no checkpoint yet, so the run starts from its first step", flush=True)
            log.unlink(missing_ok=True)
            return None
        state = torch.load(file, map_location="cpu", weights_only=True)
        lines = log.read_text().splitlines()[: state["metrics"]] if log.exists() else []
        self.metrics = [json.loads(line) for line in lines]
        temporary = log.with_suffix(".new")
        temporary.write_text("".join(line + "\n" for line in lines))
        temporary.replace(log)
        self.seconds_before = state["seconds"]
        return state

    # --- the end ---

    def seconds(self) -> float:
        """Wall-clock seconds of this run, resumed parts included."""
        return self.seconds_before + time.perf_counter() - self.started

    def finish(self, summary: dict, curves: tuple[str, ...], text: Callable = summary_text) -> None:
        """Write summary.json and curves.png, close the logs and print the result, as text(summary, folder)
        has it."""
        if self.bar:
            self.bar.close()
        summary = {
            **summary,
            "steps": len(self.metrics),
            "seconds": round(self.seconds(), 1),
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory()),
        }
        for name, value in self.throughput().items():
            summary[name] = round(value, 1)
        summary["phase_seconds"] = {name: round(phase["seconds"], 1) for name, phase in self.phases.items()}
        summary["phase_peak_memory_bytes"] = {
            name: phase["peak_memory_bytes"] for name, phase in self.phases.items()
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot_curves(self.metrics, curves, self.folder / "curves.png", self.folder.name)
        for name in ("win_rate", "eval_judge_win_rate"):
            if self.writer and summary.get(name) is not None:
                self.writer.add_scalar(f"eval/{name}", summary[name], len(self.metrics))
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.summary.update(summary)
            self.wandb.finish()
        print(text(summary, self.folder))

    def finish_dry_run(self, policy) -> None:
        """End a `--dry-run` after its step: write dry_run.json and print what each phase took. Nothing is
        evaluated or saved."""
        if self.bar:
            self.bar.close()
        if self.writer:
            self.writer.close()
        dry_run.write(dry_run.report(self.args, policy, self.phases, environment()), self.folder)


def keep(file: Path, value) -> None:
    """Write `value` as JSON; the file appears whole or not at all."""
    file.parent.mkdir(exist_ok=True)
    file.with_suffix(".new").write_text(json.dumps(value))
    file.with_suffix(".new").replace(file)
