"""Distribution matching: the direction of the gradient, the critic, bad samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def poisoned(w, bad):
    """A network with a parameter, whose output for sample 0 has a bad element."""
    poison = jnp.zeros(SHAPE).at[0, 0, 0, 0, 0].set(bad)
    return lambda z, theta: w * z + poison


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["video", "fake", "teacher"])
def test_dmd_leaves_a_bad_sample_out(bad, where):

    def total(w, samples, where):
        fake, teacher = (poisoned(v, bad if name == where else 0.0) for name, v in (("fake", 0.5), ("teacher", 0.2)))
        video = VIDEO.at[0, 1, 0, 0, 0].set(bad) if where == "video" else VIDEO
        loss, terms = dmd_loss(w * video, fake, teacher, NOISE, THETA)
        return loss[samples].sum(), (loss, terms["masked"])

    grad, (loss, masked) = jax.grad(total, has_aux=True)(1.0, jnp.arange(2), where)
    assert masked.tolist() == [True, False]
    assert loss[0] == 0
    if where != "video":  # a bad video reaches the weights through the network that made it: the step leaves it out
        want = jax.grad(lambda w: total(w, jnp.array([1]), "nowhere")[0])(1.0)
        np.testing.assert_allclose(grad, want, rtol=1e-6)
        assert want != 0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["fake", "theta"])
def test_the_critic_leaves_a_bad_sample_out(bad, where):
    """At theta = 0 there is nothing to predict and sin² to divide by: 0/0."""

    def total(w, samples, where):
        theta = THETA.at[0].set(0.0) if where == "theta" else THETA
        loss, terms = critic_loss(VIDEO, poisoned(w, bad if where == "fake" else 0.0), NOISE, theta)
        return loss[samples].sum(), (loss, terms["masked"])

    grad, (loss, masked) = jax.grad(total, has_aux=True)(0.5, jnp.arange(2), where)
    want = jax.grad(lambda w: total(w, jnp.array([1]), "nowhere")[0])(0.5)
    assert masked.tolist() == [True, False]
    assert loss[0] == 0
    np.testing.assert_allclose(grad, want, rtol=1e-6)
    assert want != 0
