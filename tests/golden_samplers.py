"""Golden checks of the samplers, the parameter average and the time conversions; run under `jax_enable_x64`.

The samplers are driven by a linear "network" v = A x + b t (+ c s), as the reference runs were. Those kept the state
in float64 around a float32 network (rCM) or in float32 throughout (Wan): so do the checkers. Tolerances are those of
the golden manifest, kind by kind.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rcm_jax import flow
from rcm_jax.sampling.few_step import few_step_times, sample_few_step_trig
from rcm_jax.sampling.ode import rcm_times, sample_ode, wan_times
from rcm_jax.sampling.sampler import SamplerConfig, run_sampler
from rcm_jax.training.ema import ema_update, power_ema_beta, power_ema_exponent
from rcm_jax.types import Latents, Time, Velocity
from tests.golden_common import Case, Check, Checker, channels_first, channels_last

# --- the reference's linear network ---------------------------------------------------------------------------------


def linear_network(case: Case, scalar: str | None = None) -> Velocity:
    """v[c] = sum_d A[c, d] x[d] + b[c] t (+ c[c] s) in float32, s being the input named `scalar`."""
    A, b = jnp.asarray(case.weights["A"]), jnp.asarray(case.weights["b"])
    constant = case.weights["c"] * case.inputs[scalar] if scalar else np.zeros_like(case.weights["b"])

    def velocity(x: Latents, t: Time) -> Latents:
        x, t = x.astype(jnp.float32), t.astype(jnp.float32)
        bias = t[:, None] * b[None] + jnp.asarray(constant)[None]
        return jnp.einsum("bthwd,cd->bthwc", x, A) + bias[:, None, None, None, :]

    return velocity


class Recorder:
    """A velocity that keeps what it was fed, in the order of the calls, also from inside jit and scan."""

    def __init__(self, velocity: Velocity):
        self.velocity = velocity
        self._calls: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, x: Latents, t: Time) -> Latents:
        jax.debug.callback(lambda x, t: self._calls.append((np.asarray(x), np.asarray(t))), x, t, ordered=True)
        return self.velocity(x, t)

    def calls(self) -> tuple[np.ndarray, np.ndarray]:
        """All states [n, B, T, H, W, C] and all times [n, B]."""
        jax.effects_barrier()
        states, times = zip(*self._calls, strict=True)
        return np.stack(states), np.stack(times)


# --- few-step samplers ----------------------------------------------------------------------------------------------


def _few_step(case: Case, sample: Callable[..., Latents], *, timesteps_abs: float, round_time: bool) -> list[Check]:
    """`round_time`: the script rounds the RF time to float32 before it multiplies by 1000."""
    config = case.config
    noise = channels_last(case.inputs["noise"]).astype(np.float64)
    step_noises = [channels_last(case.inputs[f"step_noise_{i}"]) for i in range(config["n_step_noises"])]
    net = Recorder(linear_network(case, "cond_scalar"))
    options = {"num_steps": config["num_steps"], "sigma_max": config["sigma_max"]}
    final = jax.jit(lambda x, eps: sample(net, x, step_noises=eps, **options))(noise, step_noises)

    states, times = net.calls()
    times = (times.astype(np.float32) if round_time else times).astype(np.float64)
    want, limits = case.outputs, {"rel": 1e-6, "max_abs": 1e-5}
    return [
        Check("final", channels_first(final), want["final"], **limits),
        Check("net_inputs", channels_first(states.astype(np.float32)), want["net_inputs"], **limits),
        Check(
            "net_timesteps",
            (1000 * times).astype(np.float32)[..., None],
            want["net_timesteps"],
            rel=1e-6,
            max_abs=timesteps_abs,
        ),
    ]


def check_sampler_rcm(case: Case) -> list[Check]:
    def sample(net: Velocity, x: Array, *, step_noises: list[Array], num_steps: int, sigma_max: float) -> Latents:
        """As a pipeline runs it: start and step noises in one array, the sampler as data."""
        noise = jnp.stack([x, *step_noises[: num_steps - 1]], axis=1)
        return run_sampler(SamplerConfig("few_step", num_steps, sigma_max), net, noise)

    checks = _few_step(case, sample, timesteps_abs=1e-4, round_time=True)
    times = few_step_times(case.config["num_steps"], case.config["sigma_max"])
    return [*checks, Check("t_steps_rf_f64", times, case.outputs["t_steps_rf_f64"], rel=1e-6, max_abs=1e-5)]


def check_sampler_rcm_trig(case: Case) -> list[Check]:
    return _few_step(case, sample_few_step_trig, timesteps_abs=1e-5, round_time=False)


# --- ODE samplers ---------------------------------------------------------------------------------------------------


def check_sampler_wan(case: Case) -> list[Check]:
    config, want = case.config, case.outputs
    schedule = wan_times(config["steps"], config["shift"], solver=config["solver"])
    options = {"schedule": schedule, "solver": config["solver"], "trajectory": True}
    net = linear_network(case)
    trajectory = jax.jit(lambda x: sample_ode(net, x, **options))(channels_last(case.inputs["noise"]))
    return [
        Check("timesteps", 1000 * np.array(schedule.times), want["timesteps"], exact=True),
        Check("sigmas", np.array(schedule.sigmas), want["sigmas"], rel=2e-6, max_abs=1e-5),
        Check("traj", channels_first(trajectory), want["traj"], rel=2e-6, max_abs=1e-5),
    ]


def check_sampler_rcm_diffusion(case: Case) -> list[Check]:
    config, want = case.config, case.outputs
    solver = config["sampler"].lower()
    dtype = np.float32 if solver == "euler" else np.float64  # each published sampler's own
    schedule = rcm_times(config["num_steps"], config["shift"], config["sigma_max"], dtype=dtype)
    net = flow.guided(linear_network(case, "cond_scalar"), linear_network(case, "uncond_scalar"), config["guidance"])
    options = {"schedule": schedule, "solver": solver, "trajectory": True}
    noise = channels_last(case.inputs["noise"]).astype(np.float64)
    trajectory = channels_first(jax.jit(lambda x: sample_ode(net, x, **options))(noise))
    sampler = SamplerConfig(solver, config["num_steps"], shift=config["shift"])  # as a pipeline runs it
    final = jax.jit(lambda x: run_sampler(sampler, net, x[:, None]))(noise)
    # The reference's Euler sampler does not keep the final 0 among its sigmas; its UniPC does.
    sigmas = np.array(schedule.sigmas[: len(want["sigmas"])])
    limits = {"rel": 2e-6, "max_abs": 1e-5}
    return [
        Check("timesteps_f64", 1000 * np.array(schedule.times), want["timesteps_f64"], rel=2e-6, max_abs=1e-4),
        Check("sigmas", sigmas, want["sigmas"], **limits),
        Check("traj", trajectory, want["traj"], **limits),
        Check("final", channels_first(final), want["final"], **limits),
    ]


# --- parameter average ----------------------------------------------------------------------------------------------


def check_ema(case: Case) -> list[Check]:
    gammas = [power_ema_exponent(rate) for rate in case.inputs["rates"]]
    updates = case.inputs["iterations"] + case.config["iteration_shift"]
    betas = np.stack([power_ema_beta(updates, gamma) for gamma in gammas])
    return [
        Check("exp_coefficient_f64", np.array(gammas), case.outputs["exp_coefficient_f64"], max_abs=1e-10),
        Check("beta_f64", betas, case.outputs["beta_f64"], max_abs=1e-10),
    ]


def check_ema_update(case: Case) -> list[Check]:
    theta = jnp.asarray(case.inputs["theta"])
    betas = power_ema_beta(np.arange(len(theta) - 1), power_ema_exponent(case.config["rate"]))
    ema = {"theta": theta[0]}
    trajectory = [ema["theta"]]
    for beta, weights in zip(betas, theta[1:], strict=True):
        ema = ema_update(ema, {"theta": weights}, beta)
        trajectory.append(ema["theta"])
    return [
        Check("beta_f64", betas, case.outputs["beta_f64"], max_abs=1e-6),
        Check("ema_traj", jnp.stack(trajectory), case.outputs["ema_traj"], max_abs=1e-6),
    ]


# --- time conversions -----------------------------------------------------------------------------------------------


def check_time_helpers(case: Case) -> list[Check]:
    config, want, shift = case.config, case.outputs, case.config["shift"]
    lognormal, uniform = flow.LogNormal(config["p_mean"], config["p_std"]), flow.UniformShift(shift)

    @jax.jit
    def conversions(u: Array, sigma: Array, theta: Array, z: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        k = flow.TrigCoefficients.at(theta)
        plain = {
            "shift_rf_time_f64": flow.shift_time(u, shift),
            "shift_rf_time_shift0_f64": flow.shift_time(u, 0.0),
            "inverse_shift_rf_time_f64": flow.unshift_time(u, shift),
            "sigma_to_rf_f64": flow.sigma_to_rf(sigma),
            "rf_to_sigma_f64": flow.rf_to_sigma(u),
            "sigma_to_trig_f64": flow.sigma_to_trig(sigma),
            "trig_to_sigma_f64": flow.trig_to_sigma(theta),
            "rf_to_trig_f64": flow.rf_to_trig(u),
            "trig_to_rf_f64": flow.trig_to_rf(theta),
            "c_skip_f64": k.skip,
            "c_out_f64": k.out,
            "c_in_f64": k.inp,
            "c_noise_f64": 1000 * k.t,
            "uniformshift_cdf_rf_f64": uniform.cdf(u),
            "uniformshift_icdf_rf_f64": uniform.icdf(u),
            "lognormal_sample_from_z_f64": lognormal.from_normal(z),
        }
        return plain, {"lognormal_cdf_rf_f64": lognormal.cdf(u), "lognormal_icdf_rf_f64": lognormal.icdf(u)}

    plain, normal = conversions(*(case.inputs[name] for name in ("u", "sigma", "trig", "z")))
    # The inverse error function is clamped at the ends of [0, 1], where implementations differ.
    ends = (case.inputs["u"] <= 0) | (case.inputs["u"] >= 1)
    # By element too, not in the norm alone: one 1/eps (rf_to_sigma at 1) would hide all the others in it.
    return [
        *(Check(n, got, want[n], rel=1e-10, max_abs=1e-10 * np.abs(want[n])) for n, got in plain.items()),
        *(Check(n, got, want[n], max_abs=np.where(ends, 1e-6, 1e-8)) for n, got in normal.items()),
    ]


CASES: dict[str, Checker] = {
    "sampler_rcm": check_sampler_rcm,
    "sampler_rcm_trig": check_sampler_rcm_trig,
    "sampler_wan": check_sampler_wan,
    "sampler_rcm_diffusion": check_sampler_rcm_diffusion,
    "ema": check_ema,
    "ema_update": check_ema_update,
    "time_helpers": check_time_helpers,
}
