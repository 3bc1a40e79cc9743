"""Noise of videos by (seed, index): a video is the same whatever it is batched with."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.causal.network import CausalDiT
from rcm_jax.sampling.rollout import Noises, chunk_noises
from rcm_jax.sampling.schedules import RolloutSchedule


def draw_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Float[Array, "B n ..."]:
    """Standard normal noise for each video, [len(indices), *shape], row i from (seed, indices[i]) alone."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(indices, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def video_noises(network: CausalDiT, schedule: RolloutSchedule, seed: Array | int, indices: Sequence[int]) -> Noises:
    """As many noises a chunk as the schedule takes, for the videos of those indices."""
    count = 1 if schedule.ode else max(map(len, schedule.times)) - 1
    return chunk_noises(seed, indices, count, (*network.size, network.dit.config.out_channels))
