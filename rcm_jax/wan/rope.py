"""Rotary position embedding over (frame, row, column), and the sinusoidal embedding of time.

Both turn a position into angles; the difference between right and nearly right lies in how the angle is reduced.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from rcm_jax.kernels.turning import turned

BASE = 10000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's numbers turn with the frame, the row and the column: d - 4⌊d/6⌋, 2⌊d/6⌋, 2⌊d/6⌋."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_table(
    grid: tuple[int, int, int], head_dim: int, frames: Int[Array, "*B T"] | np.ndarray | None = None
) -> tuple[Float[Array, "*B S d"], Float[Array, "*B S d"]]:
    """cos and sin of every token's angles, [S, head_dim / 2] float32, tokens ordered (frame, row, column).

    `frames` are the positions of the grid's frames, 0, 1, … by default; they may be traced, and a row a sample. Other
    angles are taken in float64 on the host, one small table an axis; only their broadcast to S tokens is on the device.
    """
    positions, rows = [np.arange(length) for length in grid], np.shape(frames)[:-1]
    if frames is not None:
        positions[0] = frames
    parts = []
    for axis, (position, width) in enumerate(zip(positions, axis_widths(head_dim), strict=True)):
        frequency = _frequencies(width)
        if isinstance(position, np.ndarray):
            angle = position.astype(np.float64)[..., None] * frequency
            cos_sin = [jnp.asarray(function(angle), jnp.float32) for function in (np.cos, np.sin)]
        else:
            cos_sin = _cos_sin(position, frequency)
        shape = [1, 1, 1, frequency.size]
        shape[axis] = grid[axis]
        shape = [*(rows if axis == 0 else (1,) * len(rows)), *shape]
        parts.append([jnp.broadcast_to(z.reshape(shape), (*rows, *grid, frequency.size)) for z in cos_sin])
    cos, sin = (
        rearrange(jnp.concatenate(z, axis=-1), "... t h w d -> ... (t h w) d") for z in zip(*parts, strict=True)
    )
    return cos, sin


def apply_rope(x: Float[Array, "B S N D"], table: tuple[Array, Array]) -> Float[Array, "B S N D"]:
    """Rotates neighbouring pairs (x[2i], x[2i+1]) by their token's angle i. In float32, returned in x's dtype. The
    table serves all samples, or has a row for each."""
    return turned(x, *(z.reshape(-1, z.shape[-2], 1, z.shape[-1]) for z in table))


def _cos_sin(position: Int[Array, "..."], frequency: np.ndarray) -> tuple[Array, Array]:
    """Of position · frequency, for every one of both."""
    frequency = frequency.reshape((1,) * position.ndim + (-1,))
    angle = 2 * np.pi * _turn_fractions(position.astype(jnp.float32), frequency)
    return jnp.cos(angle), jnp.sin(angle)


def _frequencies(width: int) -> np.ndarray:
    return BASE ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def turn_in_time(x: Float[Array, "B S N D"], frames: Int[Array, "B S"]) -> Float[Array, "B S N D"]:
    """Turned keys of tokens that move by so many frames: the part that turns with the frame turns on by that."""
    width, *_ = axis_widths(x.shape[-1])
    head, rest = jnp.split(x, (width,), axis=-1)
    head = turned(head, *(z[:, :, None] for z in _cos_sin(frames, _frequencies(width))))
    return jnp.concatenate([head, rest], axis=-1)


# --- time -----------------------------------------------------------------------------------------------------------


def _turn_fractions(t: Array, frequency: np.ndarray) -> Array:
    """frac(t · frequency / 2π) to about 1e-7 turns, in float32: of any |t| < 4096, and of frames below 2^24.

    The published network takes these angles in float64. At t = 1000 a float32 product is off by 3e-5 radians, which
    is visible in the network's output. So both factors are cut into halves of 12 bits: their products are exact, and
    so is the removal of whole turns from each; only the small remainders are added.
    """
    turns = frequency / (2 * np.pi)
    high = (turns.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    low = ((turns - high).astype(np.float32).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    rest = (turns - high - low).astype(np.float32)
    t = t[..., None]
    t_high = jax.lax.reduce_precision(t, exponent_bits=8, mantissa_bits=11)
    t_low = t - t_high
    parts = (t_high * high, t_high * low, t_low * high, t_low * low + t * rest)
    return sum(p - jnp.round(p) for p in parts)


def time_embedding(t: Float[Array, "..."], width: int) -> Float[Array, "... width"]:
    """[cos | sin] of t · 10000^(-j/(width/2)), j = 0 .. width/2 - 1, t in model units (0 .. 1000)."""
    half = width // 2
    frequency = BASE ** (-np.arange(half, dtype=np.float64) / half)
    frequency = frequency.reshape((1,) * t.ndim + (half,))

    def angles(t):
        return t[..., None] * frequency if t.dtype == jnp.float64 else 2 * np.pi * _turn_fractions(t, frequency)

    @jax.custom_jvp  # the bit cuts in `_turn_fractions` have no derivative of their own
    def embed(t):
        return jnp.concatenate([jnp.cos(angles(t)), jnp.sin(angles(t))], axis=-1)

    @embed.defjvp
    def _rule(primals, tangents):
        (t,), (dt,) = primals, tangents
        cos_sin = embed(t)
        cos, sin = jnp.split(cos_sin, 2, axis=-1)
        rate = dt[..., None] * frequency.astype(t.dtype)
        return cos_sin, jnp.concatenate([-sin * rate, cos * rate], axis=-1)

    return embed(t)
