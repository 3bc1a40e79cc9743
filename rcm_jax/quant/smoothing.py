"""What is done to keys or values [B, S, N, D] before they are coded, so that a scale fits all numbers of a group.

Statistics are a chunk's own. Each way but clipping, which loses what it cuts, has its inverse.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rcm_jax.quant.groups import Heads


def clip_threshold(x: Heads, percentile: float) -> Float[Array, "B 1 N 1"]:
    """The size that this share of a head's numbers does not exceed."""
    return jnp.quantile(jnp.abs(x), jnp.float32(percentile), axis=(1, 3), keepdims=True)


def clip(x: Heads, percentile: float) -> Heads:
    threshold = clip_threshold(x, percentile)
    return jnp.clip(x, -threshold, threshold)


def channel_scale(x: Heads, alpha: float) -> Float[Array, "B 1 N D"]:
    """How large a channel is beside the others of its head, to the power of alpha, within [1/16, 16]."""
    size = jnp.maximum(jnp.mean(jnp.abs(x), axis=1, keepdims=True), 1e-6)
    return jnp.clip((size / jnp.mean(size, axis=-1, keepdims=True)) ** jnp.float32(alpha), 1 / 16, 16.0)


def hadamard(x: Heads) -> Heads:
    """The orthonormal Walsh-Hadamard transform of the head width, in Sylvester's order. Its own inverse."""
    shape, width = x.shape, x.shape[-1]
    half = 1
    while half < width:
        pairs = x.reshape(*shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2)
        half *= 2
    return x.reshape(shape) * jnp.float32(width**-0.5)


def falling_order(x: Heads) -> Int[Array, "B 1 N D"]:
    """A head's channels, the largest first."""
    return jnp.argsort(-jnp.mean(jnp.abs(x), axis=1, keepdims=True), axis=-1, stable=True)


def reordered(x: Heads, order: Int[Array, "B 1 N D"]) -> Heads:
    return jnp.take_along_axis(x, order.astype(jnp.int32), axis=-1)
