"""Rectified flow and TrigFlow: times, noise, the wrapper between them, time samplers and guidance.

================  ==================================  ==================================
                  RF (rectified flow)                 TrigFlow
================  ==================================  ==================================
time              t in [0, 1], 0 = data               theta in [0, pi/2], 0 = data
noisy sample      x_t = (1-t) x0 + t eps              z = cos(theta) x0 + sin(theta) eps
velocity          v = eps - x0                        F = cos(theta) eps - sin(theta) x0
denoised          x0 = x_t - t v                      x0 = cos(theta) z - sin(theta) F
================  ==================================  ==================================

The noise-to-signal ratio sigma = t/(1-t) = tan(theta) is common to both. Everything here keeps the precision it is
given and never goes below float32; the network casts for itself. Times broadcast over a sample: [B] or [B, T].
`RF` and `TRIG` hold what an algorithm needs to be written once for both columns.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

from rcm_jax.types import Latents, Text, Time, Velocity

# --- times ----------------------------------------------------------------------------------------------------------


def shift_time(u: Array, shift: float) -> Array:
    """t = s u / (1 + (s-1) u): pushes RF times towards noise for s > 1. A shift of 0 or less leaves u alone."""
    return u if shift <= 0 else shift * u / (1 + (shift - 1) * u)


def unshift_time(t: Array, shift: float) -> Array:
    """The inverse of `shift_time`."""
    return t if shift <= 0 else t / (shift - (shift - 1) * t)


def sigma_to_rf(sigma: Array) -> Array:
    return sigma / (sigma + 1)


def rf_to_sigma(t: Array) -> Array:
    """t/(1-t), finite: t is kept one machine epsilon below 1."""
    t = jnp.clip(t, 0, 1 - jnp.finfo(t.dtype).eps)
    return t / (1 - t)


def sigma_to_trig(sigma: Array) -> Array:
    return jnp.arctan(sigma)


def trig_to_sigma(theta: Array) -> Array:
    return jnp.tan(theta)


def rf_to_trig(t: Array) -> Array:
    return jnp.arctan2(t, 1 - t)  # exact at t = 1, where t/(1-t) is not


def trig_to_rf(theta: Array) -> Array:
    return jnp.sin(theta) / (jnp.cos(theta) + jnp.sin(theta))


def expand(t: Array, like: Array) -> Array:
    """Appends axes to a time ([B] or [B, T]) until it broadcasts over `like` ([B, T, H, W, C])."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


# --- noise ----------------------------------------------------------------------------------------------------------


def rf_noisy(x0: Latents, noise: Latents, t: Time) -> Latents:
    t = expand(t, x0)
    return (1 - t) * x0 + t * noise


def trig_noisy(x0: Latents, noise: Latents, theta: Time) -> Latents:
    theta = expand(theta, x0)
    return jnp.cos(theta) * x0 + jnp.sin(theta) * noise


def rf_denoiser(velocity: Velocity) -> Callable[[Latents, Time], Latents]:
    """(x_t, t) -> x0 = x_t - t v of a velocity network."""

    def x0(x: Latents, t: Time) -> Latents:
        v = velocity(x, t)
        return x - expand(t, x) * v.astype(jnp.promote_types(v.dtype, jnp.float32))

    return x0


# --- an RF network seen from TrigFlow -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrigCoefficients:
    """x0 = skip z + out net(inp z, t): the preconditioning that turns an RF network into a TrigFlow denoiser."""

    skip: Array
    out: Array
    inp: Array
    t: Array

    @classmethod
    def at(cls, theta: Array) -> "TrigCoefficients":
        c, s = jnp.cos(theta), jnp.sin(theta)
        return cls(skip=1 / (c + s), out=-s / (c + s), inp=1 / (c + s), t=s / (c + s))


def trig_denoiser(velocity: Velocity) -> Callable[[Latents, Time], Latents]:
    """(z, theta) -> x0 for an RF velocity network."""

    def x0(z: Latents, theta: Time) -> Latents:
        k = TrigCoefficients.at(theta)
        v = velocity(expand(k.inp, z) * z, k.t)
        return expand(k.skip, z) * z + expand(k.out, z) * v.astype(jnp.promote_types(v.dtype, jnp.float32))

    return x0


