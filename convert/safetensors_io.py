"""Safetensors files, read lazily. Memory holds what is looked at."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from rcm_jax.convert.tensors import Tensor
from rcm_jax.tensor_stream import DTYPES


def mapped(path: Path, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
    """`count` numbers of a file from byte `offset`, as a view of a mapping of its own, [count]."""
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, np.uint8, "r", offset, count * np.dtype(dtype).itemsize)).view(dtype)


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str], int]:
    """What a file says of each tensor, its metadata, and where the numbers begin. Raises ValueError where the file is
    not whole or not of this format."""
    try:
        with safe_open(path, "numpy") as file:  # checks the header against the size of the file
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, metadata, 8 + length


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one file. Raises as `read_header`, and for a dtype that is not known here."""
    entries, metadata, begin = read_header(path)

    def tensor(name: str, shape: tuple[int, ...], dtype: str, start: int) -> Tensor:
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {dtype}; known are {sorted(DTYPES)}")
        kind, count = np.dtype(DTYPES[dtype]), int(np.prod(shape, dtype=np.int64))
        return Tensor(shape, kind, lambda: mapped(path, begin + start, count, kind).reshape(shape), origin=name)

    return {n: tensor(n, tuple(e["shape"]), e["dtype"], e["data_offsets"][0]) for n, e in entries.items()}, metadata


def read_safetensors_bytes(data: bytes | bytearray | memoryview, name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors, as views of the bytes of a file called `name`, and metadata. Raises ValueError where it is not whole."""
    data = memoryview(data).toreadonly()
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8 : 8 + length]))
        metadata = header.pop("__metadata__", {})
        return {key: _view(data[8 + length :], entry) for key, entry in header.items()}, metadata
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not a whole safetensors file: {error}") from error


def _view(data: memoryview, entry: dict) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if not 0 <= start <= stop <= len(data):
        raise ValueError(f"numbers from byte {start} to {stop} of {len(data)}")
    return np.frombuffer(data[start:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"])
