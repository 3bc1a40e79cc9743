"""The teacher's solvers against ODEs with known solutions, their measured orders, and the golden files."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.sampling.ode import SOLVERS, Schedule, half_log_snr, rcm_times, sample_ode, unipc, wan_times
from tests.golden_common import load_case, run_case
from tests.golden_samplers import CASES

SHAPE = (2, 2, 2, 3, 4)
MEAN, STD = 0.7, 0.8
GOLDENS = Path(__file__).parents[1] / "goldens"
EVERY_SOLVER = pytest.mark.parametrize("solver", sorted(SOLVERS))


def normal(seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(dtype)


def spread(t):
    """Standard deviation of x_t for data ~ N(MEAN, STD²)."""
    return ((1 - t) ** 2 * STD**2 + t**2) ** 0.5


def gaussian_velocity(x, t):
    t = t.reshape(-1, 1, 1, 1, 1)
    return -MEAN + (t - (1 - t) * STD**2) / spread(t) ** 2 * (x - (1 - t) * MEAN)


def gaussian_solution(x, t_from, t_to):
    """The flow of `gaussian_velocity` keeps (x - mean)/spread."""
    return (1 - t_to) * MEAN + spread(t_to) / spread(t_from) * (x - (1 - t_from) * MEAN)


def even_schedule(n, start, end):
    sigmas = np.linspace(start, end, n + 1)
    return Schedule(sigmas=tuple(sigmas.tolist()), times=tuple(sigmas[:-1].tolist()))


def run(velocity, noise, schedule, solver, trajectory=False):
    options = {"schedule": schedule, "solver": solver, "trajectory": trajectory}
    return jax.jit(lambda noise: sample_ode(velocity, noise, **options))(noise)


def worst_error(solver, schedule):
    """Against the exact flow of `gaussian_velocity`, from one end of the schedule to the other."""
    noise = normal(0, np.float64)
    exact = gaussian_solution(noise, schedule.sigmas[0], schedule.sigmas[-1])
    return np.abs(run(gaussian_velocity, noise, schedule, solver) - exact).max()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@EVERY_SOLVER
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50])
def test_one_data_point_is_reached_along_a_straight_line(solver, num_steps):
    x0, noise = normal(1), normal(2)
    schedule = rcm_times(num_steps)
    schedule = Schedule(sigmas=(1.0, *schedule.sigmas[1:]), times=(1.0, *schedule.times[1:]))
    states = run(lambda x, t: (x - x0) / t.reshape(-1, 1, 1, 1, 1), noise, schedule, solver, trajectory=True)
    sigma = np.array(schedule.sigmas, np.float32).reshape(-1, 1, 1, 1, 1, 1)
    np.testing.assert_allclose(states, (1 - sigma) * x0[None] + sigma * noise[None], atol=2e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_order_of_convergence(solver, order, x64):
    steps = np.array([256, 512, 1024])  # UniPC's third-order part no longer shows
    errors = [worst_error(solver, even_schedule(n, 0.95, 0.05)) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("schedule", [rcm_times(50), wan_times(50)], ids=["rcm", "wan"])
def test_fifty_steps_reach_the_data(schedule, x64):
    error = {solver: worst_error(solver, schedule) for solver in SOLVERS}
    assert error["euler"] < 0.2
    assert max(error["unipc"], error["dpm++"]) < 0.3 * error["euler"]


def test_unic_is_exact_for_quadratic_predictions():
    """UniC-2 interpolates three predictions: for d quadratic in lambda, the integral e^lambda d comes out exactly."""
    sigmas = np.array([0.9, 0.7, 0.6, 0.35, 0.0])
    lam, correct = half_log_snr(sigmas), unipc(sigmas).correct
    for power, antiderivative in [
        (0, lambda u: np.exp(u)),
        (1, lambda u: np.exp(u) * (u - 1)),
        (2, lambda u: np.exp(u) * (u**2 - 2 * u + 2)),
    ]:
        d = lam**power
        for i in (2, 3):
            x, x_last = -3.0, 0.8  # the predicted state itself must not matter
            integral = antiderivative(lam[i]) - antiderivative(lam[i - 1])
            exact = sigmas[i] * (x_last / sigmas[i - 1] + integral)
            assert correct[i] @ [x, x_last, d[i], d[i - 1], d[i - 2]] == pytest.approx(exact, rel=1e-12)


@EVERY_SOLVER
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_weights_are_finite_from_pure_noise_and_sum_to_one(solver, num_steps):
    """sigma = 1 and 0 have an infinite lambda. If state and predictions are all c, so is the noise, and c is kept."""
    weights = SOLVERS[solver](np.linspace(1, 0, num_steps + 1))
    assert np.all(np.isfinite(weights.correct))
    assert np.all(np.isfinite(weights.predict))
    np.testing.assert_allclose(weights.correct.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(weights.predict.sum(axis=1), 1, rtol=1e-12)
    assert np.all(weights.predict[0, 2:] == 0)
    assert np.all(weights.correct[0, 1:] == 0)


@EVERY_SOLVER
def test_jit_compiles_the_network_once(solver):
    traces = []

    @functools.partial(jax.jit, static_argnames="schedule")
    def jitted(x, schedule):
        def velocity(x, t):
            traces.append((x.shape, t.shape))
            return gaussian_velocity(x, t)

        return sample_ode(velocity, x, schedule=schedule, solver=solver)

    out = jitted(normal(0), wan_times(50))
    jitted(normal(1), wan_times(50))  # an equal schedule is the same static argument
    assert traces == [(SHAPE, SHAPE[:1])]
    eager = sample_ode(gaussian_velocity, normal(0), schedule=wan_times(50), solver=solver)
    np.testing.assert_allclose(out, eager, atol=1e-5)


@EVERY_SOLVER
@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_state_is_float32_or_better(solver, dtype, expected, x64):
    def bfloat16_network(x, t):
        assert x.dtype == t.dtype == expected
        return gaussian_velocity(x, t).astype(jnp.bfloat16)

    out = jax.eval_shape(
        lambda x: sample_ode(bfloat16_network, x, schedule=rcm_times(3), solver=solver),
        jax.ShapeDtypeStruct(SHAPE, dtype),
    )
    assert (out.dtype, out.shape) == (expected, SHAPE)


def test_trajectory_starts_at_the_noise_and_ends_at_the_sample():
    states = run(gaussian_velocity, normal(0), rcm_times(4), "unipc", trajectory=True)
    assert states.shape == (5, *SHAPE)
    np.testing.assert_array_equal(states[0], normal(0))
    np.testing.assert_allclose(states[-1], run(gaussian_velocity, normal(0), rcm_times(4), "unipc"), atol=1e-6)


def test_rcm_times():
    schedule = rcm_times(10, shift=5.0, sigma_max=5000.0)
    assert schedule.times == schedule.sigmas[:-1]
    assert schedule.sigmas[0] == pytest.approx(5000 / 5001, rel=1e-14)
    unshifted = np.array(schedule.sigmas) / (5 - 4 * np.array(schedule.sigmas))
    np.testing.assert_allclose(np.diff(unshifted), -unshifted[0] / 10, rtol=1e-12)
    np.testing.assert_allclose(rcm_times(10, dtype=np.float32).sigmas, rcm_times(10).sigmas, rtol=3e-7)
    np.testing.assert_allclose(rcm_times(4, shift=1.0, sigma_max=4.0).sigmas, [0.8, 0.6, 0.4, 0.2, 0], atol=1e-15)


def test_wan_times_are_integers_for_the_network_alone():
    schedule = wan_times(50, shift=5.0)
    timesteps = 1000 * np.array(schedule.times)
    np.testing.assert_array_equal(timesteps, np.floor(1000 * np.array(schedule.sigmas[:-1])))
    assert timesteps[0] == 999
    assert schedule.times[1] != schedule.sigmas[1]
    assert wan_times(50, solver="dpm++").sigmas[0] == 1
    assert wan_times(1, solver="dpm++").times == (1.0,)


def test_errors_name_what_is_valid():
    valid = r"'heun' must be one of \['dpm\+\+', 'euler', 'unipc'\]"
    with pytest.raises(ValueError, match=valid):
        sample_ode(gaussian_velocity, normal(0), schedule=rcm_times(4), solver="heun")
    with pytest.raises(ValueError, match=valid):
        wan_times(4, solver="heun")
    for times in (rcm_times, wan_times):
        with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
            times(0)
    with pytest.raises(ValueError, match="must be one more than"):
        Schedule(sigmas=(1.0, 0.0), times=(1.0, 0.0))
    with pytest.raises(ValueError, match="must fall strictly"):
        Schedule(sigmas=(0.5, 0.5, 0.0), times=(0.5, 0.5))


@pytest.mark.parametrize(
    "name", ["wan_unipc_s3", "wan_unipc_s10", "wan_dpmpp_s8", "rcm_diffusion_euler", "rcm_diffusion_unipc"]
)
def test_golden(name, x64):
    report = run_case(load_case(GOLDENS / f"sampler_{name}.safetensors"), CASES)
    assert report.ok, report
