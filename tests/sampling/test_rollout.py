import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkPattern
from rcm_jax.sampling.rollout import chunk_noises, equal_chunks, given_noises, open_branches, rollout, sample_chunk
from rcm_jax.sampling.schedules import RolloutSchedule, few_step_schedule, ode_schedule
from rcm_jax.wan.dit import DiT
from tests.tiny import MODEL as TINY
from tests.tiny import perturbed_params

MODEL = dataclasses.replace(TINY, remat="none")
SIZE = (4, 4)
TEXT = jax.random.normal(jax.random.key(3), (3, 5, MODEL.text_dim))
NULL = jax.random.normal(jax.random.key(4), (5, MODEL.text_dim))


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL)


def network(pattern="c1-2", frames=7, window=None, sink=0):
    return CausalDiT(DiT(MODEL), ChunkPattern.parse(pattern), frames, SIZE, window, sink)


def noises(indices, count=4, seed=5):
    return chunk_noises(seed, jnp.asarray(indices), count, (*SIZE, MODEL.in_channels))


def one_by_one(causal, params, draws, schedule, frames, null_text=None):
    """The video chunk by chunk from Python, without scans over chunks."""
    branches = open_branches(causal, params, TEXT, null_text, schedule)
    parts = []
    for i, (a, b) in enumerate(causal.pattern.spans(frames)):
        times, noisy = schedule.chunk(i)
        x, branches = sample_chunk(
            causal, params, branches, i, draws(i, b - a), times, noisy_context=noisy, ode=schedule.ode,
            guidance=schedule.guidance,
        )  # fmt: skip
        parts.append(x)
    return jnp.concatenate(parts, axis=1)


SCHEDULES = {
    "2 steps": few_step_schedule([2]),
    "1 step": few_step_schedule([1]),
    "4 then 2, noisy context": few_step_schedule([3, 2], middle=(0.9, 0.6), noisy_context_from=1),
    "ode": ode_schedule(3, guidance=2.0),
}


@pytest.mark.parametrize(
    ("name", "window"),
    [
        pytest.param("ode", None, marks=pytest.mark.slow),
        pytest.param("2 steps", 2, marks=pytest.mark.slow),
        pytest.param("4 then 2, noisy context", None, marks=pytest.mark.long),
        ("1 step", None),
        pytest.param("2 steps", None, marks=pytest.mark.slow),
    ],
)
def test_the_scan_is_the_loop(params, name, window):
    causal, schedule = network(window=window), SCHEDULES[name]
    draws = noises([0, 1, 2])
    video = jax.jit(lambda p: rollout(causal, p, TEXT, draws, schedule, frames=5, null_text=NULL))(params)
    assert video.shape == (3, 5, *SIZE, MODEL.in_channels)
    loop = jax.jit(lambda p: one_by_one(causal, p, draws, schedule, 5, NULL))(params)
    np.testing.assert_allclose(video, loop, atol=2e-5)


@pytest.mark.long
def test_every_video_has_its_own_negative_prompt(params):
    """As if it were sampled alone; and one for all is one for each."""
    causal, schedule, each = network(frames=3), ode_schedule(1, guidance=2.0), jnp.stack([NULL, -NULL, NULL + 1])

    @jax.jit
    def run(params, rows, null):
        return rollout(causal, params, TEXT[rows], noises(rows), schedule, frames=3, null_text=null)

    together = run(params, jnp.arange(3), each)
    for i in range(3):
        np.testing.assert_allclose(together[i : i + 1], run(params, jnp.array([i]), each[i]), atol=2e-5)
    assert jnp.abs(together[1] - run(params, jnp.arange(3), NULL)[1]).max() > 1e-2
    with pytest.raises(ValueError, match=r"has shape \(2, 5, 64\)"):
        run(params, jnp.arange(3), each[:2])


def sample(causal, params, indices=(0, 1, 2), *, frames, image=None):
    def run(params, text, image):
        return rollout(causal, params, text, noises(indices), SCHEDULES["2 steps"], frames=frames, image=image)

    return jax.jit(run)(params, TEXT[jnp.array(indices)], image)


@pytest.mark.slow
def test_a_video_is_the_same_in_every_batch(params):
    whole, alone = sample(network(), params, frames=5), sample(network(), params, (2,), frames=5)
    np.testing.assert_allclose(whole[2:], alone, atol=2e-5)
    assert jnp.abs(whole[0] - whole[1]).max() > 0.1


