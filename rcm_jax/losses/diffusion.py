"""The teacher's own loss: flow matching."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rcm_jax.flow import rf_noisy
from rcm_jax.types import Latents, Time, Velocity


def flow_matching_loss(
    student: Velocity, x0: Latents, noise: Latents, t: Time | Float[Array, "B T"]
) -> Float[Array, " B"]:
    """mean‖v(x_t, t) - (noise - x0)‖² over a sample's elements, t one a sample or one a latent frame."""
    v = student(rf_noisy(x0, noise, t), t)
    return jnp.square(v - (noise - x0)).mean(axis=tuple(range(1, x0.ndim)))
