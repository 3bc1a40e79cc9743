"""Networks bound to a batch: who is guided, who sees which text, context and condition, and the student's own video."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.data.batch import Batch
from rcm_jax.flow import expand, rf_noisy, rf_to_trig, trig_denoiser, trig_noisy, trig_to_rf
from rcm_jax.objectives.binding import Bidirectional, Causal, Role, Sizes
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.objectives.draws import Draws
from rcm_jax.sampling.rollout import given_noises, rollout
from rcm_jax.wan.dit import DiT, velocity
from tests.tiny import IMAGE_TOKENS, perturbed_params
from tests.tiny import MODEL as TINY

MODEL = dataclasses.replace(TINY, num_layers=1, remat="none")
SHAPE = (2, 5, 4, 4, MODEL.out_channels)
GUIDED = (Role.TEACHER, Role.SCORE_TEACHER)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X0, X, NOISE = (normal(i, *SHAPE) for i in range(3))
TEXT, NULL = normal(3, 2, MODEL.text_len, MODEL.text_dim), normal(4, MODEL.text_len, MODEL.text_dim)
T = jnp.array([0.4, 0.9])
BATCH = Batch(X0, TEXT)


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL)


def at(binder, params, role, batch=BATCH, draws=None):
    return jax.jit(lambda p, batch, draws: binder.bind(p, batch, role, draws)(X, T))(params, batch, draws)


@pytest.mark.parametrize("role", Role)
def test_teachers_are_guided_and_the_others_are_not(params, role):
    binder = Bidirectional(Sizes.all(DiT(MODEL)), NULL, 3.0)
    plain = jax.jit(lambda p, text: velocity(DiT(MODEL), p, text)(X, T))
    cond, uncond = plain(params, TEXT), plain(params, jnp.stack([NULL, NULL]))
    want = uncond + 3.0 * (cond - uncond) if role in GUIDED else cond
    np.testing.assert_allclose(at(binder, params, role), want, atol=1e-5)


@pytest.mark.parametrize(
    "image_dim", [pytest.param(None, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.long)]
)
def test_every_role_sees_the_condition(image_dim):
    """Image-to-video: mask and image behind the noise, and CLIP's tokens where the network takes them."""
    model = dataclasses.replace(MODEL, in_channels=MODEL.out_channels + 4, image_dim=image_dim)
    params, binder = perturbed_params(model), Bidirectional(Sizes.all(DiT(model)), NULL, 3.0)
    condition = normal(5, *SHAPE[:-1], 4)
    image = None if image_dim is None else normal(6, 2, IMAGE_TOKENS, image_dim)
    batch = dataclasses.replace(BATCH, condition=condition, image=image)
    others = [dataclasses.replace(batch, condition=condition + 1)]
    if image is not None:
        others.append(dataclasses.replace(batch, image=image[..., ::-1]))
    for role in Role:
        seen = at(binder, params, role, batch)
        assert seen.shape == SHAPE
        for other in others:
            assert jnp.abs(seen - at(binder, params, role, other)).max() > 1e-3, role
    with pytest.raises(ValueError, match="latents have 12 channels; the network takes 16, 4 of them the condition"):
        binder.bind(params, BATCH, Role.STUDENT, None)(X, T)


@pytest.mark.parametrize(
    "fixed", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.long)]
)
def test_the_own_video_is_the_samplers(params, fixed):
    """By hand: `num_steps` denoisings at falling times, and a gradient through the last one alone."""
    binder, noises = Bidirectional(Sizes.all(DiT(MODEL)), NULL, 3.0), normal(7, 3, *SHAPE)
    draws = Draws(simulation_noises=noises, simulation_t=None if fixed else jnp.array([[0.9, 0.3], [0.7, 0.6]]))
    if fixed:
        times = jnp.broadcast_to(jnp.array([np.pi / 2, 1.5, 1.4])[:, None], (3, 2))
    else:  # the second sample's second time would rise
        times = jnp.stack([jnp.full(2, np.pi / 2), *rf_to_trig(jnp.array([[0.9, 0.3], [0.7, 0.3]]))])

    @functools.partial(jax.jit, static_argnums=1)
    def by_hand(params, steps):
        z = noises[0]
        for i in range(steps - 1):
            x0 = trig_denoiser(velocity(DiT(MODEL), params, TEXT))(z, times[i])
            z = jax.lax.stop_gradient(trig_noisy(x0, noises[i + 1], times[i + 1]))
        return trig_denoiser(velocity(DiT(MODEL), params, TEXT))(z, times[steps - 1]), z

    own_video = jax.jit(lambda p, n: binder.own_video(p, BATCH, draws, n))
    for steps in (1, 3):
        own = own_video(params, steps)
        video, z = by_hand(params, steps)
        np.testing.assert_allclose(own[0], video, atol=1e-5)
        np.testing.assert_allclose(own[1]["G_xt"], z, atol=1e-5)
        np.testing.assert_array_equal(own[1]["G_time"], times[steps - 1])
    got = jax.jit(jax.grad(lambda p: (X * binder.own_video(p, BATCH, draws, 2)[0]).sum()))(params)
    want = jax.jit(jax.grad(lambda p: (X * by_hand(p, 2)[0]).sum()))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


@dataclasses.dataclass(frozen=True)
class Plain(Bidirectional):
    """Of a student that is a formula."""

    def bind(self, params, batch, role, draws):
        return lambda x, t: params * jnp.tanh(x) + expand(t, x)


