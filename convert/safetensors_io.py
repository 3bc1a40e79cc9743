"""Safetensors files, read lazily and written in a stream. Memory holds one piece of one tensor at a time."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rcm_jax.convert.tensors import Tensor

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def mapped(path: Path, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
    """`count` numbers of a file from byte `offset`, as a view of a mapping of its own, [count]."""
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, np.uint8, "r", offset, count * np.dtype(dtype).itemsize)).view(dtype)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one file. Raises ValueError where the file is not whole or not of this format."""
    try:
        with safe_open(path, "numpy") as file:  # checks the header against the size of the file
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))

    def tensor(name: str, shape: tuple[int, ...], dtype: str, start: int) -> Tensor:
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {dtype}; known are {sorted(DTYPES)}")
        kind, count = np.dtype(DTYPES[dtype]), int(np.prod(shape, dtype=np.int64))
        return Tensor(shape, kind, lambda: mapped(path, 8 + length + start, count, kind).reshape(shape), origin=name)

    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {n: tensor(n, tuple(e["shape"]), e["dtype"], e["data_offsets"][0]) for n, e in entries.items()}, metadata


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], advance: Callable[[int], object]
) -> None:
    """Header first, then the bytes of one tensor after another. `advance` is told the bytes of each piece."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (end, end := end + tensor.nbytes)
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for block in tensor.blocks():
                file.write(block.reshape(-1).view(np.uint8).data)
                advance(block.nbytes)
