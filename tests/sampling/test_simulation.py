"""The sampler as training simulates it: its times, and its state before the last step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.flow import trig_noisy
from rcm_jax.sampling.few_step import (
    few_step_times,
    fixed_simulation_times,
    sampler_times,
    simulate,
    simulation_times,
)

SHAPE = (2, 2, 2, 2, 3)
START = jax.random.normal(jax.random.key(2), SHAPE)
STEP_NOISES = jax.random.normal(jax.random.key(3), (3, *SHAPE))


def denoiser(z, theta):
    return 0.5 * jnp.tanh(z)


def test_simulated_times_only_fall():
    draws = jnp.array([[1.2, 0.7], [0.8, 1.3], [1.0, 0.2]])
    times = simulation_times(draws)
    np.testing.assert_allclose(times[0], [np.pi / 2] * 2, rtol=1e-6)
    np.testing.assert_allclose(times[1:], [[1.2, 0.7], [0.8, 0.7], [0.8, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(simulation_times(draws[:0]), [[np.pi / 2] * 2], rtol=1e-6)  # one step alone
    np.testing.assert_allclose(fixed_simulation_times(2)[:, 0], [np.pi / 2, 1.5, 1.4, 1.0], rtol=1e-6)


def test_the_samplers_steps_on_a_side():
    """Every step is on one side of a boundary; one at the boundary is above it."""
    assert sampler_times() == (np.pi / 2, 1.5, 1.4, 1.0)
    for boundary in (0.9, 0.875, 0.7):
        assert sampler_times((boundary, 1.0)) + sampler_times((0.0, boundary)) == sampler_times()
    assert sampler_times((0.9, 1.0)) == (np.pi / 2, 1.5)
    at = float(few_step_times(3)[1])
    assert sampler_times((at, 1.0)) == (np.pi / 2, 1.5)
    assert sampler_times((0.0, at)) == (1.4, 1.0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_simulation_is_the_sampler_up_to_its_last_step(num_steps):
    times = simulation_times(jnp.array([[1.2, 0.7], [0.8, 1.3], [0.5, 0.2]]))
    z = START
    for i in range(num_steps - 1):
        z = trig_noisy(denoiser(z, times[i]), STEP_NOISES[i], times[i + 1])
    got = jax.jit(lambda n: simulate(denoiser, START, times, STEP_NOISES, n))(num_steps)
    np.testing.assert_allclose(got[0], z, atol=1e-6)
    np.testing.assert_array_equal(got[1], times[num_steps - 1])
