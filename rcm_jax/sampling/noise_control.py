"""Video to video: how much noise a chunk of input gets, and down which times that noise is taken off again.

    x = s eps + (1 - s) z        z: the input's latents; s: the noise level, the rectified-flow time to begin at

A higher s lets the prompt change more, a lower one keeps more of the input. Three rules choose s and the times:

fixed       every chunk at `scale`. The times are s itself, then those of the network's own schedule that lie below it:
            what is above s is noise that the chunk does not have, so no step is spent there.
motion      a chunk in which more moves gets less noise, and so its input leads it more (StreamDiffusionV2's
            controller). All times fall with s, in proportion: as many steps, still down to 0.
published   the controller with StreamDiffusionV2's own times, 0.7, 0.5, …: from the second chunk on the first is
            s in whole thousandths less 0.1. So its network is always told of less noise than there is.

Times of the last two depend on the input: they are traced, and one program serves all chunks.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcm_jax.flow import rf_noisy
from rcm_jax.sampling.schedules import RolloutSchedule, Times
from rcm_jax.types import Latents, Video

RULES = FIXED, MOTION, PUBLISHED = "fixed", "motion", "published"
PUBLISHED_TIMES = (0.7, 0.5, 0.4, 0.2)  # of which a network takes as many as it has steps
FULL_MOTION = 0.2  # difference of two frames, as root of the mean square in [-1, 1], from which on noise falls no more
REACH = 0.1  # by how much the level falls there
MEMORY = 0.1  # of the last chunk's level in a chunk's
TOLD_LESS = 0.1  # published: by how much the first time is below the level


class Motion(NamedTuple):
    """What one chunk's noise tells the next: its level, and the last of its frames."""

    level: Float[Array, ""]
    frame: Float[Array, "B 1 H W 3"]


def first_motion(scale: float, video: Video) -> Motion:
    """Of the first chunk, which has nothing before it."""
    return Motion(jnp.asarray(scale, jnp.result_type(float)), video[:, -1:])


def next_motion(scale: float, video: Video, before: Motion) -> Motion:
    """Of a chunk of frames in [-1, 1], all videos together; `scale` is the level where nothing moves."""
    steps = jnp.diff(jnp.concatenate([before.frame, video], axis=1), axis=1)
    largest = jnp.sqrt(jnp.square(steps).mean((0, 2, 3, 4)).max())
    aim = scale - REACH * jnp.clip(largest / FULL_MOTION, 0, 1).astype(before.level.dtype)
    return Motion((1 - MEMORY) * aim + MEMORY * before.level, video[:, -1:])


def published_time(level: Float[Array, ""]) -> Float[Array, ""]:
    """The first time of a chunk after the first: whole thousandths."""
    return (jnp.floor(1000 * level) - 1000 * TOLD_LESS) / 1000


@jax.jit
def published_levels(times: Float[Array, " n"]) -> Float[Array, " n"]:
    """Of times, 0 aside: the nearest of a thousand levels, which is how much noise the published steps take off and put
    back; the network is told the time."""
    u = 1 - np.arange(1000) / 1000
    grid = jnp.asarray(8 * u / (1 + 7 * u), times.dtype)
    nearest = grid[jnp.abs(grid[None] - times[:, None]).argmin(1)]
    return jnp.where(times > 0, nearest, 0)


class Begin(NamedTuple):
    """Where a chunk's sampling begins, and its times, which may be traced."""

    start: Latents
    times: Float[Array, " n"]


@dataclasses.dataclass(frozen=True)
class InputNoise:
    """How the noise of input video is chosen: one of `RULES`, at or around the level `scale`. steps: of `published`
    alone, whose times are not the network's."""

    scale: float = 0.8
    rule: str = FIXED
    steps: int = 2

    @property
    def lowest(self) -> float:
        """What `scale` must be above, so that the times fall down to 0 whatever moves."""
        if self.rule == FIXED:
            return 0.0
        if self.rule == MOTION:
            return REACH
        return round(REACH + TOLD_LESS + (PUBLISHED_TIMES[1] if self.steps > 1 else 0), 6)

    def levels(self, times: Float[Array, " n"]) -> Float[Array, " n"]:
        """How much noise there is at times of a stream batch."""
        return published_levels(times) if self.rule == PUBLISHED else times

    def schedule(self, own: RolloutSchedule) -> RolloutSchedule:
        """The network's own schedule with the times that input video takes, at the level `scale`."""
        if self.rule == PUBLISHED:
            return dataclasses.replace(own, times=((*PUBLISHED_TIMES[: self.steps], 0.0),))
        return dataclasses.replace(own, times=tuple(_below(self.scale, times) for times in own.times))


def _below(level: float, times: Times) -> Times:
    first = min(level, times[0])
    return (first, *(t for t in times[1:] if t < first))


@functools.partial(jax.jit, static_argnames=("how", "times"))
def begin_chunk(
    how: InputNoise, times: Times, video: Video, latents: Latents, noise: Latents, before: Motion | None
) -> tuple[Begin, Motion]:
    """Of one chunk: `times` of `InputNoise.schedule`, its frames in [-1, 1] and their latents z (one video, or
    one a row of `noise`); before: what the chunk before gave, None for the first."""
    still = before is None or how.rule == FIXED
    now = first_motion(how.scale, video) if still else next_motion(how.scale, video, before)
    level, t = now.level, jnp.asarray(times, now.level.dtype)
    if how.rule != PUBLISHED:
        t = t * (level / how.scale)
        level = t[0]
    elif before is not None:
        t = t.at[0].set(published_time(level))
    return Begin(rf_noisy(latents, noise, level), t), now
