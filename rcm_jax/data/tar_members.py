"""What lies where in a tar: read from its headers, or from an index beside it, `NAME.tar.index.json`.

A header lies in the 512 bytes before its member's data, so whoever reads a member can read the header with it, and
`check_header` says whether the index spoke true. Of a tar at an address that has no index, what its headers say is kept
in the folder of `compilation.cache_folder`, since they are a request each.
"""

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from typing import NamedTuple

from rcm_jax.compilation import cache_folder
from rcm_jax.data import storage
from rcm_jax.outputs import unfinished

BLOCK = 512
INDEX = ".index.json"
FORMAT = 1
_AHEAD = 4096  # bytes read at once while headers are looked for: they lie far apart


class Member(NamedTuple):
    """offset: of the header; the data begin `BLOCK` bytes later."""

    name: str
    offset: int
    size: int

    @property
    def start(self) -> int:
        return self.offset + BLOCK

    @property
    def stop(self) -> int:
        return self.offset + BLOCK + self.size


class LyingIndexError(ValueError):
    """An index that is not its tar's."""


def index_json(members: Iterable[Member], size: int) -> str:
    return json.dumps({"format": FORMAT, "size": size, "members": [list(member) for member in members]})


def read_index(address: str, size: int) -> list[Member] | None:
    """Of the tar of that size; None where there is none. Raises LyingIndexError where it cannot be that tar's."""
    try:
        text = storage.read(address + INDEX)
    except (FileNotFoundError, PermissionError):  # which of them, some servers do not tell
        return None
    try:
        return _checked(json.loads(bytes(text)), size)
    except (ValueError, KeyError, TypeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise LyingIndexError(f"{address}{INDEX} is not used: {why}") from error


def _checked(index: dict, size: int) -> list[Member]:
    """The members of an index that may be the tar's. Raises ValueError, KeyError or TypeError where it cannot."""
    if index["format"] != FORMAT:
        raise ValueError(f"it is of format {index['format']!r}, and {FORMAT} is known")
    members = [Member(str(name), int(offset), int(length)) for name, offset, length in index["members"]]
    if index["size"] != size:
        raise ValueError(f"it is of a file of {index['size']} bytes, and this one has {size}")
    if any(m.offset < 0 or m.offset % BLOCK or m.size < 0 or m.stop > size for m in members):
        raise ValueError("it names places that the file does not have")
    return members


def check_header(member: Member, header: bytes | memoryview, address: str) -> None:
    """Raises LyingIndexError where these bytes are not the header of that member."""
    try:
        info = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise LyingIndexError(f"{address}: no header at byte {member.offset}, where {member.name} should be") from None
    plain = len(member.name.encode("utf-8", "surrogateescape")) <= 100 and member.name.isascii()
    # a longer name stands in a header of its own, before this one
    if info.size != member.size or (plain and info.name != member.name):
        raise LyingIndexError(
            f"{address}: at byte {member.offset} is {info.name} of {info.size} bytes, and not {member.name} of "
            f"{member.size}"
        )


def scan(address: str, size: int) -> tuple[list[Member], str]:
    """The whole members by their headers, and what is wrong with the tar, "" where nothing is."""
    members: list[Member] = []
    with _File(address, size) if storage.is_remote(address) else open(address, "rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
            for info in tar:
                if info.isreg() and not info.issparse():
                    member = Member(info.name, info.offset_data - BLOCK, info.size)
                    if member.stop > size:
                        return members, f"it ends within {info.name}"
                    members.append(member)
                tar.members.clear()
        except (tarfile.TarError, EOFError, ValueError) as error:
            return members, f"it is cut off or damaged after {_last(members)}: {error}"
    mark = storage.read(address, tar.offset, min(tar.offset + BLOCK, size)) if tar.offset < size else b""
    if len(mark) < BLOCK:
        return members, f"it is cut off after {_last(members)}: the mark of its end is missing"
    if any(mark):
        return members, f"what follows {_last(members)} is no header"
    return members, ""


def scan_once(address: str, size: int) -> tuple[list[Member], str]:
    """`scan`, or what it said of the same file before."""
    folder = cache_folder()
    if folder is None or not storage.is_remote(address):
        return scan(address, size)
    same = hashlib.sha256(f"{address} {storage.version(address)}".encode()).hexdigest()[:32]
    kept = folder.parent / "shards" / f"{same}{INDEX}"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not whole
        index = json.loads(kept.read_text())
        return _checked(index, size), str(index["wrong"])
    members, wrong = scan(address, size)
    with contextlib.suppress(OSError), unfinished(kept) as new:
        new.write_text(json.dumps(json.loads(index_json(members, size)) | {"wrong": wrong}))
    return members, wrong


def _last(members: list[Member]) -> str:
    return members[-1].name if members else "its beginning"


class _File(io.RawIOBase):
    """A file for `tarfile`, which reads a header here and there."""

    def __init__(self, address: str, size: int):
        self._address, self._size = address, size
        self._at, self._begin, self._block = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, into: memoryview) -> int:
        stop = min(self._at + len(into), self._size)
        if stop <= self._at:
            return 0
        if not self._begin <= self._at <= stop <= self._begin + len(self._block):
            self._begin = self._at
            self._block = storage.read(self._address, self._at, min(max(stop, self._at + _AHEAD), self._size))
        part = self._block[self._at - self._begin : stop - self._begin]
        into[: len(part)] = part
        self._at += len(part)
        return len(part)
