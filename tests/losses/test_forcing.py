import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.flow import LogNormal, UniformShift, rf_noisy
from rcm_jax.losses.diffusion import flow_matching_loss
from rcm_jax.losses.forcing import DF_TIMES, df_times, fopp_times, forcing_loss, over_frames, time_weight

SPANS = ((0, 1), (1, 3), (3, 5))
X0, NOISE = jax.random.normal(jax.random.key(0), (2, 3, 5, 2, 2, 4))


def velocity(x, t):
    return 0.7 * x + t[:, :, None, None, None]


def test_without_weights_it_is_flow_matching_summed_over_frames():
    t = jnp.array([0.2, 0.5, 0.9])
    loss, terms = forcing_loss(velocity, X0, NOISE, t)
    frames = jnp.broadcast_to(t[:, None], (3, 5))
    np.testing.assert_allclose(loss, 500 * flow_matching_loss(velocity, X0, NOISE, frames)[0], rtol=1e-5)
    np.testing.assert_allclose(terms["xt"], rf_noisy(X0, NOISE, t), rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("loss", [flow_matching_loss, forcing_loss])
def test_a_bad_sample_is_left_out(loss, bad):
    poison = jnp.zeros(X0.shape).at[1, 2, 0, 0, 0].set(bad)

    def total(w, samples, poison):
        values, terms = loss(lambda x, t: w * x + poison, X0, NOISE, jnp.array([0.2, 0.5, 0.9]))
        return values[samples].sum(), (values, terms["masked"])

    grad, (values, masked) = jax.grad(total, has_aux=True)(0.7, jnp.arange(3), poison)
    want = jax.grad(lambda w: total(w, jnp.array([0, 2]), 0.0)[0])(0.7)
    assert masked.tolist() == [False, True, False]
    assert values[1] == 0
    np.testing.assert_allclose(grad, want, rtol=1e-6)


def test_the_bell_weighs_frames_by_their_time():
    t = jnp.array([[0.5, 0, 0, 0, 0], [0, 0.25, 1, 0, 0], [0.0] * 5])
    loss, terms = forcing_loss(velocity, X0, NOISE, t, weighting="gaussian_bell", scale=1.0)
    error = jnp.square(terms["v_pred"] - (NOISE - X0)).mean((2, 3, 4))
    peak, quarter = 1 - np.exp(-0.5), np.exp(-0.125) - np.exp(-0.5)
    np.testing.assert_allclose(loss, [peak * error[0, 0], quarter * error[1, 1], 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="weighting='bell' must be one of"):
        time_weight(t, "bell")


@pytest.mark.parametrize("sampler", [pytest.param(LogNormal(-0.8, 1.6), marks=pytest.mark.slow), UniformShift(5.0)])
def test_fopp_keeps_its_anchor_and_fills_in_order_statistics(sampler):
    batch, chunks, anchor = 4000, 5, 3
    keys = jax.random.split(jax.random.key(0), 3)
    t = sampler.sample(keys[0], (batch,))
    left, right = (jax.random.exponential(k, (batch, chunks)) for k in keys[1:])
    times = fopp_times(sampler, jnp.full(batch, anchor), t, left, right)
    np.testing.assert_allclose(times[:, anchor], t, rtol=1e-4, atol=1e-5)
    assert (jnp.diff(times, axis=1) >= 0).all()
    # In CDF space: three sorted uniform draws below u, whose means are u/4, u/2 and 3u/4, and one above it.
    u = sampler.cdf(t)
    below = sampler.cdf(times[:, :anchor]) / u[:, None]
    np.testing.assert_allclose(below.mean(0), [0.25, 0.5, 0.75], atol=0.02)
    np.testing.assert_allclose(((sampler.cdf(times[:, 4]) - u) / (1 - u)).mean(), 0.5, atol=0.02)


@pytest.mark.parametrize("strategy", DF_TIMES)
def test_times_of_diffusion_forcing(strategy):
    times = df_times(strategy, UniformShift(3.0), jax.random.key(1), 6, 3)
    assert times.shape == (6, 3)
    assert bool((times[:, 0] == times[:, 1]).all()) == (strategy == "shared")
    assert bool((jnp.diff(times, axis=1) >= 0).all()) == (strategy != "independent")


def test_an_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="'random' must be one of"):
        df_times("random", UniformShift(3.0), jax.random.key(1), 6, 3)


def test_over_frames():
    np.testing.assert_array_equal(over_frames(jnp.array([[1.0, 2, 3]]), SPANS), [[1, 2, 2, 3, 3]])
