"""PyTorch's `.pt` and `.pth` files, without PyTorch and without running what is in them.

A pickle is a program. Here it may build dictionaries, lists and tensors and nothing else: the names that it looks up
are answered from a list of ours. Any other class becomes a placeholder that takes what it is given and does nothing, so
that a `Namespace` or a config beside the tensors does no harm; a name of what runs programs ends the reading. Storages
stay in the file until they are looked at. Both formats are read: a zip of storages (since PyTorch 1.6), and the older
sequence of pickles.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from rcm_jax.convert.safetensors_io import mapped
from rcm_jax.convert.tensors import Tensor

STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
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


class Refused(ValueError):
    """The file asks for something that only running its code could give."""


class _Sealed:
    """What a pickle is given may be called or kept, not changed."""

    def __setstate__(self, state: object) -> None:
        raise ValueError("a pickle wants to change the reader's own objects")


class SetAside:
    """What stands for an object of a class that is not known: it takes everything, and does nothing. kind: its
    class."""

    kind = ""

    def __new__(cls, *args: Any, **_: Any) -> "SetAside":
        own = object.__new__(cls)
        if args and isinstance(args[0], type) and issubclass(args[0], SetAside):  # made by a function for a class
            own.kind = args[0].kind
        return own

    def __call__(self, *_: Any, **__: Any) -> "SetAside":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.kind}, set aside>"


def _set_aside(module: str, name: str) -> type[SetAside]:
    return type("SetAside", (SetAside,), {"kind": f"{module}.{name}"})


class _Dict(OrderedDict):
    """An OrderedDict that ignores the attributes a pickle sets on it: state dicts carry `_metadata`."""

    def __setstate__(self, state: object) -> None:
        pass


class _Tensor(_Sealed, Tensor):
    pass


class _Storage(_Sealed):
    """Where numbers lie: `count` of them in `place` from byte `offset`, which legacy files tell last."""

    def __init__(self, place: _Place, dtype: Any, count: int):
        self.place, self.dtype, self.count, self.offset = place, np.dtype(dtype), count, -1


class _Call(_Sealed):
    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _rebuild_tensor(storage: _Storage, start: int, shape: tuple, strides: tuple, *_: object) -> Tensor:
    shape, strides, size = tuple(shape), tuple(strides), storage.dtype.itemsize
    count = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if min((start, *shape, *strides)) < 0 or start + count > storage.count:
        raise ValueError(f"a tensor of shape {shape} lies outside of its storage of {storage.count} numbers")

    def load() -> np.ndarray:
        flat = storage.place.numbers(storage.offset + start * size, count, storage.dtype)
        if not count:
            return flat.reshape(shape)
        bits = flat.view(f"u{size}")  # the function does not know every dtype
        strided = np.lib.stride_tricks.as_strided(bits, shape, [s * size for s in strides], writeable=False)
        return strided.view(storage.dtype)

    return _Tensor(shape, storage.dtype, load)


def _rebuild_untyped(storage: _Storage, start: int, shape: tuple, strides: tuple, *rest: Any) -> Tensor:
    """Of a storage of bytes: start and strides count numbers of the dtype, which comes after gradient and hooks."""
    dtype = np.dtype(next(DTYPES[value] for value in rest if isinstance(value, str) and value in DTYPES))
    typed = _Storage(storage.place, dtype, storage.count // dtype.itemsize)
    made = _rebuild_tensor(typed, start, shape, strides)

    def load() -> np.ndarray:
        typed.offset = storage.offset  # known when the file has been read
        return made.load()

    return _Tensor(made.shape, made.dtype, load)


DTYPES = {  # as torch.NAME in a pickle; the name stands for it, since a dtype could be changed
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2, "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16, "float32": np.float32, "float64": np.float64, "uint16": np.uint16, "uint32": np.uint32,
    "uint64": np.uint64,
}  # fmt: skip
# Modules of which a file of weights wants nothing but harm. What is not here is not run either.
RUNS = {
    "os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "socket", "ctypes", "importlib", "runpy", "code",
    "pickle", "_pickle", "marshal", "builtins", "__builtin__", "webbrowser", "signal", "pip",
}  # fmt: skip
PLAIN = {"set", "frozenset", "list", "dict", "tuple", "int", "float", "complex", "str", "bytes", "bytearray", "bool",
         "slice", "range", "object", "long", "unicode"}  # fmt: skip
_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": _Dict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_rebuild_untyped),
    "torch.storage.UntypedStorage": "UntypedStorage",
    "torch.UntypedStorage": "UntypedStorage",
    "torch._utils._rebuild_parameter": _Call(lambda tensor, *_: tensor),
}


class _Reader(pickle.Unpickler):
    """The restricted unpickler. `locate` tells a new storage where in `place` it lies."""

    def __init__(self, file: BinaryIO, place: _Place, locate: Callable[[str, _Storage], None]):
        super().__init__(file)
        self.place, self.locate, self.storages = place, locate, {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return name
        if module == "torch" and name in DTYPES:
            return name
        if f"{module}.{name}" in _KNOWN:
            return _KNOWN[f"{module}.{name}"]
        builtin = module in ("builtins", "__builtin__")
        if module.partition(".")[0] in RUNS and not (builtin and name in PLAIN):
            raise Refused(
                f"{self.place} is refused: its pickle asks for {module}.{name}, and only tensors and plain containers "
                "are read; nothing of it was run. Where you trust the file, save its state_dict alone with torch"
            )
        return _set_aside(module, name)

    def persistent_load(self, identity: tuple) -> _Storage:
        _, dtype, key, _, count, *view = identity
        if any(view):
            raise ValueError(f"{self.place} holds views of storages, as PyTorch before 0.4 wrote them")
        if key not in self.storages:
            kind = np.uint8 if dtype == "UntypedStorage" else STORAGES[dtype]
            self.storages[key] = _Storage(self.place, kind, count)
            self.locate(key, self.storages[key])
        return self.storages[key]


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

        def locate(key: str, storage: _Storage) -> None:
            info = entries[f"{root}data/{key}"]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < storage.count * storage.dtype.itemsize:
                raise ValueError(f"storage {key} is compressed or too short")
            raw.seek(info.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", raw.read(4))
            storage.offset = info.header_offset + 30 + name_length + extra_length

        with archive.open(programs[0]) as program:
            return _Reader(program, place, locate).load()


def _read_legacy(place: _Place) -> Any:
    with place.open() as file:

        def load() -> tuple[Any, dict[str, _Storage]]:
            reader = _Reader(file, place, lambda key, storage: None)
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
