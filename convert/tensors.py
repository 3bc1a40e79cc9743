"""A tensor that lies in a file: shape and dtype are known, its numbers are read where and when they are needed."""

import dataclasses
import functools
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from einops import EinopsError

BLOCK_BYTES = 64 << 20
TILE = 256


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Numbers to come.

    load: opens the array, usually as a view of a mapped file: what is not looked at is not read, and memory goes back
    with the view. It may be of another dtype than `dtype`; the cast is made piece by piece.
    layers: for a tensor stacked on its first axis, what it is made of.
    origin: its name in the file it comes from, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    layers: tuple["Tensor", ...] = ()
    origin: str = ""

    @classmethod
    def of(cls, array: Any, origin: str = "") -> "Tensor":
        """One that is in memory already."""
        array = np.asarray(array)
        return cls(array.shape, array.dtype, lambda: array, origin=origin)

    @classmethod
    def stack(cls, layers: Sequence["Tensor"]) -> "Tensor":
        """Equal tensors on a new first axis. Raises ValueError naming those that differ from the first."""
        first = layers[0]
        odd = [f"{t.origin} {t.shape}" for t in layers if t.shape != first.shape]
        if odd:
            raise ValueError(f"the layers differ in shape: {first.origin} is {first.shape}, but {', '.join(odd)}")
        dtype = functools.reduce(np.promote_types, [t.dtype for t in layers])
        layers = tuple(t.astype(dtype) for t in layers)
        return cls((len(layers), *first.shape), dtype, lambda: np.stack([t.read() for t in layers]), layers)

    @classmethod
    def concatenate(cls, parts: Sequence["Tensor"]) -> "Tensor":
        """Tensors end to end on the first axis, which are read together."""
        shape = (sum(t.shape[0] for t in parts), *parts[0].shape[1:])
        dtype = functools.reduce(np.promote_types, [t.dtype for t in parts])
        origin = " + ".join(t.origin for t in parts)
        return cls(shape, dtype, lambda: np.concatenate([t.read() for t in parts]), origin=origin)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def astype(self, dtype: Any) -> "Tensor":
        """The same numbers rounded to dtype when they are read."""
        dtype = np.dtype(dtype)
        return dataclasses.replace(self, dtype=dtype, layers=tuple(t.astype(dtype) for t in self.layers))

    def apply(self, layout: Callable[[np.ndarray], np.ndarray]) -> "Tensor":
        """The tensor after a change of layout. Raises ValueError where the layout does not go with the shape."""
        try:
            shape = layout(np.broadcast_to(np.zeros((), np.uint8), self.shape)).shape
        except (ValueError, EinopsError) as error:
            why = str(error).splitlines()[-1].strip()  # before it einops repeats pattern and shape
            raise ValueError(f"{self.origin} has shape {self.shape}, which its place does not take: {why}") from error
        return Tensor(shape, self.dtype, lambda: layout(self.load()), origin=self.origin)

    def layer(self, i: int) -> "Tensor":
        """Entry i of the first axis."""
        if self.layers:
            return self.layers[i]
        return Tensor(self.shape[1:], self.dtype, lambda: self.load()[i], origin=f"{self.origin}[{i}]")

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The numbers in a part of the tensor (one slice an axis), or all: contiguous, and only that part is read."""
        index = (slice(None),) * len(self.shape) if index is None else index
        if not self.layers:
            return cast(self.load()[index], self.dtype)
        out = np.empty([len(range(*s.indices(n))) for s, n in zip(index, self.shape, strict=True)], self.dtype)
        for row, layer in zip(out, self.layers[index[0]], strict=True):
            row[...] = layer.read(index[1:])
        return out

    @property
    def block_rows(self) -> int:
        """How many entries of the first axis make a block: one layer, or what fits BLOCK_BYTES."""
        return 1 if self.layers else max(1, self.shape[0] * BLOCK_BYTES // max(1, self.nbytes))

    def blocks(self) -> Iterator[np.ndarray]:
        """The numbers in C order, in contiguous pieces of a layer or less, of about BLOCK_BYTES at most."""
        if self.layers:
            for layer in self.layers:
                yield from layer.blocks()
            return
        array = self.load()
        _advise(array, mmap.MADV_WILLNEED)
        for start in range(0, self.shape[0], self.block_rows) if self.shape else ():
            yield cast(array[start : start + self.block_rows], self.dtype)
            _advise(array, mmap.MADV_DONTNEED)  # what was read of a mapped file counts as memory until then
        if not self.shape:
            yield cast(array, self.dtype)


def _advise(array: np.ndarray, advice: int) -> None:
    """Tells the system what is next with a mapped file; other arrays are as they are."""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap):
        array.madvise(advice)


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A C-contiguous array of dtype. Transposed matrices are copied tile by tile, which the caches thank for, in the
    order in which they lie in the file, which the disk does."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.asarray(array, order="C").astype(dtype, order="C", copy=False)
    out = np.empty(array.shape, dtype)
    source, target = array, out
    if array.dtype == dtype:  # numpy moves integers faster than bfloat16
        source, target = (x.view(f"u{dtype.itemsize}") for x in (array, out))
    for j in range(0, array.shape[1], TILE):
        for i in range(0, array.shape[0], TILE):
            target[i : i + TILE, j : j + TILE] = source[i : i + TILE, j : j + TILE]
    return out


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
