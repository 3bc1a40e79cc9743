"""The teacher's samplers: Euler, DPM-Solver++(2M) and UniPC on the probability-flow ODE of a velocity network.

All three are exponential integrators in the half log-SNR lambda = ln(alpha/sigma), with alpha = 1 - sigma for rectified
flow (sigma, the noise level of the papers, is the RF time here), written for the data prediction d = x - sigma v:

    x(t) = sigma_t/sigma_s x(s) + sigma_t * integral of e^lambda d(lambda) from lambda_s to lambda_t.

They differ in how they extend d over a step from the predictions they have. So every step is a linear combination of
the state and the last three predictions, and its weights depend on the schedule alone: they are computed ahead, in
float64 numpy (`SOLVERS`), and the steps run as one scan over the rows of that table, which compiles the network once.

Sources: DPM-Solver++ (arXiv 2211.01095, Algorithm 2), UniPC (arXiv 2302.04867, UniP-p and UniC-p for data prediction).
Guidance is the caller's: pass `flow.guided(cond, uncond, w)` as the velocity.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcm_jax.flow import shift_time, sigma_to_rf, unshift_time
from rcm_jax.types import Latents, Velocity

# --- schedules ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Where the solver stands and what the network is told; noise first.

    sigmas: RF times of the solver, one more than there are steps, strictly falling within [0, 1].
    times: RF times fed to the network, one a step. Apart from sigmas only where a convention rounds them.
    Plain floats, so that a schedule can be compared, hashed and passed as a static argument.
    """

    sigmas: tuple[float, ...]
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.times) < 1 or len(self.sigmas) != len(self.times) + 1:
            raise ValueError(f"{len(self.sigmas)=} must be one more than {len(self.times)=}, which must be at least 1")
        if not (self.sigmas[0] <= 1 and self.sigmas[-1] >= 0 and np.all(np.diff(self.sigmas) < 0)):
            raise ValueError(f"sigmas={self.sigmas} must fall strictly, from at most 1 to at least 0")

    @property
    def num_steps(self) -> int:
        return len(self.times)


def rcm_times(
    num_steps: int, shift: float = 5.0, sigma_max: float = 5000.0, *, dtype: type[np.floating] = np.float64
) -> Schedule:
    """rCM's convention: `num_steps` shifted times from sigma_max/(sigma_max + 1), real-valued for network and solver.

    dtype: the precision in which they are worked out. The published UniPC sampler takes float64, the published Euler
    sampler float32, which moves its times by up to 1.5e-7.
    """
    _check_steps(num_steps)
    start = dtype(unshift_time(sigma_to_rf(sigma_max), shift))
    step, i = start / dtype(num_steps), np.arange(num_steps, dtype=dtype)
    # Counted from the nearer end, as torch.linspace does: only so do the float32 digits agree with the published ones.
    even = np.where(i < (num_steps + 1) // 2, start - step * i, step * (num_steps - i))
    sigmas = shift_time(even, shift).tolist()
    return Schedule(sigmas=(*sigmas, 0.0), times=tuple(sigmas))


def wan_times(num_steps: int, shift: float = 5.0, *, solver: str = "unipc") -> Schedule:
    """Official Wan2.1's convention: the network sees integer timesteps floor(1000 sigma), the solver unrounded sigmas.

    Wan starts DPM++ at pure noise and every other solver at the last of 1000 training times, 0.999 (in float32, whose
    last digits decide some of the integers), before shifting.
    """
    _check_steps(num_steps)
    _solver(solver)
    start = 1.0 if solver == "dpm++" else float(np.float32(0.999))
    sigmas = shift_time(np.linspace(start, 0.0, num_steps + 1)[:-1], shift)
    timesteps = np.trunc(1000 * sigmas)
    return Schedule(sigmas=(*sigmas.tolist(), 0.0), times=tuple((timesteps / 1000).tolist()))


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"{num_steps=} must be at least 1")


# --- solvers: the weights of every step -----------------------------------------------------------------------------


class Weights(NamedTuple):
    """Row i belongs to the step from sigma_i to sigma_{i+1}; d_i is the data prediction at sigma_i.

    correct: of (x_i as predicted, x_{i-1} as corrected, d_i, d_{i-1}, d_{i-2}); gives the corrected x_i.
    predict: of (corrected x_i, d_i, d_{i-1}); gives x_{i+1}. Predictions before the first have weight 0.
    """

    correct: Float[np.ndarray, "n 5"]
    predict: Float[np.ndarray, "n 3"]


