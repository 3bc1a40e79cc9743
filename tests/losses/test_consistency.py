"""Consistency losses where the answer is known: a world of one point, whose consistency function is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.flow import expand, rf_noisy, rf_to_trig, trig_noisy
from rcm_jax.losses import consistency
from rcm_jax.losses.consistency import consistency_loss, dcm_loss, dcm_times, rf_scm_loss, scm_loss

SHAPE = (3, 2, 2, 2, 4)
X0 = jax.random.normal(jax.random.key(0), SHAPE)
NOISE = jax.random.normal(jax.random.key(1), SHAPE)
THETA = jnp.array([0.3, 0.9, 1.4])


def point_F(z, theta):
    """F of a world in which every sample is X0: the trajectory is a rotation, and x0 = cos z - sin F is X0."""
    return (jnp.cos(expand(theta, z)) * z - X0) / jnp.sin(expand(theta, z))


def point_v(x, t):
    return (x - X0) / expand(t, x)


def network(w):
    """A nonlinear student with parameters, so that gradients can be compared."""
    return lambda z, theta: jnp.tanh(z * w[0] + expand(theta, z)) * w[1]


def test_exact_consistency_function_has_no_tangent():
    loss, terms = scm_loss(point_F, point_F, X0, NOISE, THETA, warmup=1.0)
    np.testing.assert_allclose(terms["g_pre_norm"], jnp.zeros(SHAPE), atol=2e-5)
    assert loss.max() < 1e-6
    loss, terms = rf_scm_loss(point_v, point_v, X0, NOISE, jnp.array([0.2, 0.5, 0.9]), warmup=1.0)
    np.testing.assert_allclose(terms["g_pre_norm"], jnp.zeros(SHAPE), atol=2e-5)
    times = rf_to_trig(dcm_times(jnp.array([0.1, 0.5, 0.8]), total_steps=48, skip=1, shift=5.0))
    loss, _ = dcm_loss(lambda z, t: X0 + 0 * z, point_F, X0, NOISE, times)
    assert loss.max() == 0


def test_scm_tangent_is_the_derivative_along_the_teacher():
    w = jnp.array([0.7, 1.3])
    student, h = network(w), 1e-3
    _, terms = scm_loss(student, point_F, X0, NOISE, THETA, warmup=1.0)
    z = trig_noisy(X0, NOISE, THETA)
    F = point_F(z, THETA)
    difference = (student(z + h * F, THETA + h) - student(z - h * F, THETA - h)) / (2 * h)
    want = jnp.cos(expand(THETA, z)) * jnp.sin(expand(THETA, z)) * difference
    np.testing.assert_allclose(terms["t_F"], want, atol=2e-3)


@pytest.mark.parametrize("warmup", [0.0, 0.4, 1.0])
def test_scm_gradient_is_minus_two_scale_normalised_tangent(warmup):
    """One pass through the jvp gives the gradient of the loss with everything but F fixed."""
    w = jnp.array([0.7, 1.3])

    def one_pass(w):
        return scm_loss(network(w), point_F, X0, NOISE, THETA, warmup=warmup)[0].sum()

    _, terms = scm_loss(network(w), point_F, X0, NOISE, THETA, warmup=warmup)
    z = trig_noisy(X0, NOISE, THETA)
    _, pull = jax.vjp(lambda w: network(w)(z, THETA), w)
    (want,) = pull(-2 * 100.0 * terms["g_normalised"])
    np.testing.assert_allclose(jax.grad(one_pass)(w), want, rtol=1e-5)
    norm = jnp.sqrt(jnp.square(terms["g_pre_norm"]).sum((1, 2, 3, 4)))
    np.testing.assert_allclose(
        jnp.sqrt(jnp.square(terms["g_normalised"]).sum((1, 2, 3, 4))), norm / (norm + 0.1), rtol=1e-5
    )


LOSSES = {
    "scm": lambda student, teacher: scm_loss(student, teacher, X0, NOISE, THETA, warmup=1.0),
    "rf_scm": lambda student, teacher: rf_scm_loss(student, teacher, X0, NOISE, jnp.array([0.2, 0.5, 0.9]), warmup=1.0),
    "dcm": lambda student, teacher: dcm_loss(
        student, teacher, X0, NOISE, rf_to_trig(dcm_times(THETA / 2, total_steps=48, skip=1, shift=5.0))
    ),
}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["teacher", "student"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_bad_sample_is_masked_and_leaves_the_others_alone(bad, where, name):
    w = jnp.array([0.7, 1.3])
    poison = jnp.zeros(SHAPE).at[1, 0, 0, 0, 0].set(bad)

    def total(w, poison, samples):
        student = (lambda z, t: network(w)(z, t) + poison) if where == "student" else network(w)
        teacher = (lambda z, t: point_F(z, t) + poison) if where == "teacher" else point_F
        loss, terms = LOSSES[name](student, teacher)
        return loss[samples].sum(), (loss, terms)

    everyone, others = jnp.arange(3), jnp.array([0, 2])
    grad, (loss, terms) = jax.grad(total, has_aux=True)(w, poison, everyone)
    want, _ = jax.grad(total, has_aux=True)(w, jnp.zeros(SHAPE), others)
    assert terms["masked"].tolist() == [False, True, False]
    assert loss[1] == 0
    np.testing.assert_allclose(grad, want, rtol=1e-6)


def test_normalised_loss_value():
    F, g = NOISE, X0
    loss, terms = consistency_loss(F, g, 10.0)
    norm = np.linalg.norm(np.asarray(g).reshape(3, -1), axis=1)
    np.testing.assert_allclose(loss, 10 * (norm / (norm + 0.1)) ** 2, rtol=1e-5)
    np.testing.assert_allclose(terms["g_norm"], norm, rtol=1e-6)


def test_dcm_walks_the_teacher_backwards():
    times = rf_to_trig(dcm_times(jnp.array([0.0, 0.5, 0.9]), total_steps=48, skip=2, shift=5.0))
    assert times.shape == (3, 3)
    assert (jnp.diff(times, axis=0) < 0).all()
    np.testing.assert_allclose(times[0, 0], np.pi / 2, rtol=1e-6)
    calls = []

    def teacher(z, theta):
        calls.append(theta)
        return point_F(z, theta)

    _, terms = dcm_loss(lambda z, t: z, teacher, X0, NOISE, times)
    z = terms["xt"]
    for theta, after in zip(times[:-1], times[1:], strict=True):
        z = z - expand(theta - after, z) * point_F(z, theta)
    np.testing.assert_allclose(terms["xk"], z, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


def test_dcm_gradient_goes_through_the_first_prediction_alone():
    w = jnp.array([0.7, 1.3])
    times = rf_to_trig(dcm_times(jnp.array([0.1, 0.5, 0.8]), total_steps=48, skip=1, shift=5.0))
    grad = jax.grad(lambda w: dcm_loss(network(w), point_F, X0, NOISE, times)[0].sum())(w)
    _, terms = dcm_loss(network(w), point_F, X0, NOISE, times)
    _, pull = jax.vjp(lambda w: network(w)(terms["xt"], times[0]), w)
    np.testing.assert_allclose(grad, pull(200.0 * (terms["x0_pred"] - terms["x0_target"]))[0], rtol=1e-5)


def test_rf_and_trig_forms_have_the_same_sample():
    t = jnp.array([0.2, 0.5, 0.9])
    _, terms = rf_scm_loss(point_v, point_v, X0, NOISE, t, warmup=0.5)
    np.testing.assert_allclose(terms["xt"], rf_noisy(X0, NOISE, t), rtol=1e-6)
    assert consistency.NORM_OFFSET == 0.1
