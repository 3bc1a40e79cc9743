"""From prompts to video with a causal network: `generate` by rollout.

Video i of a seed is the same whatever it is batched with, and the same as when it is streamed: its noise comes from
(seed, i, chunk) alone.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from rcm_jax.sampling.rollout import Noises, chunk_noises, rollout
from rcm_jax.sampling.schedules import RolloutSchedule
from rcm_jax.types import Latents, Params, Text
from rcm_jax.wan.causal import CausalDiT
from rcm_jax.worlds.world import World


def video_noises(network: CausalDiT, schedule: RolloutSchedule, seed: Array | int, indices: Sequence[int]) -> Noises:
    """As many noises a chunk as the schedule takes, for the videos of those indices."""
    count = 1 if schedule.ode else max(map(len, schedule.times)) - 1
    return chunk_noises(seed, indices, count, (*network.size, network.dit.config.out_channels))


@functools.partial(jax.jit, static_argnames=("network", "schedule", "frames"))
def _rollout(
    network: CausalDiT, schedule: RolloutSchedule, frames: int, params: Params, text: Text, null_text: Array,
    seed: Array, indices: Array,
) -> Latents:  # fmt: skip
    noises = video_noises(network, schedule, seed, indices)
    return rollout(network, params, text, noises, schedule, frames=frames, null_text=null_text)


def generate_causal(
    params: Params,
    network: CausalDiT,
    world: World,
    prompts: Sequence[str],
    *,
    schedule: RolloutSchedule,
    frames: int | None = None,
    seed: int = 0,
    batch_size: int = 48,
    progress: str = "",
) -> Float[np.ndarray, "B F H W 3"]:
    """One video in [-1, 1] for each prompt, of `frames` latent frames (the network's own, unless given).

    `progress` names a bar with the time left; empty for none. Raises ValueError for prompts that the world's text
    encoder does not know, and what `rollout` raises.
    """
    text = world.encode_text(prompts)
    size = min(batch_size, len(prompts))
    videos = []
    starts = range(0, len(prompts), size)
    for start in tqdm(starts, desc=progress, unit="batch", disable=not progress, leave=False):
        rows = np.arange(start, start + size)  # the last batch is filled up, so that it needs no other program
        latents = _rollout(
            network, schedule, frames or network.frames, params, text[np.minimum(rows, len(prompts) - 1)],
            world.null_text, np.uint32(seed), rows,
        )  # fmt: skip
        videos.append(world.decode(latents))
    return np.concatenate(videos)[: len(prompts)]
