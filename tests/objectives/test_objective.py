"""The losses put together, on networks so simple that every number can be worked out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.data.batch import Batch
from rcm_jax.flow import RF, TRIG, Form, expand, rf_noisy, rf_to_trig, trig_denoiser, trig_noisy
from rcm_jax.losses.consistency import dcm_times, rf_scm_loss, scm_loss
from rcm_jax.losses.forcing import time_weight
from rcm_jax.objectives.binding import Role
from rcm_jax.objectives.config import CausalConfig, MethodConfig
from rcm_jax.objectives.draws import Draws
from rcm_jax.objectives.networks import Networks
from rcm_jax.objectives.objective import Objective, drop_text, summary

SHAPE = (2, 3, 2, 2, 3)
X0, NOISE, SCORE_NOISE = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(3))
TEXT, NULL = jnp.ones((2, 4, 5)), jnp.zeros((4, 5))
BATCH = Batch(X0, TEXT)
T, SCORE_T = jnp.array([0.3, 0.8]), jnp.array([0.6, 0.2])
NETWORKS = Networks(teacher=0.4, score_teacher=0.9, student=0.7, fake_score=-0.3)
OFFSET = {role: 0.1 * i for i, role in enumerate(Role)}
CAUSAL = CausalConfig(pattern="c1-2")


@dataclasses.dataclass(frozen=True)
class Simple:
    """v = tanh(x + t) w + an offset of the role + the text's mean; the own video is w · steps · x0."""

    form: Form = TRIG

    @property
    def null_text(self):
        return NULL

    def bind(self, w, batch, role, draws):
        def v(x, t):
            return jnp.tanh(x + expand(t, x)) * w + OFFSET[role] + batch.text.mean((1, 2))[:, None, None, None, None]

        return v

    def own_video(self, w, batch, draws, num_steps):
        return w * num_steps * batch.latents, {"G_xt": batch.latents}


def network(w, role):
    return Simple().bind(w, BATCH, role, None)


def objective(form=TRIG, causal=None, **method):
    return Objective(Simple(form), MethodConfig(**{"tangent_warmup": 0, "guidance": 3.0} | method), causal)


def run(made, w=0.5, draws=None, num_steps=None, networks=NETWORKS, warmup=0.6):
    return made.student(w, networks, BATCH, draws, warmup=warmup, num_steps=num_steps)


DRAWS = Draws(noise=NOISE, t=T, u=T, score_noise=SCORE_NOISE, score_t=SCORE_T)


@pytest.mark.parametrize("consistency", ["scm", "rf_scm"])
def test_consistency_asks_the_student_under_jvp_and_the_teacher(consistency):
    loss, parts = run(objective(consistency=consistency, consistency_scale=7.0), draws=DRAWS)
    student, teacher = network(0.5, Role.TANGENT), network(0.4, Role.TEACHER)
    if consistency == "scm":
        pair, time, function = (TRIG.velocity(student), TRIG.velocity(teacher)), rf_to_trig(T), scm_loss
    else:
        pair, time, function = (student, teacher), T, rf_scm_loss
    want, terms = function(*pair, X0, NOISE, time, warmup=0.6, scale=7.0)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(parts["consistency"]["g_pre_norm"], terms["g_pre_norm"], rtol=1e-6)
    assert set(parts) == {"consistency"}


@pytest.mark.parametrize(("form", "causal"), [(TRIG, None), (RF, CAUSAL)], ids=["bidirectional", "causal"])
def test_dcm_walks_the_teacher_over_its_skip(form, causal):
    """Two Euler steps of the teacher between the student's two predictions, from u on the grid of 12 steps."""
    made = objective(form, causal, consistency="dcm", dcm_total_steps=12, dcm_skip=2, dcm_shift=3.0)
    loss, parts = run(made, draws=DRAWS)
    times = dcm_times(T * (1 - 2 / 12), total_steps=12, skip=2, shift=3.0)
    np.testing.assert_allclose(times[0], 3 * (1 - T * 10 / 12) / (1 + 2 * (1 - T * 10 / 12)), rtol=1e-6)
    np.testing.assert_allclose(parts["consistency"]["times"], form.time(times), rtol=1e-6)
    times = form.time(times)
    z = first = form.noisy(X0, NOISE, times[0])
    for a, b in ((0, 1), (1, 2)):
        z = z - expand(times[a] - times[b], z) * form.velocity(network(0.4, Role.TEACHER))(z, times[a])
    student = form.denoiser(network(0.5, Role.STUDENT))
    error = jnp.square(student(first, times[0]) - student(z, times[2])).sum((2, 3, 4))
    want = 100 * (error.sum(1) if causal is None else error.sum(1) / (2 * 2 * 3))  # causal: the mean of a frame
    np.testing.assert_allclose(loss, want, rtol=1e-4)


