"""Consistency losses: the student's output must not change along the teacher's trajectory.

sCM (arXiv 2410.11081, rCM arXiv 2510.08431) takes the step between neighbours to zero and needs the derivative of the
student along the trajectory, one `jax.jvp`; dCM keeps a finite step. Networks are callables on latents [B, T, H, W, C]
and times [B]; losses come back per sample [B], with the fields they were made of.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from rcm_jax.flow import Network, expand, rf_noisy, shift_time, trig_noisy
from rcm_jax.losses.samples import Terms, not_finite, only_kept, sample_sum
from rcm_jax.types import Latents, Time, Velocity

NORM_OFFSET = 0.1  # c in g / (‖g‖ + c)


def consistency_loss(F: Latents, g: Latents, scale: float) -> tuple[Float[Array, " B"], Terms]:
    """scale · ‖F - sg F - g/(‖g‖ + 0.1)‖², whose gradient in F is -2 scale times the normalised tangent.

    A sample with a non-finite g or F has zero loss and zero gradient at F; `masked` says which.
    """
    masked = not_finite(F, g)
    F, g = only_kept(masked, F, g)
    norm = expand(jnp.sqrt(sample_sum(jnp.square(g))), g)
    g = g / (norm + NORM_OFFSET)
    loss = scale * sample_sum(jnp.square(F - stop_gradient(F) - g))
    return loss, {"g_normalised": g, "masked": masked, "g_norm": norm.reshape(-1)}


def scm_loss(
    student: Network,
    teacher: Network,
    x0: Latents,
    noise: Latents,
    theta: Time,
    *,
    warmup: Float[Array, ""] | float,
    scale: float = 100.0,
) -> tuple[Float[Array, " B"], Terms]:
    """sCM in TrigFlow: student and teacher (guided) are (z, theta) -> F.

    z = cos x0 + sin noise; tangents dz = cos·sin·F_teacher, dtheta = cos·sin, so that tF = cos·sin·dF/dtheta stays
    bounded (rCM eq. 9; sCM section 5.1):

        g = -cos √(1 - r² sin²) (sg F - F_teacher) - (r cos sin z + tF)

    with r = warmup in [0, 1]. As in the published code r does not scale tF. One pass gives F, its derivative and,
    under jax.grad, the parameters' gradient: only F carries one, tF is cut.
    """
    c, s = jnp.cos(expand(theta, x0)), jnp.sin(expand(theta, x0))
    r = jnp.asarray(warmup, x0.dtype)
    z = trig_noisy(x0, noise, theta)
    F_teacher = stop_gradient(teacher(z, theta))
    t_z, t_theta = c * s * F_teacher, jnp.cos(theta) * jnp.sin(theta)
    F, t_F = jax.jvp(student, (z, theta), (t_z, t_theta))
    t_F, F_sg = stop_gradient(t_F), stop_gradient(F)
    g = -c * jnp.sqrt(1 - jnp.square(r * s)) * (F_sg - F_teacher) - (r * c * s * z + t_F)
    loss, terms = consistency_loss(F, g, scale)
    df_dt = -c * (F_sg - F_teacher) - (s * z + t_F)  # the untempered tangent, a diagnostic of convergence
    return loss, terms | {
        "xt": z, "F_teacher": F_teacher, "F_theta": F_sg, "t_F": t_F, "t_xt": t_z, "t_time": t_theta,
        "g_pre_norm": g, "df_dt": df_dt, "warmup_ratio": r,
    }  # fmt: skip


def rf_scm_loss(
    student: Velocity,
    teacher: Velocity,
    x0: Latents,
    noise: Latents,
    t: Time,
    *,
    warmup: Float[Array, ""] | float,
    scale: float = 100.0,
) -> tuple[Float[Array, " B"], Terms]:
    """sCM in rectified flow: student and teacher are (x_t, t) -> v; tangents (v_teacher, 1).

    g = -(sg v - v_teacher) - r·t·tv, then normalised as in TrigFlow.
    """
    x_t = rf_noisy(x0, noise, t)
    v_teacher = stop_gradient(teacher(x_t, t))
    v, t_v = jax.jvp(student, (x_t, t), (v_teacher.astype(x_t.dtype), jnp.ones_like(t)))
    v_sg, t_v = stop_gradient(v), stop_gradient(t_v)
    r = jnp.asarray(warmup, x0.dtype)
    g = -(v_sg - v_teacher) - r * expand(t, x0) * t_v
    loss, terms = consistency_loss(v, g, scale)
    return loss, terms | {
        "xt": x_t, "v_teacher": v_teacher, "v_theta": v_sg, "t_v": t_v, "g_pre_norm": g, "warmup_ratio": r,
    }  # fmt: skip


def dcm_times(u: Time, *, total_steps: int, skip: int, shift: float) -> Float[Array, "k+1 B"]:
    """RF times t_0 > … > t_k of a dCM step: shift(1 - u - j/N) for j = 0..k, u in [0, 1 - k/N]."""
    j = jnp.arange(skip + 1, dtype=u.dtype)[:, None]
    return shift_time(1 - (u[None] + j / total_steps), shift)


def dcm_loss(
    student: Network,
    teacher: Network,
    x0: Latents,
    noise: Latents,
    times: Float[Array, "k+1 B"],
    *,
    scale: float = 100.0,
    noisy: Callable[[Latents, Latents, Time], Latents] = trig_noisy,
) -> tuple[Float[Array, " B"], Terms]:
    """Discrete consistency: student is (z, theta) -> x0, teacher (guided) is (z, theta) -> F.

    The teacher walks theta_0 → theta_k by Euler steps z ← z - (theta_j - theta_{j+1}) F;
    loss = scale · ‖x0_student(z_0, theta_0) - sg x0_student(z_k, theta_k)‖².
    With `noisy=rf_noisy` the same in rectified flow: RF times, and a teacher (x_t, t) -> v.
    """
    z = noisy(x0, noise, times[0])
    prediction = student(z, times[0])
    z_k = z
    for theta, theta_next in zip(times[:-1], times[1:], strict=True):
        z_k = z_k - expand(theta - theta_next, z_k) * teacher(z_k, theta)
    z_k = stop_gradient(z_k)
    target = stop_gradient(student(z_k, times[-1]))
    masked = not_finite(prediction, target, z_k)
    prediction, target = only_kept(masked, prediction, target)
    loss = scale * sample_sum(jnp.square(prediction - target))
    return loss, {
        "xt": z, "xk": z_k, "x0_pred": stop_gradient(prediction), "x0_target": target, "masked": masked,
    }  # fmt: skip
