"""Frames as files have them, made on the device that decodes them: a quarter of the bytes leave it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from rcm_jax.finite import check_count, check_finite, count_wrong
from rcm_jax.media.pictures import to_uint8
from rcm_jax.types import Video


class Painted(NamedTuple):
    """frames: 0 to 255. wrong: of each video, how many of the numbers they were made from were NaN or infinite."""

    frames: UInt8[Array, "B F H W 3"]
    wrong: Int[Array, " B"]

    def video(self, index: int) -> "Painted":
        """One of them, without its axis."""
        return Painted(self.frames[index], self.wrong[index])


def paint(video: Video) -> Painted:
    """`media.pictures.to_uint8`, the same numbers, for inside jit; and what `checked` asks."""
    levels = jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5)
    return Painted(levels.astype(jnp.uint8), jnp.sum(~jnp.isfinite(video), axis=(1, 2, 3, 4)))


def paint_on_host(video: Float[np.ndarray, "F H W 3"]) -> Painted:
    """Of one video that is here already."""
    wrong = count_wrong(video)
    return Painted(to_uint8(video), np.asarray(wrong))


def checked(part: Painted | Float[Array, "... 3"], place: str) -> Shaped[np.ndarray, "... 3"]:
    """A part's frames. Raises FloatingPointError that names the place where a number of them is, or was before it was
    rounded, NaN or infinite."""
    if not isinstance(part, Painted):
        return check_finite(np.asarray(part), place)
    frames, wrong = jax.device_get(part)
    check_count(int(np.sum(wrong)), frames.size, place)
    return frames
