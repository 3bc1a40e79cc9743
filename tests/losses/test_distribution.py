"""Distribution matching: the direction of the gradient, the critic, bad samples."""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.flow import trig_noisy
from rcm_jax.losses.distribution import critic_loss, dmd_loss

SHAPE = (2, 2, 2, 2, 3)
VIDEO, NOISE = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(2))
THETA = jnp.array([0.6, 1.1])


def denoiser(z, theta):
    return 0.5 * jnp.tanh(z)


def test_dmd_moves_the_video_against_fake_minus_teacher():
    def fake(z, theta):
        return z + 1.0

    def teacher(z, theta):
        return 0.3 * z

    grad = jax.grad(lambda x: dmd_loss(x, fake, teacher, NOISE, THETA)[0].sum())(VIDEO)
    z = trig_noisy(VIDEO, NOISE, THETA)
    weight = jnp.abs(VIDEO - teacher(z, THETA)).mean((1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(grad, 2 * (fake(z, THETA) - teacher(z, THETA)) / weight, rtol=1e-5)


def test_no_gradient_where_the_student_matches_and_weight_has_a_floor():
    loss, terms = dmd_loss(VIDEO, lambda z, t: VIDEO, lambda z, t: VIDEO, NOISE, THETA)
    np.testing.assert_array_equal(loss, jnp.zeros(2))
    np.testing.assert_allclose(terms["weight_factor"], [1e-5] * 2)


def test_critic_value_and_gradients():
    fake = lambda w: lambda z, theta: w * z  # noqa: E731
    loss, _ = critic_loss(VIDEO, fake(0.5), NOISE, THETA)
    z = trig_noisy(VIDEO, NOISE, THETA)
    np.testing.assert_allclose(loss, jnp.square(VIDEO - 0.5 * z).sum((1, 2, 3, 4)) / jnp.sin(THETA) ** 2, rtol=1e-5)
    to_video = jax.grad(lambda x: critic_loss(x, fake(0.5), NOISE, THETA)[0].sum())(VIDEO)
    np.testing.assert_array_equal(to_video, jnp.zeros(SHAPE))


def test_bad_samples_are_masked():
    poison = jnp.zeros(SHAPE).at[0, 0, 0, 0, 0].set(jnp.nan)
    grad, terms = jax.grad(
        lambda x: (lambda loss, terms: (loss.sum(), terms))(
            *dmd_loss(x, lambda z, t: z + poison, denoiser, NOISE, THETA)
        ),
        has_aux=True,
    )(VIDEO)
    assert terms["masked"].tolist() == [True, False]
    assert not grad[0].any()
    assert jnp.isfinite(grad).all()
    loss, terms = critic_loss(VIDEO, lambda z, t: z + poison, NOISE, THETA)
    assert loss[0] == 0
    assert loss[1] > 0
