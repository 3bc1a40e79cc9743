"""The teacher's own loss, which is also that of a critic in rectified flow: flow matching."""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from rcm_jax.flow import rf_noisy
from rcm_jax.losses.samples import Terms, not_finite, only_kept
from rcm_jax.types import Latents, Time, Velocity


def velocity_error(
    student: Velocity, x0: Latents, noise: Latents, t: Time | Float[Array, "B T"]
) -> tuple[Float[Array, "B T H W C"], Terms]:
    """v(x_t, t) - (noise - x0), zero in a sample with a non-finite element; t one a sample or one a latent frame."""
    x_t = rf_noisy(x0, noise, t)
    v, target = student(x_t, t), noise - x0
    masked = not_finite(v, target)
    (error,) = only_kept(masked, v - target)
    return error, {"xt": x_t, "t": t, "v_pred": stop_gradient(v), "masked": masked}


def flow_matching_loss(
    student: Velocity, x0: Latents, noise: Latents, t: Time | Float[Array, "B T"]
) -> tuple[Float[Array, " B"], Terms]:
    """mean‖v(x_t, t) - (noise - x0)‖² over a sample's elements."""
    error, terms = velocity_error(student, x0, noise, t)
    return jnp.square(error).mean(axis=tuple(range(1, x0.ndim))), terms
