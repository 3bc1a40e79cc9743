"""The folder that a run lives in: one config's, and one job's at a time.

workdir/
    config.json          the run's config
    lock                 held by the job that trains here; says which one that is
    metrics.jsonl        a record a step; speed.jsonl: how fast it went; tensorboard/
    checkpoints/STEP/    the state before step STEP (`checkpoint.py`)
    set_aside/           checkpoints that a resumption from an older one left behind
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rcm_jax.outputs import unfinished
from rcm_jax.training.config import RunConfig


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    out = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def as_json(config: RunConfig) -> dict:
    """The config as config.json holds it."""
    return json.loads(json.dumps(config.to_dict()))


def differences(theirs: dict, ours: dict, one: str, other: str) -> list[str]:
    """Settings that two configs do not share, a line each; those of cadence may differ."""
    theirs, ours = _flat(theirs), _flat(ours)
    return [
        f"{key}: {theirs.get(key, 'absent')} {one}, {ours.get(key, 'absent')} {other}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in RunConfig.CADENCE
    ]


def _completed(saved: dict) -> dict:
    """A config of an older version with the settings that it did not know yet, at which its run was computed: their
    defaults. As it is, where this version cannot read it."""
    try:
        return as_json(RunConfig.from_dict(saved))
    except (TypeError, ValueError):
        return saved


@contextlib.contextmanager
def open_workdir(path: str | Path, config: RunConfig) -> Iterator[Path]:
    """The workdir, made or found to be this config's, and held for this job until the block ends.

    Raises ValueError listing the differing settings where it holds another config's run; RuntimeError that names the
    job which trains in it; and OSError with the path where it cannot be written. What was there stays as it was.
    """
    workdir = Path(path).absolute()
    file = workdir / "config.json"
    if file.exists():
        differ = differences(_completed(json.loads(file.read_text())), as_json(config), "in the workdir", "now")
        if differ:
            raise ValueError(
                f"{workdir} holds a run of another config; use a new workdir, or make these equal:\n  "
                + "\n  ".join(differ)
            )
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_held(workdir / "lock"))
            with unfinished(file) as new:
                new.write_text(json.dumps(as_json(config), indent=1))
        except OSError as error:
            raise OSError(f"cannot write to the workdir {workdir}: {error.strerror}") from error
        yield workdir


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """A lock that the system takes back from a process that dies, whatever kills it; all names of a folder share it."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                warnings.warn(
                    f"{path.parent} is on a file system without locks ({error.strerror}): nothing keeps a second job "
                    "from training in it", stacklevel=2,
                )  # fmt: skip
            else:
                raise RuntimeError(f"{path.parent} is in use: {_holder(file)} trains in it") from error
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": now}, file)
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        held = json.load(file)
        return f"process {held['process']} on {held['host']}, since {held['since']},"
    except (ValueError, KeyError):
        return "another job, which has not said its name yet,"
