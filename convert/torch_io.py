"""PyTorch's `.pt` and `.pth` files, without PyTorch and without running what is in them.

The pickle in them is read by `torch_pickle`. Storages stay in the file until they are looked at. Both formats are read:
a zip of storages (since PyTorch 1.6), and the older sequence of pickles.
"""

import bisect
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rcm_jax.convert.safetensors_io import mapped
from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.torch_pickle import DTYPES, STORAGES, Reader, Refused, Storage

# what zipfile and pickle raise over damaged bytes
DAMAGE = (
    zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError,
    ValueError, struct.error, ArithmeticError, MemoryError, RuntimeError,
)  # fmt: skip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


class _InFile:
    """Where a saved thing lies: a file, whose numbers are mapped when they are looked at."""

    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> BinaryIO:
        return open(self.path, "rb")

    def numbers(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        return mapped(self.path, offset, count, dtype)


class _Asked(_InFile):
    """Tells where numbers lie, and reads none."""

    def numbers(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        self.asked = offset
        return np.broadcast_to(np.zeros((), dtype), (count,))


class _InMemory:
    """The same of bytes that are there already; the numbers are a view of them."""

    def __init__(self, data: memoryview, name: str):
        self.data, self.name, self.size = data.cast("B").toreadonly(), name, data.nbytes

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Bytes(self.data))

    def numbers(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        return np.frombuffer(self.data, dtype, count, offset)


class _Bytes(io.RawIOBase):
    """A file of bytes that are not copied, as `io.BytesIO` would."""

    def __init__(self, data: memoryview):
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if at < 0:
            raise OSError(f"there is no byte {at}")  # as files have it
        self._at = at
        return at

    def readinto(self, into: memoryview) -> int:
        part = self._data[self._at : self._at + len(into)]
        into[: len(part)] = part
        self._at += len(part)
        return len(part)


_Place = _InFile | _InMemory


def damaged_entries(path: Path, advance: Callable[[int], object]) -> tuple[int, list[str]]:
    """How many tensors a zip of PyTorch's has, and those whose bytes do not have the CRC-32 that the zip has of them,
    by their keys. Reads all. Raises as `read_torch`."""
    place = _Asked(path)
    tensors = dict(_leaves(_read(place)))
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda info: info.header_offset)
        wrong = {info.header_offset for info in entries if not _whole(archive, info, advance)}
    starts, damaged = [info.header_offset for info in entries], []
    for name, tensor in tensors.items():
        if tensor.size:
            tensor.load()
            damaged += [name] if starts[bisect.bisect(starts, place.asked) - 1] in wrong else []
    others = [info.filename for info in entries if info.header_offset in wrong and not damaged]
    return len(tensors), damaged or others


def _whole(archive: zipfile.ZipFile, info: zipfile.ZipInfo, advance: Callable[[int], object]) -> bool:
    try:
        with archive.open(info) as entry:
            while part := entry.read(1 << 22):
                advance(len(part))
    except DAMAGE:
        return False
    return True


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))


def read_torch(path: Path) -> Any:
    """What was saved: nested dictionaries with `Tensor`s at the leaves, named by their keys.

    Raises Refused (a ValueError) for pickles that want to run code, and ValueError for files that are not whole.
    """
    return _read(_InFile(path))


def read_torch_bytes(data: bytes | bytearray | memoryview, name: str) -> Any:
    """`read_torch` of a file's bytes, called `name` in messages: tensors are views of them."""
    return _read(_InMemory(memoryview(data), name))


def _read(place: _Place) -> Any:
    with place.open() as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        return _read_zip(place) if is_zip else _read_legacy(place)
    except Refused:
        raise
    except (*DAMAGE, OSError) as error:
        raise ValueError(f"{place} is not a whole PyTorch file: {error or type(error).__name__}") from error


def _read_zip(place: _Place) -> Any:
    with place.open() as file, place.open() as raw, zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        programs = [name for name in entries if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"it is a zip with {len(programs)} entries data.pkl, and a PyTorch file has one")
        root = programs[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")

        def locate(key: str, storage: Storage) -> None:
            info = entries[f"{root}data/{key}"]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < storage.count * storage.dtype.itemsize:
                raise ValueError(f"storage {key} is compressed or too short")
            raw.seek(info.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", raw.read(4))
            storage.offset = info.header_offset + 30 + name_length + extra_length

        with archive.open(programs[0]) as program:
            return Reader(program, place, locate).load()


def _read_legacy(place: _Place) -> Any:
    with place.open() as file:

        def load() -> tuple[Any, dict[str, Storage]]:
            reader = Reader(file, place, lambda key, storage: None)
            return reader.load(), reader.storages

        if load()[0] != LEGACY_MAGIC or load()[0] != LEGACY_PROTOCOL or not load()[0].get("little_endian"):
            raise ValueError("it begins neither as a zip nor as PyTorch's older format")
        saved, storages = load()
        keys, _ = load()
        for key in keys:
            start = file.tell()
            count = int.from_bytes(file.read(8), "little")
            storage = storages[key]
            storage.offset = start + 8
            end = start + 8 + count * storage.dtype.itemsize
            if count != storage.count or end > place.size:
                raise ValueError(f"storage {key} is cut off")
            file.seek(end)
        if set(keys) != set(storages):
            raise ValueError("storages are missing")
        return saved


def write_torch(path: Path, tensors: Mapping[str, Tensor], advance: Callable[[int], object]) -> None:
    """A state dict as `torch.save` lays it out, streamed; `torch.load` reads it with weights_only.

    The pickle is composed of its opcodes: an OrderedDict whose values are calls of `_rebuild_tensor_v2`, or of v3 for
    numbers that have no storage of their own, as float8.
    """
    untyped = {np.dtype(dtype): name for name, dtype in DTYPES.items() if name.startswith("float8")}
    storage_names = {np.dtype(dtype): name for name, dtype in STORAGES.items()}

    def plain(value: str | int | tuple) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]  # without the header and the stop

    empty = b"ccollections\nOrderedDict\n)R"
    program = [b"\x80\x02", empty]
    for i, (name, t) in enumerate(tensors.items()):
        strides = tuple(int(np.prod(t.shape[k + 1 :], dtype=np.int64)) for k in range(len(t.shape)))
        kind, call, dtype = f"ctorch\n{storage_names.get(t.dtype)}\n".encode(), b"_rebuild_tensor_v2", b""
        if t.dtype in untyped:  # of one byte each, so that their count is that of the bytes
            kind, call = b"ctorch.storage\nUntypedStorage\n", b"_rebuild_tensor_v3"
            dtype = f"ctorch\n{untyped[t.dtype]}\n".encode()
        count = int(np.prod(t.shape, dtype=np.int64))
        storage = b"(" + plain("storage") + kind + plain(str(i)) + plain("cpu") + plain(count) + b"tQ"
        rest = plain(0) + plain(t.shape) + plain(strides) + b"\x89" + empty + dtype
        program.append(plain(name) + b"ctorch._utils\n" + call + b"\n(" + storage + rest + b"tRs")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr("archive/data.pkl", b"".join([*program, b"."]))
        archive.writestr("archive/byteorder", "little")
        for i, t in enumerate(tensors.values()):
            with archive.open(f"archive/data/{i}", "w", force_zip64=True) as entry:
                for block in t.blocks():
                    entry.write(block.reshape(-1).view(np.uint8).data)
                    advance(block.nbytes)
        archive.writestr("archive/version", "3\n")