def way(side, draws):
    """Inputs and times of the last of 1, 2, … simulated steps, times as RF times, and the videos."""
    binder = Plain(Sizes.all(DiT(MODEL)), NULL, 3.0, t_range=side)
    owns = [binder.own_video(0.5, BATCH, draws, n) for n in range(1, len(draws.simulation_noises) + 1)]
    return [own["G_xt"] for _, own in owns], jnp.stack([trig_to_rf(own["G_time"]) for _, own in owns])


@pytest.mark.parametrize("fixed", [False, True])
def test_the_expert_for_high_noise_simulates_its_steps_alone(fixed):
    noises, drawn = normal(7, 2, *SHAPE), jnp.array([[0.95, 0.91]])
    starts, times = way((0.9, 1.0), Draws(simulation_noises=noises, simulation_t=None if fixed else drawn))
    np.testing.assert_array_equal(starts[0], noises[0])
    want = [[1, 1], [0.93378, 0.93378] if fixed else [0.95, 0.91]]  # 0.934: the sampler's second, theta 1.5
    np.testing.assert_allclose(times, want, rtol=1e-4)


@pytest.mark.parametrize("fixed", [False, True])
def test_the_expert_for_low_noise_begins_with_data_noised_to_the_boundary(fixed):
    """Or, with the sampler's own times, to the first of them on its side."""
    noises, drawn = normal(7, 2, *SHAPE), jnp.array([[0.7, 0.2]])
    starts, times = way((0.0, 0.9), Draws(simulation_noises=noises, simulation_t=None if fixed else drawn))
    want = [[0.85290] * 2, [0.60898] * 2] if fixed else [[0.9, 0.9], [0.7, 0.2]]  # theta 1.4 and 1.0
    np.testing.assert_allclose(times, want, rtol=1e-4)
    seen = starts[0] * expand(1 / (jnp.cos(rf_to_trig(times[0])) + jnp.sin(rf_to_trig(times[0]))), X0)
    np.testing.assert_allclose(seen, rf_noisy(X0, noises[0], times[0]), atol=1e-5)


NOISY = CausalConfig(pattern="c1-2", steps_per_chunk=(3, 2), noisy_context_from=1, score_guidance=2.0)


def causal(settings=NOISY, **kwargs):
    return Causal(Sizes.all(DiT(MODEL)), NULL, 3.0, settings, **kwargs)


def test_the_students_context_is_noised_from_its_chunk_on():
    """Each chunk to the last time of its own schedule: 5/6 of the first's three steps, 15/16 of the others' two."""
    context, t = causal().context(BATCH, Draws(context_noise=NOISE))
    want_t = jnp.broadcast_to(jnp.array([0, 15 / 16, 15 / 16, 15 / 16, 15 / 16]), (2, 5))
    np.testing.assert_allclose(t, want_t)
    np.testing.assert_allclose(context, rf_noisy(X0, NOISE, want_t), atol=1e-6)
    _, t = causal(dataclasses.replace(NOISY, noisy_context_from=0)).context(BATCH, Draws(context_noise=NOISE))
    np.testing.assert_allclose(t[0], [5 / 6, *[15 / 16] * 4])
    context, t = causal(dataclasses.replace(NOISY, noisy_context_from=-1)).context(BATCH, Draws())
    np.testing.assert_array_equal(context, X0)
    np.testing.assert_array_equal(t, jnp.zeros((2, 5)))


def test_only_the_student_sees_noisy_context(params):
    one, other = (Draws(context_noise=NOISE + i) for i in range(2))
    network = causal().network(BATCH)
    for role in (Role.STUDENT, Role.TANGENT):
        got = at(causal(), params, role, draws=one)
        forced = jax.jit(lambda p: network.forced_velocity(p, TEXT, *causal().context(BATCH, one))(X, T))(params)
        np.testing.assert_allclose(got, forced, atol=1e-5)
        assert jnp.abs(got - at(causal(), params, role, draws=other)).max() > 1e-3
    teacher = at(causal(), params, Role.TEACHER, draws=one)
    forced = jax.jit(lambda p, text: network.forced_velocity(p, text, X0)(X, T))
    cond, uncond = forced(params, TEXT), forced(params, jnp.stack([NULL, NULL]))
    np.testing.assert_allclose(teacher, uncond + 3.0 * (cond - uncond), atol=1e-5)


def test_the_scores_of_self_forcing_see_whole_videos(params):
    whole = Bidirectional(Sizes.all(DiT(MODEL)), NULL, 2.0)
    for role in (Role.FAKE_SCORE, Role.SCORE_TEACHER):
        np.testing.assert_allclose(at(causal(), params, role), at(whole, params, role), atol=1e-6)


def test_diffusion_forcing_has_no_context(params):
    want = jax.jit(lambda p: causal().network(BATCH).velocity(p, TEXT)(X, T))(params)
    np.testing.assert_allclose(at(causal(forced=False), params, Role.STUDENT), want, atol=1e-6)


@pytest.mark.parametrize("replay", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_own_causal_video_is_the_rollout(params, replay):
    binder, noises = causal(dataclasses.replace(NOISY, replay=replay)), normal(7, 4, *SHAPE)
    video, own = jax.jit(lambda p: binder.own_video(p, BATCH, Draws(simulation_noises=noises), 3))(params)
    network, schedule = binder.network(BATCH), binder.settings.schedule(np.inf)
    whole = given_noises(noises, network.pattern)
    want = jax.jit(lambda p: rollout(network, p, TEXT, whole, schedule, frames=5))(params)
    np.testing.assert_allclose(video, want, atol=2e-5)
    assert own["G_xt"].shape == SHAPE


def test_a_causal_network_refuses_a_condition(params):
    for name in ("condition", "image"):
        with pytest.raises(ValueError, match="image is its first latent frame"):
            causal().bind(params, dataclasses.replace(BATCH, **{name: X}), Role.STUDENT, Draws())
