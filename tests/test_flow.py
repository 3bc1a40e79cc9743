"""Times, the TrigFlow wrapper and guidance against their definitions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax import flow


@pytest.fixture
def latents():
    keys = jax.random.split(jax.random.key(0), 2)
    return [jax.random.normal(k, (3, 2, 4, 4, 5)) for k in keys]


def test_maps_between_times_are_inverse():
    t = jnp.linspace(0.0, 1.0, 33)
    np.testing.assert_allclose(flow.trig_to_rf(flow.rf_to_trig(t)), t, atol=2e-7)
    np.testing.assert_allclose(flow.sigma_to_rf(flow.rf_to_sigma(t[:-1])), t[:-1], atol=1e-6)
    np.testing.assert_allclose(flow.unshift_time(flow.shift_time(t, 5.0), 5.0), t, atol=2e-7)
    np.testing.assert_allclose(jnp.tan(flow.rf_to_trig(t[:-1])), flow.rf_to_sigma(t[:-1]), rtol=1e-5)


def test_rf_time_one_is_exactly_pure_noise():
    assert flow.rf_to_trig(jnp.ones(())) == jnp.asarray(np.pi / 2, jnp.float32)
    assert np.isfinite(flow.rf_to_sigma(jnp.ones(())))


@pytest.mark.parametrize("theta", [0.0, 1e-4, 0.3, 1.2, np.pi / 2])
def test_an_exact_velocity_gives_x0_and_F(latents, theta):
    """With the true v = noise - x0, the wrapper returns the true x0 and F = cos noise - sin x0."""
    x0, noise = latents
    theta = jnp.full((3,), theta)
    z = flow.trig_noisy(x0, noise, theta)
    c, s = (flow.expand(f(theta), z) for f in (jnp.cos, jnp.sin))

    def velocity(x_t, t):
        np.testing.assert_allclose(x_t, flow.rf_noisy(x0, noise, t), atol=1e-5)
        return noise - x0

    np.testing.assert_allclose(flow.trig_denoiser(velocity)(z, theta), x0, atol=1e-5)
    np.testing.assert_allclose(flow.trig_velocity(velocity)(z, theta), c * noise - s * x0, atol=1e-5)


def test_the_two_wrappers_agree_for_any_velocity(latents):
    """F = (cos z - x0) / sin, which trig_velocity computes without the division."""
    z, weight = latents
    theta = jnp.array([0.2, 0.9, 1.5])

    def velocity(x_t, t):
        return jnp.tanh(x_t * weight) + flow.expand(t, x_t)

    c, s = (flow.expand(f(theta), z) for f in (jnp.cos, jnp.sin))
    F = (c * z - flow.trig_denoiser(velocity)(z, theta)) / s
    np.testing.assert_allclose(flow.trig_velocity(velocity)(z, theta), F, atol=2e-5)


def test_low_precision_outputs_are_widened(latents):
    def velocity(x_t, t):
        return x_t.astype(jnp.bfloat16)

    out = flow.trig_denoiser(velocity)(latents[0], jnp.ones(3))
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("sampler", [flow.LogNormal(-0.8, 1.6), flow.UniformShift(5.0)])
def test_samplers_follow_their_cdf(sampler):
    t = sampler.sample(jax.random.key(3), (20_000,))
    assert ((t >= 0) & (t <= 1)).all()
    p = np.sort(np.asarray(sampler.cdf(t)))
    assert np.abs(p - np.linspace(0, 1, len(p))).max() < 0.012  # Kolmogorov-Smirnov, 1.6 / √n
    q = jnp.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(sampler.cdf(sampler.icdf(q)), q, atol=1e-5)


SIDES = [(0.9, 1.0), (0.0, 0.9), (0.3, 0.6)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("sampler", [flow.LogNormal(1.5, 1.6), flow.UniformShift(5.0)])
def test_truncated_times_are_those_that_rejection_would_keep(sampler, side):
    rng, (low, high) = np.random.default_rng(0), side
    if isinstance(sampler, flow.LogNormal):
        many = 1 / (1 + np.exp(-rng.normal(1.5, 1.6, 400_000)))
    else:
        u = rng.uniform(size=400_000)
        many = 5 * u / (1 + 4 * u)
    kept = many[(many >= low) & (many <= high)]
    part = flow.Truncated(sampler, low, high)
    t = np.asarray(part.sample(jax.random.key(3), (20_000,)))
    assert np.float32(low) <= t.min() < t.max() <= np.float32(high)
    p = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(t, p), np.quantile(kept, p), atol=0.02 * (high - low))
    np.testing.assert_allclose(part.icdf(p), np.quantile(kept, p), atol=0.01 * (high - low))
    np.testing.assert_allclose(part.cdf(part.icdf(p)), p, atol=1e-5)
    np.testing.assert_allclose(part.cdf(jnp.array([low, high])), [0, 1], atol=1e-6)


def test_guidance(latents):
    x, y = latents
    calls = []

    def uncond(x, t):
        calls.append(1)
        return y

    out = flow.guided(lambda x, t: x, uncond, 3.0)(x, jnp.ones(3))
    np.testing.assert_allclose(out, y + 3 * (x - y), rtol=1e-6)
    assert flow.guided(lambda x, t: x, uncond, 1.0)(x, jnp.ones(3)) is x
    assert len(calls) == 1, "without guidance the unconditional network is not run"


def test_the_unconditional_text_is_one_for_all_or_one_a_video():
    text = jnp.ones((3, 4, 5))
    one, each = jnp.arange(20.0).reshape(4, 5), jnp.arange(60.0).reshape(3, 4, 5)
    np.testing.assert_array_equal(flow.one_a_video(one, text), jnp.stack([one] * 3))
    np.testing.assert_array_equal(flow.one_a_video(each, text), each)
    for wrong in (each[:2], each[:1], each[0, 0]):
        with pytest.raises(ValueError, match=rf"has shape {re.escape(str(wrong.shape))}; give .* or \[3, L, D\]"):
            flow.one_a_video(wrong, text)
