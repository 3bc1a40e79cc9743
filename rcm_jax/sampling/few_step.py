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
from jaxtyping import Array, Float, Int

from rcm_jax.flow import RF, TRIG, Form, Network, trig_noisy
from rcm_jax.types import Latents, Time, Velocity

MIDDLE = (1.5, 1.4, 1.0)  # TrigFlow times between the first step and the data, chosen by rCM for visual quality

StepNoises = Float[Array, "n B T H W C"] | Iterable[Latents]


def next_state(
    denoise: Network,
    noisy: Callable[[Latents, Latents, Time], Latents],
    x: Latents,
    t: Time,
    t_next: Time,
    eps: Latents,
) -> Latents:
    """One step of a distilled student, in every sampler and in either form: denoise, then noise again."""
    return noisy(denoise(x, t), eps, t_next).astype(x.dtype)


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
    return _alternate(RF, velocity, t[0] * x, t, eps, loop)


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
    return _alternate(TRIG, velocity, z, jnp.asarray(times, z.dtype), eps)


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
    form: Form,
    velocity: Velocity,
    x: Latents,
    times: Float[Array, " n+1"],
    noises: Float[Array, "n B T H W C"],
    loop: Callable = jax.lax.scan,
) -> Latents:
    """`next_state` down the list of times; a scan compiles the network once."""
    denoiser = form.denoiser(velocity)

    def step(x: Latents, inputs: tuple[Array, Array, Latents]) -> tuple[Latents, None]:
        t, t_next, eps = inputs
        return next_state(
            lambda x, t: denoiser(x, jnp.broadcast_to(t, x.shape[:1])), form.noisy, x, t, t_next, eps
        ), None

    return loop(step, x, (times[:-1], times[1:], noises))[0]


# --- the sampler as training simulates it (rCM: backward simulation) ------------------------------------------------


def simulation_times(draws: Float[Array, "n B"], start: float = math.pi / 2) -> Float[Array, "n+1 B"]:
    """theta_0 = start, then theta_i = min(draw_i, theta_{i-1}): a falling schedule from independent draws."""
    first = jnp.full((1, draws.shape[1]), start, draws.dtype)
    return jax.lax.cummin(jnp.concatenate([first, draws]), axis=0)


def fixed_simulation_times(batch: int, t_range: tuple[float, float] = (0.0, 1.0)) -> Float[Array, "n B"]:
    """The sampler's own times instead of draws: those in a range of RF times."""
    times = jnp.asarray(sampler_times(t_range), jnp.result_type(float))
    return jnp.broadcast_to(times[:, None], (len(times), batch))


def sampler_times(t_range: tuple[float, float] = (0.0, 1.0)) -> tuple[float, ...]:
    """TrigFlow times of the sampler's steps from pure noise whose RF times lie in a range; what lies at its upper end
    belongs to the range above, if there is one."""
    (low, high), start = t_range, (math.pi / 2, *MIDDLE)
    times = zip(start, few_step_times(len(start), math.inf)[:-1], strict=True)
    return tuple(theta for theta, t in times if low <= t and (t < high or high == 1))


def simulate(
    denoiser: Network,
    noise: Latents,
    times: Float[Array, "n B"],
    step_noises: Float[Array, "n-1 B T H W C"],
    num_steps: Int[Array, ""] | int,
) -> tuple[Latents, Time]:
    """Runs the student's sampler in TrigFlow up to, not including, its last of `num_steps` (1..n) steps.

    Returns that step's input and time (z, theta): the caller takes x0 = denoiser(z, theta) with or without gradient.
    `num_steps` may be traced; then the loop has no reverse-mode derivative, and needs none.
    """

    def body(i, z):
        return next_state(denoiser, trig_noisy, z, times[i], times[i + 1], step_noises[i])

    return jax.lax.fori_loop(0, num_steps - 1, body, noise), times[num_steps - 1]
