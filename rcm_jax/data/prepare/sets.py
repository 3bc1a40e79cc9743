"""A set of files on its way, made by any number of processes and stopped at any time.

OUT/
    shard-000000.tar, …   under their names only when they are whole
    manifest.json         when all are there; written by the process that finds them so
    .making/              the plan that all processes share, and a record of each file: what is there is done

File i holds samples i·n to (i + 1)·n - 1 and is made by process i mod N. Nothing is read of a file that is not whole.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rcm_jax.data.prepare.options import SetOptions
from rcm_jax.data.shard_files import ShardRecord, open_shard, write_shard
from rcm_jax.errors import ArgumentError
from rcm_jax.outputs import check_folder, check_room
from rcm_jax.progress import Progress
from rcm_jax.version import code_version

FORMAT = 1
WORK, PLAN, MANIFEST = ".making", "plan.json", "manifest.json"
LIBRARIES = ("jax", "numpy", "av", "safetensors")  # whose versions the manifest names


def key_of(number: int) -> str:
    """As published: nine digits."""
    return f"{number:09d}"


class LeftOut(NamedTuple):
    """What stands in a sample's place where there is none."""

    name: str
    why: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a set is to be, the same in all processes and runs.

    kind: the command. settings: of the samples. count: of samples. digest: of what they are made of, in order.
    sample_bytes: of one, about, so that a full disk is told before a file is computed; 0 where it is not known."""

    kind: str
    settings: dict[str, Any]
    count: int
    digest: str
    sample_bytes: int = 0

    def as_json(self, per_file: int) -> dict[str, Any]:
        """As plan.json has it."""
        plan = {"kind": self.kind, "settings": self.settings, "samples": self.count, "of": self.digest}
        return json.loads(json.dumps(plan | {"samples_per_shard": per_file}, default=str))


def digest_of(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Form:
    """Of a set's files. whole: the keys of one that is whole, else None; tensors: those of a sample in it."""

    name: str
    write: Callable[[Path, Iterable[Any]], ShardRecord]
    whole: Callable[[Path], tuple[str, ...] | None]
    first: Callable[[Path], dict[str, np.ndarray]]


def _whole_shard(path: Path) -> tuple[str, ...] | None:
    shard = open_shard(path)
    return None if shard.broken else shard.keys


SHARDS = Form("shard-{:06d}.tar", write_shard, _whole_shard, lambda path: open_shard(path).read(0).tensors)


