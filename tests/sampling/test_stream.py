"""A stream gives the rollout's numbers, takes prompts on the way, and leaves nothing on the device."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.sinks import InfinityRope
from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.sampling.noise_control import Begin
from rcm_jax.sampling.prompts import Cut, PromptSchedule, Script
from rcm_jax.sampling.rollout import chunk_noises, open_branches, rollout, sample_chunk
from rcm_jax.sampling.schedules import few_step_schedule, ode_schedule
from rcm_jax.sampling.stream import Profile, profile, sample_step, stream
from rcm_jax.wan.dit import DiT
from tests.tiny import MODEL as TINY
from tests.tiny import perturbed_params

MODEL = dataclasses.replace(TINY, remat="none")
SIZE = (4, 4)
TEXT, OTHER = jax.random.normal(jax.random.key(3), (2, 2, 5, MODEL.text_dim))
NULL = jax.random.normal(jax.random.key(4), (5, MODEL.text_dim))
NULLS = jnp.stack([NULL, -NULL])
IMAGE = jax.random.normal(jax.random.key(8), (2, 1, *SIZE, MODEL.in_channels))
NOISES = chunk_noises(5, jnp.arange(2), 3, (*SIZE, MODEL.in_channels))
SCHEDULE = few_step_schedule([2])


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL)


def network(pattern="c1-2", frames=5, window=None, sink=0):
    return CausalDiT(DiT(MODEL), ChunkPattern.parse(pattern), frames, SIZE, window, sink)


def with_policy(policy):
    return dataclasses.replace(network("c1-1", 3), policy=policy)


@jax.jit
def running_sum(latents, state):
    """A decoder that needs its state: "frames" are the latents summed over all time so far."""
    total = jnp.cumsum(latents[..., :3], axis=1) + (0 if state is None else state)
    return total, total[:, -1:]


def streamed(causal, params, schedule=SCHEDULE, decode=running_sum, **kwargs):
    return stream(causal, params, TEXT, NOISES, schedule, decode, **kwargs)


@pytest.mark.parametrize(
    ("causal", "schedule", "frames", "image"),
    [
        pytest.param(
            network("c1-2"),
            few_step_schedule([3, 2], middle=(0.9, 0.6), noisy_context_from=1),
            5,
            None,
            marks=pytest.mark.slow,
        ),
        (network("c1-2", window=2), SCHEDULE, 11, None),
        pytest.param(network("c1-1", 3, window=2, sink=1), SCHEDULE, 8, None, marks=pytest.mark.long),
        pytest.param(network("c2-2", 4), ode_schedule(2, guidance=2.0), 4, None, marks=pytest.mark.slow),
        pytest.param(network("c1-2"), few_step_schedule([2], noisy_context_from=0), 5, IMAGE, marks=pytest.mark.slow),
    ],
    ids=["another first chunk", "past the horizon", "with a sink", "guided ODE", "image first"],
)
def test_a_stream_is_the_rollout(params, causal, schedule, frames, image):
    def whole(params):
        latents = rollout(causal, params, TEXT, NOISES, schedule, frames=frames, null_text=NULLS, image=image)
        return running_sum(latents, None)[0]

    spans = causal.pattern.spans(frames)
    parts = list(streamed(causal, params, schedule, chunks=len(spans), null_text=NULLS, image=image))
    assert [part.shape[1] for part in parts] == [b - a for a, b in spans]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), jax.jit(whole)(params), atol=2e-5)


@pytest.mark.long
def test_chunks_begin_where_they_are_told_until_there_are_no_more(params):
    causal, asked = network("c1-2"), []

    def begins(index, noise, times):
        asked.append((index, noise.shape, times))
        return Begin(times[0] * noise, jnp.asarray(times)) if index < 2 else None

    plain = list(streamed(causal, params))
    parts = list(streamed(causal, params, begins=begins))
    assert asked == [(i, (2, 1 + (i > 0), *SIZE, MODEL.in_channels), SCHEDULE.times[0]) for i in range(3)]
    assert [part.shape[1] for part in parts] == [1, 2]
    for part, want in zip(parts, plain, strict=False):  # the same noise at the same times is the same video
        np.testing.assert_allclose(part, want, atol=2e-5)


def test_times_that_are_traced_share_a_program(params):
    causal, asked = network("c1-1", 3), iter([(0.8, 0.5, 0.0), (0.7, 0.4, 0.0), (0.6, 0.3, 0.0)])
    before = sample_step._cache_size()
    ones = jnp.ones((2, 1, *SIZE, MODEL.in_channels))
    frames = streamed(causal, params, begins=lambda *_: Begin(ones, jnp.asarray(next(asked))))
    parts = list(frames)
    assert len(parts) == 3
    assert sample_step._cache_size() == before + 1


def test_a_prompt_changes_the_chunks_not_yet_begun(params):
    causal, latents_as_frames = network("c1-1", 3, window=2), lambda x, _: (x, None)
    frames = streamed(causal, params, decode=latents_as_frames, chunks=5)
    parts = [next(frames), next(frames)]
    assert frames.send(OTHER) is None  # chunk 2 is on its way
    parts += list(frames)
    assert len(parts) == 5

    def loop(params):
        (branch,) = open_branches(causal, params, TEXT, None, SCHEDULE)
        branches, out = (branch,), []
        for i in range(5):
            if i == 3:
                branches = (dataclasses.replace(branches[0], prompt=causal.prompt(params, OTHER)),)
            x, branches = sample_chunk(causal, params, branches, i, NOISES(i, 1), SCHEDULE.times[0])
            out.append(x)
        return out

    for part, want in zip(parts, jax.jit(loop)(params), strict=True):
        np.testing.assert_allclose(part, want, atol=2e-5)
    same = list(streamed(causal, params, decode=latents_as_frames, chunks=5))
    np.testing.assert_array_equal(parts[:3], same[:3])
    assert np.abs(parts[3] - same[3]).max() > 1e-2


@pytest.mark.slow
def test_a_cut_that_is_sent_is_one_that_was_planned(params):
    rope = functools.partial(InfinityRope, cache_blocks=2, f_limit=5, rope_cut_delta=3)
    text = Script((TEXT, OTHER), PromptSchedule((0, 3), cuts=(3,), blend=2))
    planned = with_policy(rope(cuts=(3,)))
    want = list(stream(planned, params, text, NOISES, SCHEDULE, lambda x, _: (x, None), chunks=5))
    frames = stream(with_policy(rope()), params, Script((TEXT,), PromptSchedule(blend=2)), NOISES, SCHEDULE,
                    lambda x, _: (x, None), chunks=5)  # fmt: skip
    got = [next(frames), next(frames)]
    compiled = sample_step._cache_size()
    frames.send(Cut(OTHER))  # of chunk 3: chunk 2 is on its way
    got += list(frames)
    assert sample_step._cache_size() == compiled
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(want), atol=2e-5)
    plain = streamed(network("c1-1", 3, window=2), params, chunks=3)
    next(plain)
    with pytest.raises(ArgumentError, match="cache_policy=Ring has no cuts"):
        plain.send(Cut(OTHER))


def test_a_script_is_prompts_sent_in_time(params):
    causal, latents_as_frames = network("c1-1", 3, window=2), lambda x, _: (x, None)
    script = Script((TEXT, OTHER), PromptSchedule((0, 2)))
    planned = list(stream(causal, params, script, NOISES, SCHEDULE, latents_as_frames, chunks=4))
    frames = streamed(causal, params, decode=latents_as_frames, chunks=4)
    sent = [next(frames)]
    frames.send(OTHER)  # of chunk 2: chunk 1 is on its way
    for part, want in zip(planned, [*sent, *frames], strict=True):
        np.testing.assert_array_equal(part, want)

    blended = dataclasses.replace(script, schedule=PromptSchedule((0, 2), blend=2))
    halfway = list(stream(causal, params, blended, NOISES, SCHEDULE, latents_as_frames, chunks=4))
    mixed = Script((TEXT, (TEXT + OTHER) / 2, OTHER), PromptSchedule((0, 2, 3)))
    for part, want in zip(halfway, stream(causal, params, mixed, NOISES, SCHEDULE, latents_as_frames), strict=False):
        np.testing.assert_allclose(part, want, atol=1e-5)
    assert np.abs(halfway[2] - planned[2]).max() > 1e-2

    replaced = stream(causal, params, script, NOISES, SCHEDULE, latents_as_frames, chunks=4)
    next(replaced)
    replaced.send(TEXT)  # in place of the other prompt, which would come at chunk 2
    np.testing.assert_array_equal(list(replaced)[2], list(streamed(causal, params, decode=latents_as_frames,
                                                                   chunks=4))[3])  # fmt: skip


def test_a_second_stream_compiles_nothing(params, caplog):
    def play(seed):
        return list(stream(network(), params, TEXT, chunk_noises(seed, jnp.arange(2), 2, NOISES.size), SCHEDULE,
                           running_sum))  # fmt: skip

    play(0)
    with jax.log_compiles():
        caplog.clear()
        other = play(1)
    assert not [record for record in caplog.records if "Compiling" in record.message]
    assert np.abs(other[0] - play(0)[0]).max() > 0.1


def test_a_prompt_sent_after_the_last_chunk_is_not_an_error(params):
    frames = streamed(network(), params, chunks=1)
    for _ in frames:
        assert frames.send(OTHER) is None


def caches(causal):
    """The buffers on the devices that have a cache's shape."""
    shape = causal.init_cache(2).k.shape
    return [x for x in jax.live_arrays() if x.shape == shape]


