"""Losses of causal training (arXiv 2606.25473), in rectified flow: teacher forcing, diffusion forcing, self forcing.

Most of it is what bidirectional training has, on networks that are bound to a context. With
`forced = network.forced_velocity(params, text, context)`, teacher-forced sCM is `rf_scm_loss` and teacher-forced dCM
`dcm_loss(…, noisy=rf_noisy)` of such networks; self forcing is `dmd_loss(…, noisy=rf_noisy)` on the video of
`self_rollout`, and its critic `flow_matching_loss`. This file has what is left: the weighted diffusion loss and the
times of diffusion forcing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rcm_jax.chunks import Spans
from rcm_jax.flow import TimeSampler
from rcm_jax.losses.diffusion import velocity_error
from rcm_jax.losses.samples import Terms
from rcm_jax.types import Latents, Time, Velocity

WEIGHTINGS = ("none", "gaussian_bell")
DF_TIMES = ("independent", "shared", "fopp")


def time_weight(t: Array, weighting: str) -> Array:
    """w(t) = exp(-2 (t - 1/2)²) - exp(-1/2), which is 0 at both ends ("gaussian_bell"), or 1 ("none")."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"{weighting=} must be one of {WEIGHTINGS}")
    return jnp.ones_like(t) if weighting == "none" else jnp.exp(-2 * jnp.square(t - 0.5)) - np.exp(-0.5)


def forcing_loss(
    student: Velocity,
    x0: Latents,
    noise: Latents,
    t: Time | Float[Array, "B T"],
    *,
    weighting: str = "none",
    scale: float = 100.0,
) -> tuple[Float[Array, " B"], Terms]:
    """scale · Σ_frames w(t) mean‖v(x_t, t) - (noise - x0)‖², t one a sample (`tf`) or a latent frame (`df`)."""
    t = jnp.broadcast_to(t[:, None] if t.ndim == 1 else t, x0.shape[:2])
    error, terms = velocity_error(student, x0, noise, t)
    loss = scale * (time_weight(t, weighting) * jnp.square(error).mean(axis=(2, 3, 4))).sum(axis=1)
    return loss, terms


def over_frames(times: Float[Array, "B chunks"], spans: Spans) -> Float[Array, "B T"]:
    """One time a chunk to one a latent frame."""
    return jnp.repeat(times, np.array([b - a for a, b in spans]), axis=1, total_repeat_length=spans[-1][1])


def fopp_times(
    sampler: TimeSampler,
    anchor: Int[Array, " B"],
    anchor_t: Float[Array, " B"],
    exp_left: Float[Array, "B chunks"],
    exp_right: Float[Array, "B chunks"],
) -> Float[Array, "B chunks"]:
    """Non-decreasing times whose chunk `anchor` has `anchor_t` (FoPP: AR-Diffusion, arXiv 2503.07418).

    In the sampler's CDF space the chunks before the anchor are the order statistics of as many uniform draws on
    [0, u], those after it on [u, 1]. Cumulated Exp(1) draws over their sum are such order statistics.
    """
    chunks = exp_left.shape[1]
    u = sampler.cdf(anchor_t)[:, None]
    index, anchor = jnp.arange(chunks)[None], anchor[:, None]

    def ordered(draws: Array, count: Array) -> Array:
        cumulated = jnp.cumsum(draws, axis=1)
        return cumulated / jnp.take_along_axis(cumulated, count, axis=1)

    after = jnp.take_along_axis(ordered(exp_right, chunks - 1 - anchor), jnp.maximum(index - anchor - 1, 0), axis=1)
    u_all = jnp.where(index < anchor, u * ordered(exp_left, anchor), jnp.where(index > anchor, u + (1 - u) * after, u))
    return sampler.icdf(u_all)


def df_times(strategy: str, sampler: TimeSampler, key: Array, batch: int, chunks: int) -> Float[Array, "B chunks"]:
    """Times of diffusion forcing, one a chunk: "independent", "shared" by a video's chunks, or "fopp"."""
    if strategy == "independent":
        times = sampler.sample(key, (batch, chunks))
    elif strategy == "shared":
        times = jnp.broadcast_to(sampler.sample(key, (batch, 1)), (batch, chunks))
    elif strategy == "fopp":
        key_t, key_anchor, key_left, key_right = jax.random.split(key, 4)
        left, right = (jax.random.exponential(k, (batch, chunks)) for k in (key_left, key_right))
        anchor = jax.random.randint(key_anchor, (batch,), 0, chunks)
        times = fopp_times(sampler, anchor, sampler.sample(key_t, (batch,)), left, right)
    else:
        raise ValueError(f"times of diffusion forcing {strategy!r} must be one of {DF_TIMES}")
    return times
