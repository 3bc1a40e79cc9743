"""RoPE's rotation of neighbouring pairs: of a whole array, or of a tile inside a kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def turned(x: Float[Array, "... D"], cos: Float[Array, "... h"], sin: Float[Array, "... h"]) -> Float[Array, "... D"]:
    """(x[2i], x[2i+1]) turned by the angle i, in float32 or better, in x's dtype. cos and sin spread to x's pairs.

    Pairs are taken apart and put together along a last axis of two: on a GPU they are neighbours in registers.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    cos, sin = (z.astype(wide.dtype) for z in (cos, sin))
    a, b = jax.lax.unstack(wide.reshape(*x.shape[:-1], -1, 2), axis=x.ndim)
    return jax.lax.stack([a * cos - b * sin, a * sin + b * cos], axis=x.ndim).reshape(x.shape).astype(x.dtype)