@pytest.mark.slow
def test_a_longer_video_begins_with_the_shorter(params):
    causal = network(window=2, sink=1)
    short, long = sample(causal, params, frames=5), sample(causal, params, frames=9)
    np.testing.assert_allclose(short, long[:, :5], atol=2e-5)


def test_an_image_is_the_first_frame(params):
    image = jax.random.normal(jax.random.key(8), (3, 1, *SIZE, MODEL.in_channels))
    video = sample(network(), params, frames=5, image=image)
    np.testing.assert_array_equal(video[:, :1], image)
    other = sample(network(), params, frames=5, image=image + 1)
    assert jnp.abs(video[:, 1:] - other[:, 1:]).max() > 1e-2  # the image is in the cache
    with pytest.raises(ValueError, match="an image is a first chunk of 1 latent frame"):
        sample(network("c3-2"), params, frames=7, image=image)


def test_equal_chunks_are_one_scan():
    spans = ChunkPattern(1, 2).spans(9)
    assert equal_chunks(few_step_schedule([4]), spans, 0) == [(0, 1), (1, 5)]
    assert equal_chunks(few_step_schedule([4, 2], noisy_context_from=3), spans, 0) == [(0, 1), (1, 3), (3, 5)]
    assert equal_chunks(few_step_schedule([4]), ChunkPattern(2, 2).spans(8), 1) == [(1, 4)]


def test_published_presets():
    first = 1600 / 1601
    assert few_step_schedule([4]).times == ((first, 15 / 16, 5 / 6, 5 / 8, 0.0),)
    two = few_step_schedule([4, 2], middle_by_entry=[[15 / 16, 5 / 6, 5 / 8], [5 / 6]])
    assert two.chunk(0)[0] == (first, 15 / 16, 5 / 6, 5 / 8, 0.0)
    assert two.chunk(9) == ((first, 5 / 6, 0.0), False)
    assert few_step_schedule([4, 1]).chunk(1)[0] == (first, 0.0)
    assert ode_schedule(50).times[0][0] == pytest.approx(first)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: few_step_schedule([5]), "5 steps must be 1..4"),
        (lambda: few_step_schedule([2], middle_by_entry=[[0.9, 0.5]]), "2 steps need 1 middle times, not 2"),
        (lambda: few_step_schedule([2, 1], middle_by_entry=[[0.9]]), "1 schedules of middle times for 2 step counts"),
        (lambda: few_step_schedule([3], middle=(0.5, 0.9)), "times of chunk 0 are .* must fall"),
        (lambda: RolloutSchedule(((1.0, 0.5),)), "must fall from at most 1 to 0"),
        (lambda: ode_schedule(0), "num_steps=0 must be at least 1"),
        (lambda: few_step_schedule([4], noisy_context_from=-1), "noisy_context_from=-1 must be a chunk"),
    ],
)
def test_schedules_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_and_caches_that_do_not_fit_the_video(params):
    def make(causal, schedule, frames=7):
        return rollout(causal, params, TEXT, noises([0, 1, 2]), schedule, frames=frames)

    with pytest.raises(ValueError, match="noisy_context_from=4 is beyond the last chunk, 3"):
        make(network(), few_step_schedule([2], noisy_context_from=4))
    with pytest.raises(ValueError, match="times for 5 chunks; the video has 4"):
        make(network(), few_step_schedule([2] * 5))
    with pytest.raises(ValueError, match="frames=9 do not fit a cache of 7"):
        make(network(), few_step_schedule([2]), frames=9)
    with pytest.raises(ValueError, match="needs the unconditional text"):
        make(network(), ode_schedule(2, guidance=3.0))


def test_given_noises_are_cut_by_chunk():
    whole = jnp.arange(2 * 7.0).reshape(2, 1, 7, 1, 1, 1)
    cut = given_noises(whole, ChunkPattern(1, 2))
    np.testing.assert_array_equal(cut(0, 1)[:, 0, :, 0, 0, 0], [[0], [7]])
    np.testing.assert_array_equal(jax.jit(lambda i: cut(i, 2))(2)[:, 0, :, 0, 0, 0], [[3, 4], [10, 11]])


def test_networks_are_hashable():
    assert hash(dataclasses.replace(network(), window=2)) != hash(network())
