"""The distilled student's sampler: one to four steps of "denoise, then noise again".

Each step asks the student for clean data and puts it back on the noise schedule with fresh noise, at a lower time:

    x0 = x - t v(x, t),   x <- (1-t') x0 + t' eps'                     (RF, the inference form)
    x0 = trig_denoiser(z, theta),   z <- cos(theta') x0 + sin(theta') eps'   (TrigFlow, the training-time validation)

The two forms agree up to how they scale the first noise: RF starts from t_0 eps, which is x_t with x0 = 0; TrigFlow
starts from eps itself, hence from eps/(cos + sin) at the network (0.98773 against 0.98765 at sigma_max = 80).
Source: rCM (arXiv 2510.08431), section on sampling, and its published inference script.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcm_jax.flow import expand, rf_noisy, trig_denoiser, trig_noisy
from rcm_jax.types import Latents, Time, Velocity

MIDDLE = (1.5, 1.4, 1.0)  # TrigFlow times between the first step and the data, chosen by rCM for visual quality

StepNoises = Float[Array, "n B T H W C"] | Iterable[Latents]


def few_step_times(
    num_steps: int, sigma_max: float = 80.0, middle: Sequence[float] = MIDDLE
) -> Float[np.ndarray, " num_steps+1"]:
    """RF times of the steps, noise first, the last one 0; float64 numpy, so that no digit depends on JAX's settings.

    `sigma_max` is the noise-to-signal ratio of the first step (80; 120 and 1600 are used at higher resolutions);
    `middle` are TrigFlow times in radians, of which the first num_steps - 1 are used.
    Raises ValueError for a `num_steps` that `middle` cannot serve.
    """
    theta = _trig_times(num_steps, sigma_max, middle)
    return np.sin(theta) / (np.cos(theta) + np.sin(theta))


def sample_few_step(
    velocity: Velocity,
    noise: Latents,
    *,
    key: Array | None = None,
    step_noises: StepNoises | None = None,
    num_steps: int = 4,
    sigma_max: float = 80.0,
    middle: Sequence[float] = MIDDLE,
    loop: Callable = jax.lax.scan,
) -> Latents:
    """Draws latents from a distilled student: `num_steps` network calls in rectified-flow form.

    velocity: (x_t [B, T, H, W, C], t [B]) -> v, t being the RF time in [0, 1].
    noise: standard normal, [B, T, H, W, C]. The state keeps its precision, float32 at least.
    key: draws the noise between the steps; step i's depends on the key and on i alone.
    step_noises: that noise itself instead, num_steps - 1 arrays like `noise` (one more, for the step to t = 0, is
        let through and not used). One of the two is needed when num_steps > 1.
    loop: runs the steps, with scan's arguments; a loop of the host calls `velocity` with numbers for t.
    Raises ValueError for a wrong `num_steps`, for both or neither source of noise, and for a wrong count of noises.
    """
    times = few_step_times(num_steps, sigma_max, middle)
    x, eps = _noises(noise, key, step_noises, num_steps)
    t = jnp.asarray(times, x.dtype)

    def denoise(x: Latents, t: Time) -> Latents:
        return x - expand(t, x) * velocity(x, t).astype(x.dtype)

    return _alternate(denoise, rf_noisy, t[0] * x, t, eps, loop)


def sample_few_step_trig(
    velocity: Velocity,
    noise: Latents,
    *,
    key: Array | None = None,
    step_noises: StepNoises | None = None,
    num_steps: int = 4,
    sigma_max: float = 80.0,
    middle: Sequence[float] = MIDDLE,
) -> Latents:
    """`sample_few_step` in TrigFlow form, as rCM samples when it validates during training. Same arguments."""
    # Rounded to float32 whatever the state is: that is what the published validation does, and the network sees it.
    times = _trig_times(num_steps, sigma_max, middle).astype(np.float32)
    z, eps = _noises(noise, key, step_noises, num_steps)
    theta = jnp.asarray(times, z.dtype)
    denoiser = trig_denoiser(velocity)
    return _alternate(lambda z, theta: denoiser(z, theta).astype(z.dtype), trig_noisy, z, theta, eps)


def _trig_times(num_steps: int, sigma_max: float, middle: Sequence[float]) -> Float[np.ndarray, " num_steps+1"]:
    if not 1 <= num_steps <= len(middle) + 1:
        raise ValueError(f"{num_steps=} must be 1..{len(middle) + 1}: one more than the middle times {tuple(middle)}")
    return np.array([math.atan(sigma_max), *middle[: num_steps - 1], 0.0])


def _noises(
    noise: Latents, key: Array | None, step_noises: StepNoises | None, num_steps: int
) -> tuple[Latents, Float[Array, "num_steps B T H W C"]]:
    """The first noise in the state's precision, and one noise a step; the last step goes to t' = 0 and gets zeros."""
    noise = noise.astype(jnp.promote_types(noise.dtype, jnp.float32))
    fresh = num_steps - 1
    if fresh < 1:
        return noise, jnp.zeros_like(noise)[None]
    if (key is None) == (step_noises is None):
        raise ValueError(f"{num_steps=} needs noise between the steps: give either key= or step_noises=")
    if step_noises is not None:
        eps = [jnp.asarray(e, noise.dtype) for e in step_noises]
        if len(eps) not in (fresh, fresh + 1) or any(e.shape != noise.shape for e in eps):
            shapes = [e.shape for e in eps]
            raise ValueError(f"step_noises of shapes {shapes} must be {fresh} (or {fresh + 1}) arrays of {noise.shape}")
        eps = jnp.stack(eps[:fresh])
    else:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(fresh))
        eps = jax.vmap(lambda k: jax.random.normal(k, noise.shape, noise.dtype))(keys)
    return noise, jnp.concatenate([eps, jnp.zeros_like(noise)[None]])


def _alternate(
    denoise: Callable[[Latents, Time], Latents],
    renoise: Callable[[Latents, Latents, Time], Latents],
    x: Latents,
    times: Float[Array, " n+1"],
    noises: Float[Array, "n B T H W C"],
    loop: Callable = jax.lax.scan,
) -> Latents:
    """x <- renoise(denoise(x, t), eps', t') down the list of times; a scan compiles the network once."""

    def step(x: Latents, inputs: tuple[Array, Array, Latents]) -> tuple[Latents, None]:
        t, t_next, eps = inputs
        x0 = denoise(x, jnp.broadcast_to(t, x.shape[:1]))
        return renoise(x0, eps, t_next), None

    return loop(step, x, (times[:-1], times[1:], noises))[0]