def test_a_reader_that_goes_away_frees_the_cache(params):
    causal = network("c1-2", window=2)
    frames = streamed(causal, params)
    next(frames)
    assert len(caches(causal)) == 2  # one of keys, one of values, though chunks were sampled on them
    frames.close()
    assert not caches(causal)

    for i, _ in enumerate(streamed(causal, params, image=IMAGE)):  # without an end
        assert len(caches(causal)) == 2
        if i == 3:
            break
    assert not caches(causal)

    def broken(latents, state):
        raise RuntimeError("the decoder broke")

    with pytest.raises(RuntimeError, match="the decoder broke") as kept:  # the traceback keeps the frames alive
        next(streamed(causal, params, decode=broken))
    assert kept.tb is not None
    assert not caches(causal)


@pytest.mark.slow
def test_what_the_caller_gave_is_left_alone(params):
    whole = jax.tree.leaves((params, TEXT, NULL, IMAGE))
    list(streamed(network(), params, ode_schedule(2, guidance=2.0), null_text=NULL, image=IMAGE))
    assert not any(x.is_deleted() for x in whole)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"chunks": 4}, r"chunks=4 do not fit a cache of 5 latent frames \(3 chunks\); give a window"),
        ({"script": (0, 3)}, "a prompt starts at chunk 3; the video has 3"),
        ({"chunks": 0}, "chunks=0 must be at least 1"),
        (
            {"schedule": few_step_schedule([2], noisy_context_from=3)},
            "noisy_context_from=3 is beyond the last chunk, 2",
        ),
        ({"schedule": few_step_schedule([2] * 4)}, "times for 4 chunks; the video has 3"),
        ({"schedule": ode_schedule(2, guidance=2.0)}, "needs the unconditional text"),
        ({"image": jnp.tile(IMAGE, (1, 2, 1, 1, 1))}, "an image is a first chunk of 1 latent frame"),
    ],
)
def test_what_cannot_be_streamed_is_said_at_once(params, kwargs, message):
    starts = kwargs.pop("script", (0,))
    script = Script((TEXT, OTHER)[: len(starts)], PromptSchedule(starts))
    with pytest.raises(ValueError, match=message):
        stream(network(), params, script, NOISES, kwargs.pop("schedule", SCHEDULE), running_sum, **kwargs)


def test_profile(params):
    seen, clock = [], itertools.count()
    parts, times = profile(lambda: streamed(network(), params), lambda part: seen.append(next(clock)))
    assert times.frames == (1, 2, 2)
    assert len(parts) == len(seen) == 3
    assert 0 < times.first <= times.seconds[1] <= times.seconds[2]
    known = Profile((0.5, 0.7, 1.0), (1, 4, 4))
    assert known.first == 0.5
    assert known.chunk == pytest.approx(0.25)
    assert known.rate == pytest.approx(16.0)
    assert np.isnan(Profile((0.5,), (1,)).rate)