class ShardSet:
    """This process's part of a set. Raises ArgumentError for a folder that holds another set or cannot be written."""

    def __init__(self, options: SetOptions, plan: Plan, form: Form = SHARDS, keys: Sequence[str] | None = None):
        self.out, self.plan, self.form, self._keys = options.out, plan, form, keys
        self.per_file = options.samples_per_shard
        self.files = range(-(-plan.count // self.per_file))
        self._ours = plan.as_json(self.per_file)
        check_folder(self.out, "out")
        self._agree()
        self.missing = [i for i in self.files[options.process :: options.num_processes] if not self._done(i)]

    def numbers(self, file: int) -> range:
        """Of the samples that belong into a file."""
        return range(file * self.per_file, min((file + 1) * self.per_file, self.plan.count))

    @property
    def order(self) -> list[int]:
        """The samples that are to be made, one after the other."""
        return [number for file in self.missing for number in self.numbers(file)]

    def make(self, samples: Callable[[range], Iterable[Any]], what: str = "") -> str:
        """Makes the files that are missing, each of what `samples` gives for its numbers: samples in order, and
        LeftOut in the place of some. Writes the manifest if that makes the set whole. Gives what there is, in words."""
        self._begin()
        with Progress(what or self.plan.kind, total=len(self.order), unit="sample") as progress:
            for file in self.missing:
                self._make(file, samples, progress)
        return self._finish()

    def verify(self) -> None:
        """Reads what this process made once more. Raises ValueError for a file that is not what was written."""
        for file in self.missing:
            path, record = self._path(file), self._record(file)
            if record["samples"] and (self.form.whole(path) is None or _sha256(path) != record["sha256"]):
                raise ValueError(f"{path} is not what was written to it")

    def _make(self, file: int, samples: Callable[[range], Iterable[Any]], progress: Progress) -> None:
        path, left, shapes, dtypes = self._path(file), {}, {}, {}

        def watched() -> Iterator[Any]:
            for sample in samples(self.numbers(file)):
                if isinstance(sample, LeftOut):
                    left[sample.name] = sample.why
                else:
                    _note(sample.tensors, shapes, dtypes, sample.key)
                    yield sample
                progress.update()

        try:
            with _held(self._work(f"{path.name}.lock"), path):
                check_room(path, self.plan.sample_bytes * len(self.numbers(file)))
                found = watched()
                first = next(found, None)
                if first is None:
                    record = ShardRecord(path.name, 0, 0, "")
                else:
                    record = self.form.write(path, itertools.chain([first], found))
                made = dataclasses.asdict(record) | {"shapes": shapes, "dtypes": dtypes, "left_out": left}
                _write_json(self._work(f"{path.name}.json"), made)
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(
                f"{path} cannot be written: {error.strerror}; what is whole stays, and the same command goes on there"
            ) from error

    def _agree(self) -> None:
        """Whether what the folder holds is of this plan."""
        made = sorted(path.name for path in self.out.glob(self.form.name.format(0).replace("000000", "*")))
        file = self._work(PLAN)
        if made and not file.exists():
            raise ArgumentError(f"{{out}} holds {made[0]}, of a set that was not begun here", out=self.out)
        differ = _differences(json.loads(file.read_text()), self._ours) if made else []
        if differ:
            raise ArgumentError(
                f"{{out}} holds a set that was made otherwise: {'; '.join(differ)}. Give another folder, or the same "
                "settings", out=self.out,
            )  # fmt: skip

    def _begin(self) -> None:
        """A plan of which nothing is made yet may be replaced."""
        self._agree()
        self._work(PLAN).parent.mkdir(parents=True, exist_ok=True)
        _write_json(self._work(PLAN), self._ours)

    def _done(self, file: int) -> bool:
        """Whether the file is there and whole; one whose maker died before it could tell is read."""
        path, record = self._path(file), self._record(file)
        if record is not None:
            return not record["samples"] or (path.is_file() and path.stat().st_size == record["bytes"])
        keys = self.form.whole(path) if path.is_file() else None
        wanted = [self._keys[n] if self._keys is not None else key_of(n) for n in self.numbers(file)]
        if not keys or not set(keys) <= set(wanted):
            return False
        shapes, dtypes = {}, {}
        _note(self.form.first(path), shapes, dtypes, path.name)
        left = {key: "it was left out" for key in wanted if key not in keys}
        made = ShardRecord(path.name, len(keys), path.stat().st_size, _sha256(path))
        parts = {"shapes": shapes, "dtypes": dtypes, "left_out": left}
        _write_json(self._work(f"{path.name}.json"), dataclasses.asdict(made) | parts)
        return True

    def _record(self, file: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._work(f"{self._path(file).name}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _finish(self) -> str:
        records = [record for file in self.files if (record := self._record(file)) is not None and self._done(file)]
        if len(records) < len(self.files):
            return f"{self.out}: {len(records)} of {len(self.files)} files are there; the last process sums them up"
        manifest = self._manifest(records)
        _write_json(self.out / MANIFEST, manifest)
        size, left = sum(record["bytes"] for record in records), manifest["left_out"]
        words = f"{self.out}: {manifest['samples']} samples in {len(manifest['shards'])} files, {size / 1e6:.1f} MB"
        return words + (f"; {len(left)} left out, named in {MANIFEST}" if left else "")

    def _manifest(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        shapes, dtypes, left = {}, {}, {}
        for record in records:
            _agree_on(shapes, record["shapes"], record["name"])
            _agree_on(dtypes, record["dtypes"], record["name"])
            left |= record["left_out"]
        fields = [field.name for field in dataclasses.fields(ShardRecord)]
        return {
            "format": FORMAT, "kind": self.plan.kind, "samples": sum(record["samples"] for record in records),
            "shapes": shapes, "dtype": dtypes, "settings": self._ours["settings"],
            "versions": {"rcm_jax": code_version()} | {name: _version(name) for name in LIBRARIES},
            "shards": [{name: record[name] for name in fields} for record in records if record["samples"]],
            "left_out": left,
        }  # fmt: skip

    def _path(self, file: int) -> Path:
        return self.out / self.form.name.format(file)

    def _work(self, name: str) -> Path:
        return self.out / WORK / name


def _note(tensors: dict[str, np.ndarray], shapes: dict[str, list], dtypes: dict[str, str], key: str) -> None:
    _agree_on(shapes, {name: list(tensor.shape) for name, tensor in tensors.items()}, key)
    _agree_on(dtypes, {name: str(tensor.dtype) for name, tensor in tensors.items()}, key)


def _agree_on(known: dict[str, Any], found: dict[str, Any], place: str) -> None:
    """Texts differ in length: the longest one's is kept. Raises ValueError for what differs else."""
    for name, value in found.items():
        before = known.setdefault(name, value)
        if name == "text" and isinstance(value, list) and before[1:] == value[1:]:
            known[name] = max(before, value)
        elif before != value:
            raise ValueError(f"{place}: {name} is {value}, and {before} in what came before")


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    flat = [plan["settings"] | {k: v for k, v in plan.items() if k != "settings"} for plan in (theirs, ours)]
    names = sorted(name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name))
    if names == ["of"]:
        return ["what its samples are made of has changed"]
    return [f"{name} was {flat[0].get(name)} and is {flat[1].get(name)}" for name in names if name != "of"]


def _version(name: str) -> str:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return "unknown"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all, whoever else writes the same."""
    new = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with open(new, "w") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(lock: Path, path: Path) -> Iterator[None]:
    """Keeps two processes from making one file. The system takes the lock back from a process that dies; where there
    are no locks nothing is kept."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RuntimeError(
                    f"another process is making {path}: give each its own number with --process and --num_processes"
                ) from error
        yield
