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
