"""Where a run's batches come from: a function of the step, behind one small interface."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jaxtyping import Float

from rcm_jax.data.batch import Batch
from rcm_jax.data.config import DataConfig
from rcm_jax.data.null_text import open_null_text
from rcm_jax.data.reencoding import open_reencoding
from rcm_jax.data.shards import ShardSource, open_shards
from rcm_jax.data.wanted import Wanted
from rcm_jax.wan.config import DiTConfig
from rcm_jax.worlds import toy


class Source(Protocol):
    """Batch `step` is of numpy arrays, the same at every call; their dtype is the source's own.

    about: what a run's checkpoints say of the data; a resumption must find the same.
    """

    null_text: Float[np.ndarray, "L D"]
    about: Mapping[str, Any]

    def batch(self, step: int, rows: range | None = None) -> Batch:
        """Those samples of the step's batch, or all."""

    def keys(self, step: int) -> Sequence[str]:
        """What the samples of the step's batch are called, for reports."""


class ToySource:
    """The built-in world through its codec and its text encoder, float32; no video is ever seen twice."""

    about: Mapping[str, Any] = {}

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


def make_source(
    config: DataConfig, seed: int, model: DiTConfig | None = None, *, text_encoder: str = "", tokenizer: str = "",
    vae: str = "",
) -> Source:  # fmt: skip
    """model, and the files around it, are for shards: their sizes must be the network's, the text encoder makes the
    unconditional text where `data.null_text` is empty, and the autoencoder serves `data.reencode`.

    Raises ValueError or OSError for what cannot be opened or does not go with the network; nothing is compiled then.
    """
    if config.name == "toy":
        return ToySource(config, seed)
    if model is None or 0 in config.latent_shape:
        raise ValueError(
            f"data.latent_shape={config.latent_shape}: shards are read for a network and the latent frames, rows and "
            "columns of its videos"
        )
    shards = open_shards(config.path)
    null_text = open_null_text(config, model, text_encoder=text_encoder, tokenizer=tokenizer)
    reencode = open_reencoding(vae, model.out_channels) if config.reencode else None
    return ShardSource(config, seed, shards, Wanted.of(config, model), null_text, reencode)


def batches(source: Source, start: int, stop: int, rows: range) -> Iterator[Batch]:
    """Those rows of batches start .. stop - 1 in order, made ahead in threads."""
    if isinstance(source, ShardSource):
        return source.batches(start, stop, rows)
    steps = grain.MapDataset.range(start, stop).map(lambda step: source.batch(int(step), rows))
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
