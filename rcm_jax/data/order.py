"""The order in which the samples of a set are shown: a function of (seed, epoch) alone.

The shards are permuted, and then the samples within windows of a few shards that follow one another, so that what is
read at a time lies together. Positions are global, so the order knows nothing of hosts: which of them reads a position
is decided afterwards, and a run may go on with another number of them, at any step.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


class Order:
    """`counts`: the samples of each shard. `shuffle` False is the order of the shards and in them."""

    def __init__(self, counts: Sequence[int], *, seed: int = 0, window: int = 8, shuffle: bool = True):
        self._counts, self._seed, self._shuffle = np.asarray(counts, np.int64), seed, shuffle
        self._size = window if shuffle else 1
        self.total = int(self._counts.sum())
        # memory holds the windows that are read, not all samples
        self._epoch = functools.lru_cache(maxsize=4)(self._shards_of)
        self._window = functools.lru_cache(maxsize=8)(self._samples_of)

    def at(self, index: int) -> tuple[int, int]:
        """(epoch, position in it) of the sample that is shown as number `index` of a run."""
        return divmod(index, self.total)

    def sample(self, epoch: int, position: int) -> tuple[int, int]:
        """(shard, number in it) at a position of an epoch."""
        _, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, position, side="right"))
        shards, numbers = self._window(epoch, window)
        inside = position - (int(ends[window - 1]) if window else 0)
        return int(shards[inside]), int(numbers[inside])

    def _shards_of(self, epoch: int) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " W"]]:
        """The shards in the epoch's order, and where each window ends."""
        shards = np.arange(len(self._counts))
        if self._shuffle:
            shards = shards[_permutation(len(shards), self._seed, epoch)]
        starts = np.arange(0, len(shards), self._size)
        return shards, np.cumsum(np.add.reduceat(self._counts[shards], starts))

    def _samples_of(self, epoch: int, window: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Shards and numbers of a window's samples in their order."""
        shards = self._epoch(epoch)[0][window * self._size : (window + 1) * self._size]
        owners = np.repeat(shards, self._counts[shards])
        numbers = np.concatenate([np.arange(count) for count in self._counts[shards]])
        if not self._shuffle:
            return owners, numbers
        mixed = _permutation(len(owners), self._seed, epoch, window)
        return owners[mixed], numbers[mixed]


def _permutation(count: int, *seed: int) -> Int[np.ndarray, " n"]:
    """NumPy promises the raw bits of a generator for all its versions, but not what `permutation` makes of them."""
    bits = np.random.PCG64(np.random.SeedSequence([len(seed), *seed])).random_raw(count)
    return np.argsort(bits, kind="stable")