def half_log_snr(sigma: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """lambda = ln(alpha/sigma), which is -inf at sigma = 1 and +inf at 0: both are limits that the solvers take."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigma) - np.log(sigma)


def _uncorrected(num_steps: int) -> Float[np.ndarray, "num_steps 5"]:
    return np.tile([1.0, 0, 0, 0, 0], (num_steps, 1))


def euler(sigmas: Float[np.ndarray, " n+1"]) -> Weights:
    """x' = x + (sigma' - sigma) v with v = (x - d)/sigma."""
    ratio = sigmas[1:] / sigmas[:-1]
    return Weights(_uncorrected(len(ratio)), np.stack([ratio, 1 - ratio, 0 * ratio], axis=1))


def dpmpp(sigmas: Float[np.ndarray, " n+1"]) -> Weights:
    """DPM-Solver++(2M), Algorithm 2; the first step and the last ("lower order final") are of first order (DDIM)."""
    n, lam = len(sigmas) - 1, half_log_snr(sigmas)
    predict = np.zeros((n, 3))
    for i in range(n):
        h = lam[i + 1] - lam[i]
        keep, gain = sigmas[i + 1] / sigmas[i], -(1 - sigmas[i + 1]) * np.expm1(-h)
        if i in (0, n - 1):
            predict[i] = keep, gain, 0
        else:  # D = (1 + 1/(2r)) d_i - 1/(2r) d_{i-1},  x' = sigma'/sigma x - alpha' (e^{-h} - 1) D
            r = (lam[i] - lam[i - 1]) / h
            predict[i] = keep, gain * (1 + 0.5 / r), gain * (-0.5 / r)
    return Weights(_uncorrected(n), predict)


def unipc(sigmas: Float[np.ndarray, " n+1"]) -> Weights:
    """UniPC-2 with B_2(h) = e^{-h} - 1: UniP-2 predicts, UniC corrects by the prediction at the state just reached.

    UniP-2 takes a_1 = 1/2, which makes it DPM-Solver++(2M), lower orders at both ends included. The state at the last
    sigma is not corrected: that would cost a network call.
    """
    n, lam = len(sigmas) - 1, half_log_snr(sigmas)
    correct = _uncorrected(n)
    for i in range(1, n):
        h = lam[i] - lam[i - 1]
        keep, gain = sigmas[i] / sigmas[i - 1], -(1 - sigmas[i]) * np.expm1(-h)
        if i == 1:  # UniC-1 with a_1 = 1/2:  d_{i-1} + a_1 (d_i - d_{i-1})
            correct[i] = 0, keep, gain * 0.5, gain * 0.5, 0
        else:  # UniC-2:  d_{i-1} + a_1/r_1 (d_{i-2} - d_{i-1}) + a_2 (d_i - d_{i-1}), as r_2 = 1
            r = (lam[i - 2] - lam[i - 1]) / h
            a1, a2 = _unic_coefficients(r, h)
            correct[i] = 0, keep, gain * a2, gain * (1 - a1 / r - a2), gain * (a1 / r)
    return Weights(correct, dpmpp(sigmas).predict)


def _unic_coefficients(r: float, h: float) -> tuple[float, float]:
    """a of UniC-2 for data prediction: R a = b with rows r^0 and r^1 over the nodes (r, 1).

    b_k = k! z phi_{k+1}(z)/B(h) at z = -h, with phi_1 = (e^z - 1)/z and z phi_{k+1} = phi_k - 1/k!.
    Written so that h = inf and r = -inf, which a schedule from sigma = 1 has, give the limits and not NaN.
    """
    z, B = -h, np.expm1(-h)
    phi_1 = B / z
    phi_2 = (phi_1 - 1) / z
    b1, b2 = (phi_1 - 1) / B, 2 * (phi_2 - 0.5) / B
    a1 = (b2 - b1) / (r - 1)
    return a1, b1 - a1


SOLVERS: dict[str, Callable[[np.ndarray], Weights]] = {"euler": euler, "unipc": unipc, "dpm++": dpmpp}


def _solver(name: str) -> Callable[[np.ndarray], Weights]:
    if name not in SOLVERS:
        raise ValueError(f"solver={name!r} must be one of {sorted(SOLVERS)}")
    return SOLVERS[name]


# --- the loop -------------------------------------------------------------------------------------------------------


def sample_ode(
    velocity: Velocity,
    noise: Latents,
    *,
    schedule: Schedule,
    solver: str = "unipc",
    trajectory: bool = False,
    loop: Callable = jax.lax.scan,
) -> Latents | Float[Array, "n+1 B T H W C"]:
    """Integrates dx = v(x, t) dt from noise along a schedule: one network call a step.

    velocity: (x_t [B, T, H, W, C], t [B]) -> v; t is the schedule's time for the network, in [0, 1].
    noise: [B, T, H, W, C], the state at the schedule's first sigma, as it is. The state keeps its precision, float32
        at least.
    solver: "euler", "unipc" or "dpm++"; another name raises ValueError.
    trajectory: also gives the states on the way: [n+1, B, T, H, W, C], noise first, before any later correction,
        which is how the network sees them.
    loop: runs the steps, with scan's arguments; a loop of the host calls `velocity` with numbers for t.
    """
    weights = _solver(solver)(np.array(schedule.sigmas))
    x = noise.astype(jnp.promote_types(noise.dtype, jnp.float32))
    table = [jnp.asarray(a, x.dtype) for a in (schedule.sigmas[:-1], schedule.times, *weights)]

    def step(carry: tuple[Latents, ...], row: list[Array]) -> tuple[tuple[Latents, ...], Latents | None]:
        x, x_last, d1, d2 = carry
        sigma, time, c, p = row
        d0 = x - sigma * velocity(x, jnp.broadcast_to(time, x.shape[:1])).astype(x.dtype)
        x = c[0] * x + c[1] * x_last + c[2] * d0 + c[3] * d1 + c[4] * d2
        x_next = p[0] * x + p[1] * d0 + p[2] * d1
        return (x_next, x, d0, d1), x_next if trajectory else None

    # The history does not exist yet: any finite arrays serve, as the first rows give them weight 0.
    (final, *_), states = loop(step, (x, x, x, x), table)
    return jnp.concatenate([x[None], states]) if trajectory else final
