"""Metrics of every step to metrics.jsonl, and to TensorBoard and Weights & Biases where wanted; speed to speed.jsonl.

metrics.jsonl is a function of config and seed, so an interrupted run's is that of one that was not. speed.jsonl tells
of the machine: a record for every log interval, none taken back by a resume.
"""

import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from rcm_jax.outputs import unfinished
from rcm_jax.types import Metrics

PATIENCE = 60.0  # seconds, with wandb at the end of a run

Rows = Sequence[tuple[int, dict[str, float]]]  # a step, and numbers by their names


def read_metrics(workdir: str | Path) -> list[dict]:
    """All records of a run, one a step."""
    return read_records(Path(workdir) / "metrics.jsonl")


def read_records(file: Path) -> list[dict]:
    """A record a line; without the last where its writer was killed within it. Raises ValueError for another line that
    is none."""
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    records = []  # what stands behind the last end of a line is torn, or nothing
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{file}, line {number}: {line[:60]!r} is no record; mend or remove the line") from None
    return records


class MetricsWriter:
    """Holds metrics on the device until `flush`, so that logging does not make the host wait for every step.

    Opened for a run that resumes at `start`, it drops the records from there on: they will be made again. TensorBoard
    or wandb failing ends neither run nor records: a warning, and on without. Only process 0 writes; the others may call
    everything alike.
    """

    def __init__(
        self, workdir: Path, start: int, *, tensorboard: bool = False, wandb: str = "", process_index: int = 0
    ):
        self._metrics, self._speed = workdir / "metrics.jsonl", workdir / "speed.jsonl"
        self._writes = process_index == 0
        self._waiting: list[tuple[int, str, Metrics]] = []
        self._sinks: dict[str, Any] = {}
        if not self._writes:
            return
        kept = [r for r in read_records(self._metrics) if r["step"] < start]
        with unfinished(self._metrics) as new:
            new.write_text("".join(json.dumps(r) + "\n" for r in kept))
        if tensorboard:
            self._open("TensorBoard", lambda: _Board(workdir / "tensorboard", start))
        if wandb:
            client = _wandb_client(wandb)
            self._open("wandb", lambda: _Wandb(workdir, wandb, client))

    def _open(self, name: str, sink: Callable[[], Any]) -> None:
        if (opened := _tried(name, sink)) is not None:
            self._sinks[name] = opened

    def add(self, step: int, kind: str, metrics: Metrics) -> None:
        """Metrics of one step; `kind` says which networks it trained."""
        self._waiting.append((step, kind, metrics))

    def flush(self) -> dict:
        """Writes what is waiting; returns the newest record."""
        waiting, self._waiting = jax.device_get(self._waiting), []
        records = [{"step": step, "kind": kind} | {k: v.item() for k, v in m.items()} for step, kind, m in waiting]
        if self._writes and records:
            with self._metrics.open("a") as file:
                file.write("".join(json.dumps(r) + "\n" for r in records))
            self._send(records)
        return records[-1] if records else {}

    def speed(self, record: dict) -> None:
        """A record of `meters.Meters`."""
        if not self._writes:
            return
        try:
            with self._speed.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            warnings.warn(f"{self._speed}: {error.strerror}: the speed is not recorded", stacklevel=2)
        self._send([record], "speed/")

    def summary(self, step: int, summary: Any) -> None:
        """A summary of tensorboardX (a video, a picture) to TensorBoard alone."""
        self._each(lambda sink: sink.summary(step, summary), only="TensorBoard")

    def close(self) -> None:
        self.flush()
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def _send(self, records: Sequence[dict], prefix: str = "") -> None:
        rows = [
            (r["step"], {prefix + k: v for k, v in r.items() if k != "step" and isinstance(v, (int, float))})
            for r in records
        ]
        self._each(lambda sink: sink.scalars(rows))

    def _each(self, call: Callable[[Any], object], only: str = "") -> None:
        for name, sink in list(self._sinks.items()):
            if only in ("", name) and _tried(name, lambda sink=sink: (call(sink), True)) is None:
                del self._sinks[name]


def _tried(name: str, call: Callable[[], Any]) -> Any:
    """What it gives; None, with a warning, where it fails: nothing of these is worth a run."""
    try:
        return call()
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        warnings.warn(f"{name} does not work ({type(error).__name__}: {said}): the run goes on without", stacklevel=3)
        return None


class _Board:
    """Events for TensorBoard, written in the caller's thread: tensorboardX's own writer dies of an error in a thread of
    its own, after which adding to its full queue never returns."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter  # slow to import, and a demo does without
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder.mkdir(parents=True, exist_ok=True)
        # the name has the second in it: what begins again within one must not overwrite
        self._writer = EventsWriter(str(folder / "events"), f".{start}.{os.getpid()}")
        self._write(start, session_log=SessionLog(status=SessionLog.START))  # steps from here on are taken back
        self._writer.flush()

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **what))

    def scalars(self, rows: Rows) -> None:
        for step, numbers in rows:
            for name, value in numbers.items():
                self._write(step, summary=self._scalar(name, value))
        self._writer.flush()

    def summary(self, step: int, summary: Any) -> None:
        self._write(step, summary=summary)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _wandb_client(project: str) -> Any:
    """Raises RuntimeError where the package is missing: that is mended by installing it."""
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError(f"wandb={project!r} needs the extra: pip install 'rcm_jax[wandb]'") from error
    return wandb


class _Wandb:
    def __init__(self, workdir: Path, project: str, client: Any):
        self._run = client.init(project=project, dir=str(workdir), resume="allow", id=workdir.name)

    def scalars(self, rows: Rows) -> None:
        for step, numbers in rows:
            self._run.log(numbers, step=step)

    def close(self) -> None:
        """Sends what is left; where nobody answers, it would try for good."""
        errors: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish()
            except Exception as error:
                errors.append(error)

        sender = threading.Thread(target=finish, daemon=True)
        sender.start()
        sender.join(PATIENCE)
        if sender.is_alive():
            raise TimeoutError(f"the last numbers were not sent within {PATIENCE:g} seconds")
        for error in errors:
            raise error
