"""Teacher forcing as it is published: context and noisy video in one sequence, twice as long."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.types import Latents


def pack(
    context: Latents, x_t: Latents, t: Float[Array, " B"] | Float[Array, "B T"], t_context: Float[Array, "B T"] | None
) -> tuple[Latents, Float[Array, "B 2T"]]:
    """[context | x_t] along the frames, and their times; a context without times is clean (0)."""
    t = jnp.broadcast_to(t[:, None] if t.ndim == 1 else t, x_t.shape[:2])
    t_context = jnp.zeros_like(t) if t_context is None else jnp.broadcast_to(t_context, t.shape).astype(t.dtype)
    return jnp.concatenate([context.astype(x_t.dtype), x_t], axis=1), jnp.concatenate([t_context, t], axis=1)
