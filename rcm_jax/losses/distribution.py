"""Distribution matching (DMD2, arXiv 2405.14867): the student's videos must look like the teacher's to a score.

A fake score follows the student (`critic_loss`); the student moves against the difference between it and the teacher
(`dmd_loss`). The student's videos come from its own sampler, simulated: `sampling.few_step.simulate`, or under self
forcing `sampling.self_rollout`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from rcm_jax.flow import Network, expand, trig_noisy
from rcm_jax.losses.samples import Terms, not_finite, only_kept, sample_sum
from rcm_jax.types import Latents, Time


def dmd_loss(
    x0: Latents,
    fake: Network,
    teacher: Network,
    noise: Latents,
    theta: Time,
    *,
    noisy: Callable[[Latents, Latents, Time], Latents] = trig_noisy,
) -> tuple[Float[Array, " B"], Terms]:
    """‖x0 - sg(x0 - d)‖² with d = (x0_fake - x0_teacher)/w, w = max(mean|x0 - x0_teacher|, 1e-5) per sample.

    x0 is the student's video, with gradient; fake and teacher (guided) are (z, theta) -> x0, asked at x0 noised to
    theta. The gradient in x0 is 2 d. Samples with a non-finite element have zero loss and gradient.
    With `noisy=rf_noisy` the same in rectified flow, theta being RF time.
    """
    video = stop_gradient(x0)
    z = noisy(video, noise, theta)
    x0_fake, x0_teacher = stop_gradient(fake(z, theta)), stop_gradient(teacher(z, theta))
    masked = not_finite(x0, x0_fake, x0_teacher)
    x0, video, x0_fake, x0_teacher = only_kept(masked, x0, video, x0_fake, x0_teacher)
    weight = jnp.abs(video - x0_teacher).mean(axis=tuple(range(1, x0.ndim)))
    weight = jnp.maximum(weight, 1e-5)
    direction = (x0_fake - x0_teacher) / expand(weight, x0)
    loss = sample_sum(jnp.square(x0 - (video - direction)))
    return loss, {
        "G_x0": video, "D_xt": z, "x0_fake": x0_fake, "x0_teacher": x0_teacher, "weight_factor": weight,
        "grad_field": direction, "masked": masked,
    }  # fmt: skip


def critic_loss(x0: Latents, fake: Network, noise: Latents, theta: Time) -> tuple[Float[Array, " B"], Terms]:
    """‖x0 - x0_fake‖²/sin²(theta) on a video of the student (no gradient to it) noised to theta.

    Samples with a non-finite element have zero loss and gradient, and so have those at theta = 0: 0/0.
    """
    x0 = stop_gradient(x0)
    z = trig_noisy(x0, noise, theta)
    x0_fake = fake(z, theta)
    sin2 = jnp.square(jnp.sin(theta))
    masked = not_finite(x0_fake, x0) | ~(sin2 > 0)
    x0, x0_fake = only_kept(masked, x0, x0_fake)
    loss = sample_sum(jnp.square(x0 - x0_fake)) / jnp.where(masked, 1, sin2)
    return loss, {"G_x0": x0, "D_xt": z, "x0_fake": stop_gradient(x0_fake), "masked": masked}
