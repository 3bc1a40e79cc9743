"""The power-function average against its definition and the golden files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.training.ema import ema_update, power_ema_beta, power_ema_exponent
from tests.golden_common import load_case, run_case
from tests.golden_samplers import CASES

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1, 0.2, 0.25])
def test_exponent_solves_for_the_rate(rate):
    gamma = power_ema_exponent(rate)
    assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(rate, rel=1e-9)


def test_rate_of_the_plain_average():
    assert power_ema_exponent(12**-0.5) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan")])
def test_rate_must_be_positive(rate):
    with pytest.raises(ValueError, match="must be above 0"):
        power_ema_exponent(rate)


def test_weights_of_the_updates_spread_by_the_rate():
    """Unrolled over N updates, update k weighs about k^gamma, whose relative standard deviation is the rate."""
    n, rate = 4000, 0.1
    beta = power_ema_beta(np.arange(n), power_ema_exponent(rate))
    weight = (1 - beta) * np.append(np.cumprod(beta[:0:-1])[::-1], 1.0)
    assert weight.sum() == pytest.approx(1, rel=1e-12)
    k = np.arange(n) / n
    mean = weight @ k
    assert np.sqrt(weight @ (k - mean) ** 2) == pytest.approx(rate, rel=0.01)


def test_gamma_zero_is_the_running_mean(x64):
    values = np.random.default_rng(0).normal(size=(20, 3))
    ema = jnp.zeros(3)
    for n, value in enumerate(values):
        ema = ema_update(ema, jnp.asarray(value), power_ema_beta(n, 0.0))
        np.testing.assert_allclose(ema, values[: n + 1].mean(axis=0), atol=1e-15)


def test_beta_traced_and_in_numpy():
    gamma = power_ema_exponent(0.1)
    n = np.array([-1, 0, 1, 10, 1000, 1_000_000])
    exact = power_ema_beta(n, gamma)
    assert exact.dtype == np.float64
    np.testing.assert_array_equal(exact[:2], 0)
    np.testing.assert_allclose(exact[2:], (1 - 1 / (n[2:] + 1)) ** (gamma + 1), rtol=1e-9)
    traced = jax.jit(lambda n: power_ema_beta(n, gamma))(jnp.asarray(n))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, exact, rtol=1e-6)
    # What an update takes in, 1 - beta = (gamma + 1)/(n + 1), has to survive float32 after a million updates.
    assert 1 - float(traced[-1]) == pytest.approx((gamma + 1) / 1e6, rel=0.02)


def test_update_keeps_the_averages_dtype_and_structure():
    params = {"a": jnp.full((2, 3), 1.5, jnp.bfloat16), "b": [jnp.zeros(4), jnp.ones(())]}
    ema = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    out = jax.jit(ema_update)(ema, params, jnp.asarray(0.75))
    assert jax.tree.structure(out) == jax.tree.structure(ema)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(out["a"], np.full((2, 3), 0.375))
    np.testing.assert_array_equal(out["b"][1], 0.25)


def test_first_update_copies():
    params = {"w": jax.random.normal(jax.random.key(0), (5,))}
    out = ema_update({"w": jnp.full(5, 7.0)}, params, power_ema_beta(0, 6.9))
    np.testing.assert_array_equal(out["w"], params["w"])


@pytest.mark.parametrize("name", ["ema", "ema_update"])
def test_golden(name, x64):
    report = run_case(load_case(GOLDENS / f"{name}.safetensors"), CASES)
    assert report.ok, report
