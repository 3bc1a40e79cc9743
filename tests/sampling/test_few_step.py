"""The distilled student's sampler against closed forms, its two forms against each other, and the golden files."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.sampling.few_step import few_step_times, sample_few_step, sample_few_step_trig
from tests.golden_common import load_case, run_case
from tests.golden_samplers import CASES

SHAPE = (2, 2, 2, 3, 4)
GOLDENS = Path(__file__).parents[1] / "goldens"
SAMPLERS = pytest.mark.parametrize("sample", [sample_few_step, sample_few_step_trig])


def normal(seed, shape=SHAPE, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def gaussian_velocity(x, t):
    """Exact for data ~ N(0.3, 0.5²); numpy or JAX."""
    t = t.reshape(-1, 1, 1, 1, 1)
    variance = (1 - t) ** 2 * 0.25 + t**2
    return -0.3 + (t - 0.25 * (1 - t)) / variance * (x - 0.3 * (1 - t))


def draw(sample, noise, velocity=gaussian_velocity, num_steps=4, sigma_max=80.0, **source):
    """The sampler under jit; `source` is key= or step_noises=."""
    run = functools.partial(sample, velocity, num_steps=num_steps, sigma_max=sigma_max)
    return jax.jit(lambda noise, source: run(noise, **source))(noise, source)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_times_fall_from_sigma_max_to_data():
    times = few_step_times(4)
    middle = [np.tan(theta) / (1 + np.tan(theta)) for theta in (1.5, 1.4, 1.0)]
    np.testing.assert_allclose(times, [80 / 81, *middle, 0], rtol=1e-15)
    assert times.dtype == np.float64
    assert few_step_times(1, sigma_max=1600.0) == pytest.approx([1600 / 1601, 0])
    assert len(few_step_times(6, middle=(1.5, 1.4, 1.3, 1.2, 1.0))) == 7


@pytest.mark.parametrize("num_steps", [0, 5])
def test_step_count_out_of_range(num_steps):
    with pytest.raises(ValueError, match=rf"num_steps={num_steps} must be 1\.\.4"):
        few_step_times(num_steps)
    for sample in (sample_few_step, sample_few_step_trig):
        with pytest.raises(ValueError, match="must be 1"):
            sample(gaussian_velocity, normal(0), key=jax.random.key(0), num_steps=num_steps)


@SAMPLERS
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_one_data_point_is_found_whatever_the_noise(sample, num_steps):
    x0 = normal(1)
    out = draw(
        sample,
        normal(2),
        velocity=lambda x, t: (x - x0) / t.reshape(-1, 1, 1, 1, 1),
        num_steps=num_steps,
        step_noises=normal(3, (num_steps, *SHAPE)),
    )
    np.testing.assert_allclose(out, x0, atol=1e-5)


def test_steps_by_hand(x64):
    noise, eps = normal(0, dtype=np.float64), normal(1, (2, *SHAPE), np.float64)
    t = few_step_times(3, sigma_max=120.0)
    x = t[0] * noise
    for i in range(3):
        x0 = x - t[i] * gaussian_velocity(x, np.full(2, t[i]))
        x = (1 - t[i + 1]) * x0 + (t[i + 1] * eps[i] if i < 2 else 0)
    out = draw(sample_few_step, noise, num_steps=3, sigma_max=120.0, step_noises=eps)
    np.testing.assert_allclose(out, x, rtol=1e-12)


def test_both_forms_agree_from_the_same_first_state(x64):
    """z = (cos + sin) x_t: TrigFlow started from sin(theta_0) eps walks through the same states as RF from t_0 eps."""
    noise, eps = normal(0, dtype=np.float64), normal(1, (3, *SHAPE), np.float64)
    rf = draw(sample_few_step, noise, step_noises=eps)
    trig = draw(sample_few_step_trig, np.sin(np.arctan(80.0)) * noise, step_noises=eps)
    np.testing.assert_allclose(trig, rf, atol=5e-7)  # TrigFlow's times are rounded to float32


@SAMPLERS
def test_the_key_decides(sample):
    run = jax.jit(lambda noise, key: sample(gaussian_velocity, noise, key=key))
    first, again, other = (run(normal(0), jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_noise_of_a_step_depends_on_key_and_step_alone():
    key = jax.random.key(5)
    eps = jax.jit(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), SHAPE))
    np.testing.assert_allclose(
        draw(sample_few_step, normal(0), num_steps=3, key=key),
        draw(sample_few_step, normal(0), num_steps=3, step_noises=[eps(key, 0), eps(key, 1)]),
        atol=1e-6,
    )


@SAMPLERS
def test_jit_compiles_the_network_once(sample):
    traces = []

    def velocity(x, t):
        traces.append((x.shape, t.shape))
        return gaussian_velocity(x, t)

    eps = normal(1, (3, *SHAPE))
    jitted = draw(sample, normal(0), velocity=velocity, step_noises=eps)
    assert traces == [(SHAPE, SHAPE[:1])]
    np.testing.assert_allclose(jitted, sample(gaussian_velocity, normal(0), step_noises=eps), atol=1e-5)


@SAMPLERS
@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_state_is_float32_or_better(sample, dtype, expected, x64):
    def bfloat16_network(x, t):
        assert x.dtype == t.dtype == expected
        return gaussian_velocity(x, t).astype(jnp.bfloat16)

    out = jax.eval_shape(
        lambda x: sample(bfloat16_network, x, key=jax.random.key(1)), jax.ShapeDtypeStruct(SHAPE, dtype)
    )
    assert (out.dtype, out.shape) == (expected, SHAPE)


@SAMPLERS
def test_noise_has_to_come_from_one_source(sample):
    noise, key, eps = normal(0), jax.random.key(0), normal(1, (3, *SHAPE))
    with pytest.raises(ValueError, match="either key= or step_noises="):
        sample(gaussian_velocity, noise)
    with pytest.raises(ValueError, match="either key= or step_noises="):
        sample(gaussian_velocity, noise, key=key, step_noises=eps)
    with pytest.raises(ValueError, match=r"must be 3 \(or 4\)"):
        sample(gaussian_velocity, noise, step_noises=eps[:2])
    with pytest.raises(ValueError, match="must be 3"):
        sample(gaussian_velocity, noise, step_noises=eps[..., 1:])
    jax.eval_shape(lambda x: sample(gaussian_velocity, x, num_steps=1), noise)  # needs none


@pytest.mark.parametrize("name", ["rcm_1step", "rcm_2step", "rcm_3step", "rcm_4step", "rcm_trig_4step"])
def test_golden(name, x64):
    report = run_case(load_case(GOLDENS / f"sampler_{name}.safetensors"), CASES)
    assert report.ok, report


def test_golden_time_helpers(x64):
    report = run_case(load_case(GOLDENS / "time_helpers.safetensors"), CASES)
    assert report.ok, report
