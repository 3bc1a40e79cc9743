"""The built-in world's videos as shards: the numbers of `ToySource`, so that training from them is the same."""

from collections.abc import Iterator

from rcm_jax.data.config import DataConfig
from rcm_jax.data.prepare.options import SetOptions
from rcm_jax.data.prepare.sets import Plan, ShardSet, digest_of, key_of
from rcm_jax.data.sample import Sample
from rcm_jax.data.source import ToySource
from rcm_jax.worlds import toy

TOGETHER = 32  # videos that are encoded at a time


def make_world(count: int, options: SetOptions, seed: int = 0) -> str:
    """Videos 0 to count - 1 of the seed: what a run of that seed sees in its first `count` samples."""
    source = ToySource(DataConfig(batch_size=count), seed)
    shards = ShardSet(options, Plan("world", {"seed": seed}, count, digest_of([])))

    def samples(numbers: range) -> Iterator[Sample]:
        for first in range(numbers.start, numbers.stop, TOGETHER):
            group = range(first, min(first + TOGETHER, numbers.stop))
            batch, captions = source.batch(0, group), toy.batch(seed, group)[1]
            for number, latents, text, caption in zip(group, batch.latents, batch.text, captions, strict=True):
                yield Sample(key_of(number), latents, text, caption)

    return shards.make(samples, "world")
