"""TensorBoard events, written in step with the run: a full disk shows at once, and no thread outlives the run."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from cleanalign.storage import writing


class Events:
    """One event file in a run folder. Needs the package tensorboard; `open_events` is None without it."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.Event, self.Summary = event_pb2.Event, summary_pb2.Summary
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        with writing(self.path):
            self.file = open(self.path, "wb")  # noqa: SIM115  open while the run goes on
        self.records = RecordWriter(self.file)
        self._write(self.Event(wall_time=time.time(), file_version="brain.Event:2"))
        # What an interrupted part of the run logged at this step and after does not count any more.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self.Event(wall_time=time.time(), step=first_step, session_log=start))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Write a step's scalars."""
        values = [self.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(self.Event(wall_time=time.time(), step=step, summary=self.Summary(value=values)))

    def _write(self, event) -> None:
        with writing(self.path):
            self.records.write(event.SerializeToString())
            self.records.flush()

    def close(self) -> None:
        """Close the file."""
        with writing(self.path):
            self.file.close()


def open_events(folder: Path, first_step: int) -> Events | None:
    """The run's event file, or None without the package tensorboard."""
    try:
        return Events(folder, first_step)
    except ImportError:
        return None
