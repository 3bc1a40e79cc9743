"""What a stopped conversion has done, so that the same command goes on from there.

A journal lies beside the unfinished file or folder: its first line says what is made of what, and a line of eight
hexadecimal digits follows for every piece that is written, in the order of writing. A piece that the journal knows is
read again before it is relied on. While the journal is open no other conversion writes to the same place.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rcm_jax.hub import Place, Published, find
from rcm_jax.version import code_version

LINE = 9  # bytes


class Journal:
    """See `tensor_stream.Journal`. goes_on: whether the same was begun before."""

    def __init__(self, file: BinaryIO, of: Mapping[str, Any] | None):
        self._file, first = file, json.dumps(of).encode() + b"\n"
        file.seek(0)
        whole = file.read()
        self.goes_on = of is not None and whole.startswith(first)
        self._end, lines = len(first), whole[len(first) :] if self.goes_on else b""
        self._known = [int(line, 16) for line in re.match(rb"(?:[0-9a-f]{8}\n)*", lines)[0].split()]
        if not self.goes_on:
            file.seek(0)
            file.truncate()
            file.write(first)

    @property
    def knows(self) -> bool:
        return bool(self._known)

    def kept(self, found: Callable[[], int | None]) -> int | None:
        if not self._known or found() != self._known[0]:
            self._known = []
            return None
        self._end += LINE
        return self._known.pop(0)

    def add(self, checksum: int) -> None:
        self._file.seek(self._end)
        self._file.truncate()  # what is known of later pieces is no longer so
        self._file.write(b"%08x\n" % checksum)
        self._end += LINE


@contextlib.contextmanager
def journal_at(path: Path, of: Mapping[str, Any] | None) -> Iterator[Journal]:
    """The journal for what is written to `path`; it goes with the block, however that ends. of: what is made of what;
    None where it cannot be told.

    Raises FileExistsError where another process has it.
    """
    place = path.with_name(path.name + ".tmp.journal")
    with open(place, "a+b", buffering=0) as file:
        _lock(file, place, path)
        try:
            yield Journal(file, of)
        finally:
            with contextlib.suppress(OSError):
                place.unlink()


def _lock(file: BinaryIO, place: Path, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = place.exists() and os.path.samestat(os.fstat(file.fileno()), place.stat())
    except BlockingIOError:
        held = False
    except OSError:
        return  # a file system without locks
    if not held:
        raise FileExistsError(f"another process is writing {path}: wait for it, or give another name")


def made_of(sources: Sequence[str | Place], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a conversion is made of: the files that it reads, with size and time of change, the options, this code."""
    files = [told for source in sources for told in _told(find(source))]
    return {"code": code_version(), "options": {name: str(value) for name, value in options.items()}, "files": files}


def _told(source: Place) -> list[list[Any]]:
    if isinstance(source, Published):
        return [[str(source), source.commit]]
    places = [*source.rglob("*")] if source.is_dir() else [source, *source.parent.glob("*.json")]
    files = sorted({place.resolve() for place in places if place.is_file()})
    return [[os.fspath(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
