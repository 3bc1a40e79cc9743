"""Distribution matching (DMD2, arXiv 2405.14867): the student's videos must look like the teacher's to a score.

A fake score follows the student (`critic_loss`); the student moves against the difference between it and the teacher
(`dmd_loss`). The student's videos come from a backward simulation of its own sampler.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from rcm_jax.flow import expand, trig_noisy
from rcm_jax.losses.consistency import Terms, not_finite, sample_sum
from rcm_jax.types import Latents, Time

Denoiser = Callable[[Latents, Time], Latents]

FIXED_TIMES = (1.5, 1.4, 1.0)  # the sampler's own middle times, for `dmd_fixed_times`


def simulation_times(draws: Float[Array, "n B"]) -> Float[Array, "n+1 B"]:
    """theta_0 = pi/2, then theta_i = min(draw_i, theta_{i-1}): a falling schedule from independent draws."""
    start = jnp.full_like(draws[:1], jnp.pi / 2)
    return jax.lax.cummin(jnp.concatenate([start, draws]), axis=0)


def fixed_simulation_times(batch: int, dtype=jnp.float32) -> Float[Array, "4 B"]:
    """The sampler's times instead of draws."""
    return jnp.broadcast_to(jnp.asarray((jnp.pi / 2, *FIXED_TIMES), dtype)[:, None], (1 + len(FIXED_TIMES), batch))


def simulate(
    denoiser: Denoiser,
    noise: Latents,
    times: Float[Array, "n B"],
    step_noises: Float[Array, "n-1 B T H W C"],
    num_steps: Int[Array, ""] | int,
) -> tuple[Latents, Time]:
    """Runs the student's sampler from pure noise up to, not including, its last of `num_steps` (1..n) steps.

    Returns that step's input and time (z, theta): the caller takes x0 = denoiser(z, theta) with or without gradient.
    `num_steps` may be traced; then the loop has no reverse-mode derivative, and needs none.
    """

    def body(i, z):
        return trig_noisy(denoiser(z, times[i]), step_noises[i], times[i + 1]).astype(z.dtype)

    return jax.lax.fori_loop(0, num_steps - 1, body, noise), times[num_steps - 1]


def dmd_loss(
    x0: Latents,
    fake: Denoiser,
    teacher: Denoiser,
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
    weight = jnp.abs(video - x0_teacher).mean(axis=tuple(range(1, x0.ndim)))
    weight = jnp.maximum(weight, 1e-5)
    direction = (x0_fake - x0_teacher) / expand(weight, x0)
    masked = not_finite(x0, direction)
    keep = expand(~masked, x0)
    x0, target = jnp.where(keep, x0, 0), jnp.where(keep, video - direction, 0)
    return sample_sum(jnp.square(x0 - target)), {
        "G_x0": video, "D_xt": z, "x0_fake": x0_fake, "x0_teacher": x0_teacher, "weight_factor": weight,
        "grad_field": direction, "masked": masked,
    }  # fmt: skip


def critic_loss(x0: Latents, fake: Denoiser, noise: Latents, theta: Time) -> tuple[Float[Array, " B"], Terms]:
    """‖x0 - x0_fake‖²/sin²(theta) on a video of the student (no gradient to it) noised to theta."""
    x0 = stop_gradient(x0)
    z = trig_noisy(x0, noise, theta)
    x0_fake = fake(z, theta)
    masked = not_finite(x0_fake, x0)
    difference = jnp.where(expand(~masked, x0), x0 - x0_fake, 0)
    loss = sample_sum(jnp.square(difference)) / jnp.square(jnp.sin(theta))
    return loss, {"G_x0": x0, "D_xt": z, "x0_fake": stop_gradient(x0_fake), "masked": masked}
