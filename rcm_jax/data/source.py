"""Where a run's batches come from: a function of the step, behind one small interface."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import jax
import numpy as np
from jaxtyping import Float

from rcm_jax.data.batch import Batch
from rcm_jax.data.config import DataConfig
from rcm_jax.worlds import toy


class Source(Protocol):
    """Batch `step` is of float32 numpy arrays, the same at every call."""

    null_text: Float[np.ndarray, "L D"]

    def batch(self, step: int, rows: range | None = None) -> Batch:
        """Those samples of the step's batch, or all."""

    def keys(self, step: int) -> Sequence[str]:
        """What the samples of the step's batch are called, for reports."""


class ToySource:
    """The built-in world through its codec and its text encoder; no video is ever seen twice."""

    def __init__(self, config: DataConfig, seed: int):
        self.batch_size, self.seed = config.batch_size, seed
        codec = toy.ToyCodec.load()
        self._encode = jax.jit(codec.encode)
        self.null_text = toy.encode_text([""])[0]

    def _videos(self, step: int, rows: range) -> range:
        first = step * self.batch_size
        return range(first + rows.start, first + rows.stop)

    def batch(self, step: int, rows: range | None = None) -> Batch:
        videos, captions = toy.batch(self.seed, self._videos(step, rows or range(self.batch_size)))
        return Batch(np.asarray(self._encode(videos)), toy.encode_text(captions))

    def keys(self, step: int) -> list[str]:
        return [f"toy video {i} of seed {self.seed}" for i in self._videos(step, range(self.batch_size))]


def make_source(config: DataConfig, seed: int) -> Source:
    """Raises ValueError for a source that this machine cannot serve."""
    if config.name == "toy":
        return ToySource(config, seed)
    raise ValueError(
        f"data.name={config.name!r}: reading tar shards is not part of this version; training runs on data.name='toy'. "
        "Wan recipes build abstractly with --dry_run"
    )


def batches(source: Source, start: int, stop: int, rows: range) -> Iterator[Batch]:
    """Those rows of batches start .. stop - 1 in order, made one step ahead in a thread."""
    steps = grain.MapDataset.range(start, stop).map(lambda step: source.batch(int(step), rows))
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