def trig_velocity(velocity: Velocity) -> Callable[[Latents, Time], Latents]:
    """(z, theta) -> F = (cos(theta) z - x0) / sin(theta), the TrigFlow velocity of an RF velocity network.

    With x0 = (z - sin v)/(cos + sin) the quotient reduces to F = ((cos - sin) z + v)/(cos + sin), which loses no
    digits at small theta and needs no special case at theta = 0.
    """

    def F(z: Latents, theta: Time) -> Latents:
        k = TrigCoefficients.at(theta)
        v = velocity(expand(k.inp, z) * z, k.t)
        c, s = expand(jnp.cos(theta), z), expand(jnp.sin(theta), z)
        return ((c - s) * z + v.astype(jnp.promote_types(v.dtype, jnp.float32))) / (c + s)

    return F


# --- the two forms --------------------------------------------------------------------------------------------------

Network = Callable[[Latents, Time], Latents]


@dataclasses.dataclass(frozen=True)
class Form:
    """One column of the table above: time from RF time, noisy sample, and how it sees an RF velocity network."""

    time: Callable[[Array], Array]
    noisy: Callable[[Latents, Latents, Time], Latents]
    denoiser: Callable[[Velocity], Network]
    velocity: Callable[[Velocity], Network]


RF = Form(time=lambda t: t, noisy=rf_noisy, denoiser=rf_denoiser, velocity=lambda v: v)
TRIG = Form(time=rf_to_trig, noisy=trig_noisy, denoiser=trig_denoiser, velocity=trig_velocity)


# --- time samplers --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(mean, std²); draws RF times."""

    mean: float = 0.0
    std: float = 1.0

    def from_normal(self, z: Array) -> Array:
        return sigma_to_rf(jnp.exp(z * self.std + self.mean))

    def sample(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self.from_normal(jax.random.normal(key, shape))

    def cdf(self, t: Array) -> Array:
        return ndtr((jnp.log(rf_to_sigma(t)) - self.mean) / self.std)

    def icdf(self, p: Array) -> Array:
        eps = jnp.finfo(p.dtype).eps
        return self.from_normal(ndtri(jnp.clip(p, eps, 1 - eps)))


@dataclasses.dataclass(frozen=True)
class UniformShift:
    """u ~ U[0, 1) pushed through `shift_time`; draws RF times."""

    shift: float = 1.0

    def sample(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self.icdf(jax.random.uniform(key, shape))

    def cdf(self, t: Array) -> Array:
        return unshift_time(t, self.shift)

    def icdf(self, p: Array) -> Array:
        return shift_time(p, self.shift)


@dataclasses.dataclass(frozen=True)
class Truncated:
    """Those times of a sampler that lie in [low, high]: its quantiles between the two, so that no draw is in vain."""

    sampler: LogNormal | UniformShift
    low: float
    high: float

    @property
    def ends(self) -> Float[Array, "2"]:
        return self.sampler.cdf(jnp.array([self.low, self.high]))

    def sample(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self.icdf(jax.random.uniform(key, shape))

    def cdf(self, t: Array) -> Array:
        a, b = self.ends
        return (self.sampler.cdf(jnp.clip(t, self.low, self.high)) - a) / (b - a)

    def icdf(self, p: Array) -> Array:
        a, b = self.ends
        return jnp.clip(self.sampler.icdf(a + p * (b - a)), self.low, self.high)


TimeSampler = LogNormal | UniformShift | Truncated


# --- guidance -------------------------------------------------------------------------------------------------------


def guide(cond: Latents, uncond: Latents, guidance: float) -> Latents:
    """Classifier-free guidance: uncond + w (cond - uncond)."""
    return uncond + guidance * (cond - uncond)


def guided(cond: Velocity, uncond: Velocity, guidance: float) -> Velocity:
    """A network under `guide`. For w <= 1 the unconditional pass is not run.

    Linear in the networks' outputs, so it may wrap v, F or x0 alike.
    """
    if guidance <= 1:
        return cond

    def network(x: Latents, t: Time) -> Latents:
        u = uncond(x, t)
        return guide(cond(x, t), u, guidance)

    return network


def null_rows(null_text: Float[Array, "L D"] | Text, videos: int) -> Text:
    """The unconditional (or negative) text as a network takes it: one row where it is one for all videos, or theirs.

    Raises ValueError for a text that is neither.
    """
    if null_text.ndim == 2:
        return null_text[None]
    if null_text.ndim != 3 or null_text.shape[0] != videos:
        raise ValueError(
            f"the unconditional text has shape {null_text.shape}; give [L, D], one for all videos, or "
            f"[{videos}, L, D], one for each"
        )
    return null_text


def one_a_video(null_text: Float[Array, "L D"] | Text, text: Text) -> Text:
    """`null_rows`, a row for every video of `text`."""
    rows = null_rows(null_text, text.shape[0])
    return jnp.broadcast_to(rows, (text.shape[0], *rows.shape[1:]))
