"""Weights on their way to a file, a piece at a time: from sharded arrays, on several processes too, into safetensors.

A piece is a layer of a stacked leaf, or a small leaf whole. Arrays that other processes have parts of are gathered by
a collective a piece, so every process walks through all pieces in the same order, and one of them writes. The file
carries a checksum of every tensor, taken as its bytes are written.
"""

import collections
import contextlib
import functools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from rcm_jax.types import Params

WHOLE_BYTES, KEPT_BYTES = 8 << 20, 1 << 20
READ_BYTES = 4 << 20
SUMS = "crc32"  # in a file's metadata: JSON, {name: CRC-32 of the tensor's bytes in 8 hexadecimal digits}
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Streamed(Protocol):
    """A tensor whose numbers come when they are asked for; `blocks` in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int: ...

    def blocks(self) -> Iterator[np.ndarray]: ...


class Journal(Protocol):
    """What a stopped writer had done, piece by piece in the order of writing; a piece is told by a checksum."""

    knows: bool  # of pieces to come

    def kept(self, found: Callable[[], int | None]) -> int | None:
        """The checksum of the next piece if it was written, and what is `found` there still has it."""

    def add(self, checksum: int) -> None:
        """The next piece is written."""


def write_safetensors(
    path: Path, tensors: Mapping[str, Streamed], metadata: Mapping[str, str], advance: Callable[[int], object],
    journal: Journal | None = None,
) -> None:  # fmt: skip
    """Header first, then the bytes of one tensor after another, then their checksums into the room that the header has
    for them (`SUMS`). `advance` is told the bytes of each piece.

    journal: goes on with the file at `path`, after the pieces that it knows.
    """
    head = _header(tensors, metadata, {})
    with open(path, "wb" if journal is None else "r+b" if path.exists() else "w+b") as file, _Writer(file) as writer:
        file.write(head)
        if journal is not None and journal.kept(lambda: zlib.crc32(head)) is None:
            journal.add(zlib.crc32(head))
        for name, tensor in tensors.items():
            for piece in _pieces(tensor):
                if journal is not None and journal.knows and writer.keep(name, piece, journal):
                    advance(piece.nbytes)
                    continue
                for block in piece.blocks():
                    writer.put(name, block)
                    advance(block.nbytes)
                if journal is not None:
                    writer.end(name, journal)
        writer.wait()
        if journal is not None:
            file.truncate()
        file.seek(0)
        file.write(_header(tensors, metadata, writer.sums))


class _Writer(contextlib.AbstractContextManager):
    """Bytes go to a file, and into the checksum of their tensor, while the next ones are made; two blocks may wait."""

    def __init__(self, file: BinaryIO):
        self.sums: dict[str, int] = collections.Counter()
        self._file, self._thread, self._jobs = file, futures.ThreadPoolExecutor(1), collections.deque()

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def keep(self, name: str, piece: Streamed, journal: Journal) -> bool:
        """Whether the next piece is there already; the file stands after it then, else where it begins."""
        start = self._file.tell()
        told = journal.kept(lambda: checksum(self._file, piece.nbytes, self.sums[name]))
        self._file.seek(start if told is None else start + piece.nbytes)
        self.sums[name] = self.sums[name] if told is None else told
        return told is not None

    def put(self, name: str, block: np.ndarray) -> None:
        self.wait(left=1)
        self._jobs.append(self._thread.submit(self._put, name, block.reshape(-1).view(np.uint8).data))

    def end(self, name: str, journal: Journal) -> None:
        """A piece is whole when all that was put is."""
        self._jobs.append(self._thread.submit(self._end, name, journal))

    def wait(self, left: int = 0) -> None:
        """Until no more jobs are left. Raises what was raised in them."""
        while len(self._jobs) > left:
            self._jobs.popleft().result()

    def _put(self, name: str, data: memoryview) -> None:
        self._file.write(data)
        self.sums[name] = zlib.crc32(data, self.sums[name])

    def _end(self, name: str, journal: Journal) -> None:
        self._file.flush()
        journal.add(self.sums[name])


def _header(tensors: Mapping[str, Streamed], metadata: Mapping[str, str], sums: Mapping[str, int]) -> bytes:
    """As long for any checksums."""
    told = json.dumps({name: f"{sums.get(name, 0):08x}" for name in tensors})
    header: dict[str, object] = {"__metadata__": {**metadata, SUMS: told}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (end, end := end + tensor.nbytes)
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensor: Streamed) -> Sequence[Streamed]:
    return getattr(tensor, "layers", ()) or (tensor,)


def checksum(file: BinaryIO, size: int, before: int = 0) -> int | None:
    """CRC-32 of the next `size` bytes, after others that had `before`; None where the file ends sooner."""
    buffer = memoryview(bytearray(min(size, READ_BYTES)))
    while size:
        count = file.readinto(buffer[: min(size, READ_BYTES)])
        if not count:
            return None
        before, size = zlib.crc32(buffer[:count], before), size - count
    return before


class Leaf:
    """An array, of numpy or on devices, as it will be written. Its blocks come once: asked again, `blocks` goes on."""

    def __init__(self, array: Any, dtype: Any):
        self.shape, self.dtype = array.shape, jnp.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._blocks = (np.ascontiguousarray(piece, self.dtype) for piece in pieces(array))

    def blocks(self) -> Iterator[np.ndarray]:
        """Takes part in the collectives of all processes that have a part of the array."""
        return self._blocks


def pieces(array: Any) -> Iterator[np.ndarray]:
    """The layers of a large stacked array, or all of another."""
    if array.ndim < 3 or array.nbytes <= WHOLE_BYTES:
        yield on_host(array)
        return
    for i in range(array.shape[0]):
        yield on_host(array, i)


def leaves(params: Params, dtype: str) -> dict[str, Leaf]:
    """By our names, ordered by them, so that it is the same order in every process."""
    flat = flatten_dict(params, sep="/")
    return {name: Leaf(flat[name], dtype) for name in sorted(flat)}


def first_agrees(well: bool) -> bool:
    """What the first process says, in all of them."""
    return well if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(well)))


def on_host(array: Any, layer: int | None = None) -> np.ndarray:
    """The numbers of an array, or of one entry of its first axis, wherever they lie. Where other processes have parts
    of it, all of them must ask for it."""
    if not isinstance(array, jax.Array):
        return np.asarray(array if layer is None else array[layer])
    if array.is_fully_replicated:
        array = array.addressable_data(0)
    if array.is_fully_addressable:
        # A JAX array keeps what was fetched of it for as long as it lives: all but small ones are fetched from a copy.
        if layer is None and array.nbytes <= KEPT_BYTES:
            return np.asarray(array)
        alone = len(array.devices()) == 1  # where a run's mesh, set around us, may have more
        with jax.set_mesh(Mesh(list(array.devices()), "device")) if alone else contextlib.nullcontext():
            return np.asarray(_part(None)(array, layer))
    return np.asarray(_part(NamedSharding(array.sharding.mesh, P()))(array, layer).addressable_data(0))


@functools.cache
def _part(sharding: Sharding | None) -> Callable[[jax.Array, int | None], jax.Array]:
    """The whole of an array or one of its layers, in buffers of its own; where the array lies, or as told."""

    def part(array: jax.Array, layer: int | None) -> jax.Array:
        return jnp.array(array) if layer is None else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)

    return jax.jit(part) if sharding is None else jax.jit(part, out_shardings=sharding)
