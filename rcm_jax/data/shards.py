"""Training from shards: which samples a step sees, read by several threads ahead of it.

Sample `step · batch_size + row` of a run is a position of an epoch (`order.py`), whoever reads it. So batches are a
function of (seed, step): the same after a resumption at any step, and split over any number of hosts.

A sample that cannot be used (damaged, of another shape, not finite, a pickle that wants to run code) is named once, and
the next one of the order takes its place; all others stay where they are. More than `data.max_bad` of them are an
error. A disk or server that does not answer is no bad sample: it ends the run, and a resumption goes on from there.
"""

import dataclasses
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from rcm_jax.data.batch import Batch
from rcm_jax.data.config import DataConfig
from rcm_jax.data.order import Order
from rcm_jax.data.shard_files import Shard, find_shards, open_shard
from rcm_jax.data.wanted import Row, Wanted, stacked
from rcm_jax.progress import waiting

Reencode = Callable[[np.ndarray], np.ndarray]
UNUSABLE = (ValueError, FloatingPointError)  # what reading a bad sample raises
_LISTED = 3  # bad samples in an error
_OPENERS = 16  # threads that read headers
_AHEAD = 32  # samples in memory beyond those being read, at most


def open_shards(path: str) -> list[Shard]:
    """All shards of `data.path`, in name order. Raises ValueError or OSError that names it."""
    if not path:
        raise ValueError("data.path is empty: give the folder or address of the shards")
    try:
        addresses = find_shards(path)
        with waiting(f"data: reading the headers of {len(addresses)} shards"), ThreadPoolExecutor(_OPENERS) as pool:
            return list(pool.map(open_shard, addresses))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.path={path}: {error.strerror or error}") from error
    except (OSError, ValueError) as error:
        raise (OSError if isinstance(error, OSError) else ValueError)(f"data.path={path}: {error}") from error


class ShardSource:
    """Batches of the shards' samples in the dtype stored, which is that of the first; see `source.Source`.

    reencode: what becomes of each sample's latents before they are used, one sample after another.
    Raises ValueError where the samples are not what is wanted, or there is none, or too many are bad.
    """

    def __init__(
        self, config: DataConfig, seed: int, shards: Sequence[Shard], wanted: Wanted,
        null_text: Float[np.ndarray, "L D"], reencode: Reencode | None = None,
    ):  # fmt: skip
        self.batch_size, self.null_text = config.batch_size, null_text
        self._threads, self._shards, self._wanted = config.threads, shards, wanted
        self._bad = _Bad(config.max_bad)
        self._reencode, self._one = reencode, threading.Lock()
        for shard in shards:
            for line in shard.broken:
                self._bad.add(line, line)
        counts = [len(shard) for shard in shards]
        if not sum(counts):
            raise ValueError(f"data.path={config.path} has {len(shards)} shards and no sample that is whole")
        self._order = Order(counts, seed=seed, window=config.window, shuffle=config.shuffle)
        self.about = {"shards": len(shards), "samples": sum(counts), "fingerprint": _fingerprint(shards)}
        first = self._first()
        self._dtypes = {field: value.dtype for field, value in first.items()}
        if "image" in first:  # of which networks take any number, but a batch one
            self._wanted = dataclasses.replace(wanted, tokens=len(first["image"]))
        if reencode:
            self._dtypes["latents"] = np.dtype(np.float32)

    def batch(self, step: int, rows: range | None = None) -> Batch:
        rows = rows or range(self.batch_size)
        with ThreadPoolExecutor(self._threads) as pool:
            return stacked(list(pool.map(lambda row: self._row(step, row), rows)), self._dtypes)

    def batches(self, start: int, stop: int, rows: range) -> Iterator[Batch]:
        """Those rows of batches start .. stop - 1, samples read ahead by `data.threads` threads."""
        size = len(rows)

        def row(number: int) -> Row:
            return self._row(start + int(number) // size, rows.start + int(number) % size)

        samples = grain.MapDataset.range((stop - start) * size).map(row)
        ahead = max(2 * self._threads, min(size, _AHEAD))
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead)
        return iter(samples.to_iter_dataset(options).batch(size, batch_fn=lambda rows: stacked(rows, self._dtypes)))

    def keys(self, step: int) -> list[str]:
        return [self._name(*self._place(step, row)) for row in range(self.batch_size)]

    def _name(self, shard: int, number: int) -> str:
        return self._shards[shard].name(number)

    def _place(self, step: int, row: int) -> tuple[int, int]:
        """Shard and number of the sample, or, where it is known to be bad, of the next one that is not."""
        order = self._order
        epoch, position = order.at(step * self.batch_size + row)
        for ahead in range(order.total):
            place = order.sample(epoch, (position + ahead) % order.total)
            if place not in self._bad:
                return place
        raise ValueError(f"none of {order.total} samples can be used: {self._bad.first()}")

    def _row(self, step: int, row: int) -> Row:
        while True:
            place = self._place(step, row)
            try:
                found = self._read(*place)
                break
            except UNUSABLE as error:
                self._bad.add(place, str(error))
        if self._reencode:
            with self._one:
                found["latents"] = self._reencode(found["latents"])
        return found

    def _read(self, shard: int, number: int) -> Row:
        return self._wanted.row(self._shards[shard].read(number), self._name(shard, number))

    def _first(self) -> Row:
        """What a sample is like. Of three places of the set one that fits, so that a single odd sample is only bad; the
        first one's error where none does."""
        order, errors = self._order, []
        for position in sorted({0, order.total // 2, order.total - 1}):
            place = order.sample(0, position)
            try:
                return self._read(*place)
            except UNUSABLE as error:
                errors.append(error)
        raise errors[0]


class _Bad:
    """Which samples cannot be used, and why."""

    def __init__(self, limit: int):
        self._limit, self._why, self._lock = limit, {}, threading.Lock()

    def __contains__(self, place: Any) -> bool:
        return place in self._why

    def add(self, place: Any, why: str) -> None:
        """Raises ValueError beyond the limit."""
        with self._lock:
            if place in self._why:
                return
            self._why[place] = why
            count = len(self._why)
            if count > self._limit:
                raise ValueError(f"{count} samples cannot be used, and data.max_bad={self._limit}: {self.first()}")
            tqdm.write(f"data: left out ({count} of data.max_bad={self._limit}): {why}", file=sys.stderr)

    def first(self) -> str:
        listed = list(self._why.values())
        return "; ".join(listed[:_LISTED]) + (" …" if len(listed) > _LISTED else "")


def _fingerprint(shards: Sequence[Shard]) -> str:
    """Changes where shards are added, left out, renamed or made anew; not where the folder moves."""
    lines = [f"{shard.address.rpartition('/')[2]} {shard.size} {' '.join(shard.keys)}\n" for shard in shards]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]
