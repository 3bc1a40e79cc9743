"""Noise of videos by (seed, index): a video is the same whatever it is batched with."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern
from rcm_jax.sampling.rollout import Noises, chunk_noises, whole_noises
from rcm_jax.sampling.schedules import RolloutSchedule


def draw_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Float[Array, "B n ..."]:
    """Standard normal noise for each video, [len(indices), *shape], row i from (seed, indices[i]) alone."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(indices, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def noise_by_chunks(
    seed: int, indices: Sequence[int], shape: tuple[int, int, int, int, int], pattern: ChunkPattern
) -> Float[Array, "B n T H W C"]:
    """`draw_noise` of shape (n, T, H, W, C), as a causal network of these chunks draws it for the same videos. Raises
    ValueError for a pattern that does not fit T."""
    count, frames, *size = shape
    noises = chunk_noises(seed, indices, count, tuple(size))
    return jnp.moveaxis(whole_noises(noises, pattern.spans(frames)), 0, 1)


def video_noises(network: CausalDiT, schedule: RolloutSchedule, seed: Array | int, indices: Sequence[int]) -> Noises:
    """As many noises a chunk as the schedule takes, for the videos of those indices."""
    count = 1 if schedule.ode else max(map(len, schedule.times)) - 1
    return chunk_noises(seed, indices, count, (*network.size, network.dit.config.out_channels))
