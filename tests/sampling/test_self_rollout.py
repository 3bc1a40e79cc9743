import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.chunks import ChunkPattern
from rcm_jax.flow import rf_denoiser, rf_noisy
from rcm_jax.losses.distribution import dmd_loss
from rcm_jax.sampling.rollout import chunk_noises, rollout
from rcm_jax.sampling.schedules import RolloutSchedule
from rcm_jax.sampling.self_rollout import self_rollout
from rcm_jax.wan.causal import CausalDiT
from rcm_jax.wan.dit import DiT
from tests.tiny import MODEL as TINY
from tests.tiny import perturbed_params

MODEL = dataclasses.replace(TINY, remat=False)
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


@pytest.mark.parametrize("schedule", [CLEAN, NOISY], ids=["clean", "noisy context"])
def test_a_whole_simulation_is_the_sampler(params, schedule):
    video, last = jax.jit(lambda p: roll(p, schedule, 3))(params)
    sampled = jax.jit(lambda p: rollout(network(), p, TEXT, NOISES, schedule, frames=7))(params)
    np.testing.assert_allclose(video, sampled, atol=2e-5)
    assert last.shape == video.shape


@pytest.mark.parametrize("schedule", [CLEAN, NOISY], ids=["clean", "noisy context"])
@pytest.mark.parametrize("steps", [1, 2])
def test_replayed_is_plain(params, schedule, steps):
    """Video, last inputs and the gradient of a DMD loss, with a number of steps that the program does not know."""

    def loss(params, steps, replay):
        video, last = roll(params, schedule, steps, replay)
        scores = rf_denoiser(lambda x, t: 0.3 * x), rf_denoiser(lambda x, t: 0.7 * x)
        values, _ = dmd_loss(video, *scores, jnp.ones_like(video), jnp.full(2, 0.5), noisy=rf_noisy)
        return values.sum(), (video, last)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (plain, out), grads = run(params, jnp.int32(steps), False)
    (again, out_again), grads_again = run(params, jnp.int32(steps), True)
    np.testing.assert_allclose(plain, again, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), out, out_again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * jnp.abs(a).max() + 1e-6), grads, grads_again)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads["blocks"]))


def test_the_gradient_is_that_of_the_last_steps_alone(params):
    """By differences: context and earlier steps of a rollout at other parameters would move the video too."""
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    one = self_rollout(network(1), params, TEXT, NOISES, CLEAN, 1, frames=1)[0]

    def first_chunk(eps):
        moved = jax.tree.map(lambda p, d: p + eps * d, params, direction)
        return roll(moved, CLEAN, 1)[0][:, :1]

    np.testing.assert_allclose(first_chunk(0.0), one, atol=1e-5)
    numeric = (first_chunk(1e-3) - first_chunk(-1e-3)) / 2e-3  # chunk 0 with one step has nothing that is detached
    _, pull = jax.vjp(lambda p: roll(p, CLEAN, 1)[0][:, :1], params)
    analytic = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (pull(numeric)[0], direction)), strict=True))
    np.testing.assert_allclose(analytic, jnp.vdot(numeric, numeric), rtol=1e-2)

    def whole(p):
        return roll(p, CLEAN, 2)[0]

    video, pull = jax.vjp(whole, params)
    later = jnp.zeros_like(video).at[:, 3:].set(1)
    total = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (pull(later)[0], direction)), strict=True))
    ahead, behind = (jax.tree.map(lambda p, d, e=e: p + e * d, params, direction) for e in (1e-3, -1e-3))
    full = jnp.vdot(whole(ahead) - whole(behind), later) / 2e-3
    assert jnp.abs(total - full) > 0.02 * jnp.abs(full)  # the rest of the rollout would have had a share


def test_the_memory_of_replay_does_not_grow_with_the_chunks(params):
    def temporary(chunks, replay):
        def loss(params):
            return jnp.square(roll(params, CLEAN, jnp.int32(2), replay, frames=chunks, pattern="c1-1")[0]).sum()

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    plain, replayed = ([temporary(n, replay) for n in (4, 16)] for replay in (False, True))
    assert plain[1] - plain[0] > 4 * (replayed[1] - replayed[0])


def test_a_window_is_refused(params):
    windowed = CausalDiT(DiT(MODEL), ChunkPattern(1, 2), 7, SIZE, window=2)
    with pytest.raises(ValueError, match="network.window=2 must be None"):
        self_rollout(windowed, params, TEXT, NOISES, CLEAN, 1, frames=7)
