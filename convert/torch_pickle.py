"""What a pickle of PyTorch's may build, without running what is in it: dictionaries, lists, tensors, placeholders.

The names that a pickle looks up are answered from a list of ours. Any other class becomes a placeholder that takes what
it is given and does nothing, so that a `Namespace` or a config beside the tensors does no harm; a name of what runs
programs ends the reading.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from rcm_jax.convert.tensors import Tensor

STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class Place(Protocol):
    """Where a saved thing lies; its name is for messages."""

    def numbers(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        """So many from a byte on, read when they are looked at."""
        ...


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


class Storage(_Sealed):
    """Where numbers lie: `count` of them in `place` from byte `offset`, which legacy files tell last."""

    def __init__(self, place: Place, dtype: Any, count: int):
        self.place, self.dtype, self.count, self.offset = place, np.dtype(dtype), count, -1


class _Call(_Sealed):
    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _rebuild_tensor(storage: Storage, start: int, shape: tuple, strides: tuple, *_: object) -> Tensor:
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


def _rebuild_untyped(storage: Storage, start: int, shape: tuple, strides: tuple, *rest: Any) -> Tensor:
    """Of a storage of bytes: start and strides count numbers of the dtype, which comes after gradient and hooks."""
    dtype = np.dtype(next(DTYPES[value] for value in rest if isinstance(value, str) and value in DTYPES))
    typed = Storage(storage.place, dtype, storage.count // dtype.itemsize)
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


class Reader(pickle.Unpickler):
    """The restricted unpickler. `locate` tells a new storage where in `place` it lies."""

    def __init__(self, file: BinaryIO, place: Place, locate: Callable[[str, Storage], None]):
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

    def persistent_load(self, identity: tuple) -> Storage:
        _, dtype, key, _, count, *view = identity
        if any(view):
            raise ValueError(f"{self.place} holds views of storages, as PyTorch before 0.4 wrote them")
        if key not in self.storages:
            kind = np.uint8 if dtype == "UntypedStorage" else STORAGES[dtype]
            self.storages[key] = Storage(self.place, kind, count)
            self.locate(key, self.storages[key])
        return self.storages[key]