@pytest.mark.parametrize(("form", "causal"), [(TRIG, None), (RF, CAUSAL)], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("scored", ["teacher", "score_teacher"])
def test_dmd_is_the_difference_of_the_scores_on_the_own_video(form, causal, scored):
    networks = NETWORKS if scored == "score_teacher" else dataclasses.replace(NETWORKS, score_teacher=None)
    made = objective(form, causal, consistency="", dmd_scale=2.5)
    loss, parts = run(made, draws=DRAWS, num_steps=3, networks=networks)
    video, time = 0.5 * 3 * X0, form.time(SCORE_T)
    z = form.noisy(video, SCORE_NOISE, time)
    fake = form.denoiser(network(-0.3, Role.FAKE_SCORE))(z, time)
    teacher = form.denoiser(network({"teacher": 0.4, "score_teacher": 0.9}[scored], Role.SCORE_TEACHER))(z, time)
    direction = (fake - teacher) / jnp.abs(video - teacher).mean((1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(loss, 2.5 * jnp.square(direction).sum((1, 2, 3, 4)), rtol=1e-5)
    np.testing.assert_allclose(parts["dmd"]["loss"], loss / 2.5, rtol=1e-6)
    grad = jax.grad(lambda w: run(made, w, DRAWS, 3, networks)[0].sum())(0.5)
    np.testing.assert_allclose(grad, 2.5 * 2 * (direction * 3 * X0).sum(), rtol=1e-4)


def test_both_losses_are_added():
    made = objective(dmd_scale=2.5)
    both, parts = run(made, draws=DRAWS, num_steps=2)
    assert set(parts) == {"consistency", "dmd"}
    np.testing.assert_allclose(both, parts["consistency"]["loss"] + 2.5 * parts["dmd"]["loss"], rtol=1e-6)
    alone, _ = run(made, draws=DRAWS)
    np.testing.assert_allclose(alone, parts["consistency"]["loss"], rtol=1e-6)


@pytest.mark.parametrize(("form", "causal"), [(TRIG, None), (RF, CAUSAL)], ids=["bidirectional", "causal"])
def test_the_critic_fits_the_fake_score_to_the_students_video(form, causal):
    made = objective(form, causal)

    def critic(w, student=0.7):
        networks = dataclasses.replace(NETWORKS, student=student)
        return made.critic(w, networks, BATCH, DRAWS, num_steps=2)[0]

    video = 0.7 * 2 * X0
    fake = network(0.5, Role.FAKE_SCORE)
    if form is TRIG:
        theta = rf_to_trig(SCORE_T)
        error = video - trig_denoiser(fake)(trig_noisy(video, SCORE_NOISE, theta), theta)
        want = jnp.square(error).sum((1, 2, 3, 4)) / jnp.sin(theta) ** 2
    else:
        error = fake(rf_noisy(video, SCORE_NOISE, SCORE_T), SCORE_T) - (SCORE_NOISE - video)
        want = jnp.square(error).mean((1, 2, 3, 4))
    np.testing.assert_allclose(critic(0.5), want, rtol=1e-5)
    assert jax.grad(lambda s: critic(0.5, s).sum())(0.7) == 0
    assert jax.grad(lambda w: critic(w).sum())(0.5) != 0


def test_a_teacher_learns_velocities_with_some_texts_dropped():
    draws = dataclasses.replace(DRAWS, dropped=jnp.array([False, True]))
    loss, parts = objective(name="diffusion").diffusion(0.5, BATCH, draws)
    x_t = rf_noisy(X0, NOISE, T)
    v = jnp.tanh(x_t + expand(T, X0)) * 0.5 + jnp.array([1.0, 0.0])[:, None, None, None, None]  # the texts' means
    np.testing.assert_allclose(loss, jnp.square(v - (NOISE - X0)).mean((1, 2, 3, 4)), rtol=1e-5)
    assert set(summary(parts)) == {"loss_diffusion", "bad_diffusion", "masked"}


@pytest.mark.parametrize("forcing", ["tf", "df"])
def test_a_causal_teacher_weighs_its_frames(forcing):
    causal = dataclasses.replace(CAUSAL, forcing=forcing, weighting="gaussian_bell")
    made = objective(RF, causal, name="diffusion", consistency_scale=10.0)
    chunks = jnp.array([[0.1, 0.5], [0.2, 0.9]])
    t = jnp.broadcast_to(T[:, None], (2, 3)) if forcing == "tf" else chunks[:, jnp.array([0, 1, 1])]
    loss, _ = made.diffusion(0.5, BATCH, dataclasses.replace(DRAWS, t=T if forcing == "tf" else chunks))
    v = jnp.tanh(rf_noisy(X0, NOISE, t) + expand(t, X0)) * 0.5 + 1.0
    error = jnp.square(v - (NOISE - X0)).mean((2, 3, 4))
    np.testing.assert_allclose(loss, 10 * (time_weight(t, "gaussian_bell") * error).sum(1), rtol=1e-5)


def test_dropped_texts_become_each_videos_own_null():
    dropped = jnp.array([True, False])
    one = drop_text(BATCH, NULL, dropped).text
    np.testing.assert_array_equal(one[0], NULL)
    np.testing.assert_array_equal(one[1], TEXT[1])
    each = drop_text(BATCH, jnp.stack([NULL + 7, NULL + 8]), jnp.array([True, True])).text
    np.testing.assert_array_equal(each.mean((1, 2)), [7, 8])
    assert drop_text(BATCH, NULL, None) is BATCH


def test_the_log_leaves_masked_samples_out():
    masked = jnp.array([True, False, False])
    part = {"loss": jnp.array([99.0, 1.0, 3.0]), "masked": masked, "g_norm": jnp.array([99.0, 5.0, 7.0])}
    got = summary({"consistency": part, "dmd": {"loss": jnp.array([1.0, 2.0, 3.0]), "masked": ~masked}})
    want = {"loss_consistency": 2.0, "tangent_norm": 6.0, "loss_dmd": 1.0, "masked": 3}
    bad = {name: got.pop(f"bad_{name}").tolist() for name in ("consistency", "dmd")}
    assert bad == {"consistency": masked.tolist(), "dmd": (~masked).tolist()}
    assert {k: float(v) for k, v in got.items()} == want
