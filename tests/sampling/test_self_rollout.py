import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern
from rcm_jax.flow import rf_denoiser, rf_noisy
from rcm_jax.losses.distribution import dmd_loss
from rcm_jax.sampling.rollout import chunk_noises, rollout
from rcm_jax.sampling.schedules import RolloutSchedule
from rcm_jax.sampling.self_rollout import self_rollout
from rcm_jax.wan.dit import DiT
from tests.tiny import MODEL as TINY
from tests.tiny import perturbed_params

MODEL = dataclasses.replace(TINY, remat="none")
SIZE = (4, 4)
TEXT = jax.random.normal(jax.random.key(3), (2, 5, MODEL.text_dim))
CLEAN = RolloutSchedule(((1.0, 0.9, 0.6, 0.0),))
NOISY = RolloutSchedule(((1.0, 0.9, 0.6, 0.0), (1.0, 0.6, 0.0)), noisy_context_from=1)


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL)


def network(frames=7, pattern="c1-2"):
    return CausalDiT(DiT(MODEL), ChunkPattern.parse(pattern), frames, SIZE)


NOISES = chunk_noises(5, jnp.arange(2), 4, (*SIZE, MODEL.in_channels))


def roll(params, schedule, steps, replay=False, frames=7, pattern="c1-2"):
    return self_rollout(
        network(frames, pattern), params, TEXT, NOISES, schedule, steps, frames=frames, replay=replay
    )  # fmt: skip


@pytest.mark.parametrize(
    "schedule", [pytest.param(CLEAN, marks=pytest.mark.slow), NOISY], ids=["clean", "noisy context"]
)
def test_a_whole_simulation_is_the_sampler(params, schedule):
    video, last = jax.jit(lambda p: roll(p, schedule, 3))(params)
    sampled = jax.jit(lambda p: rollout(network(), p, TEXT, NOISES, schedule, frames=7))(params)
    np.testing.assert_allclose(video, sampled, atol=2e-5)
    assert last.shape == video.shape


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [CLEAN, NOISY],
    ids=["clean", "noisy context"],
)
def test_replayed_is_plain(params, schedule):
    """Video, last inputs and the gradient of a DMD loss, with a number of steps that the program does not know."""

    def loss(params, steps, replay):
        video, last = roll(params, schedule, steps, replay)
        scores = rf_denoiser(lambda x, t: 0.3 * x), rf_denoiser(lambda x, t: 0.7 * x)
        values, _ = dmd_loss(video, *scores, jnp.ones_like(video), jnp.full(2, 0.5), noisy=rf_noisy)
        return values.sum(), (video, last)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    for steps in (1, 2):
        (plain, out), grads = run(params, jnp.int32(steps), False)
        (again, out_again), replayed = run(params, jnp.int32(steps), True)
        np.testing.assert_allclose(plain, again, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), out, out_again)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max() + 1e-6),
            *jax.device_get((grads, replayed)),
        )
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(jax.device_get(grads["blocks"])))


@pytest.mark.long
def test_the_gradient_is_that_of_the_last_steps_alone(params):
    """By differences: context and earlier steps of a rollout at other parameters would move the video too."""
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    one = jax.jit(lambda p: self_rollout(network(1), p, TEXT, NOISES, CLEAN, 1, frames=1)[0])(params)

    def moved(eps):
        return jax.tree.map(lambda p, d: p + eps * d, params, direction)

    @jax.jit
    def whole(p, steps):
        return roll(p, CLEAN, steps)[0]

    @jax.jit
    def along(p, steps, cotangent):
        """The gradient's share along the direction."""
        (pulled,) = jax.vjp(lambda p: roll(p, CLEAN, steps)[0], p)[1](cotangent)
        return sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (pulled, direction)), strict=True))

    first = whole(params, 1).at[:, 1:].set(0)
    np.testing.assert_allclose(first[:, :1], one, atol=1e-5)
    numeric = (whole(moved(1e-3), 1) - whole(moved(-1e-3), 1)) / 2e-3
    numeric = numeric.at[:, 1:].set(0)  # chunk 0 with one step has nothing that is detached
    np.testing.assert_allclose(along(params, 1, numeric), jnp.vdot(numeric, numeric), rtol=1e-2)

    later = jnp.zeros_like(numeric).at[:, 3:].set(1)
    total = along(params, 2, later)
    full = jnp.vdot(whole(moved(1e-3), 2) - whole(moved(-1e-3), 2), later) / 2e-3
    assert jnp.abs(total - full) > 0.02 * jnp.abs(full)  # the rest of the rollout would have had a share


@pytest.mark.slow
def test_the_memory_of_replay_does_not_grow_with_the_chunks(params):
    def temporary(chunks, replay):
        def loss(params):
            return jnp.square(roll(params, CLEAN, jnp.int32(2), replay, frames=chunks, pattern="c1-1")[0]).sum()

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    plain, replayed = ([temporary(n, replay) for n in (4, 16)] for replay in (False, True))
    assert plain[1] - plain[0] > 4 * (replayed[1] - replayed[0])


def test_a_window_is_refused(params):
    windowed = CausalDiT(DiT(MODEL), ChunkPattern(1, 2), 7, SIZE, window=2)
    with pytest.raises(ValueError, match=r"the whole past in the cache, not Ring\(window=2"):
        self_rollout(windowed, params, TEXT, NOISES, CLEAN, 1, frames=7)
