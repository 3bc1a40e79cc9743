"""The stream batch: rows of steps in one pass. Its published numbers are in the golden kind v2v_stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.slots import SlotRing
from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.sampling import stream_batch as rows
from rcm_jax.sampling.noise_control import Begin, published_levels
from rcm_jax.sampling.rollout import chunk_noises
from rcm_jax.sampling.schedules import RolloutSchedule, ode_schedule
from rcm_jax.wan.dit import DiT
from tests.tiny import MODEL as TINY
from tests.tiny import perturbed_params

MODEL = dataclasses.replace(TINY, remat="none")
SIZE = (2, 4)
TEXT, OTHER = jax.random.normal(jax.random.key(3), (2, 2, 5, MODEL.text_dim))
NOISES = chunk_noises(5, jnp.arange(2), 3, (*SIZE, MODEL.in_channels))
THREE = RolloutSchedule(((0.8, 0.6, 0.3, 0.0),))
FIXED = SlotRing(6, 3, -1.0)


@pytest.fixture(scope="module")
def params():
    return perturbed_params(MODEL)


def network(pattern="c2-1"):
    pattern = ChunkPattern.parse(pattern)
    return CausalDiT(DiT(MODEL), pattern, pattern.first, SIZE)


def begins(count=None):
    """Chunks of noise, at times that fall from chunk to chunk: every other one."""

    def begin(index, noise, times):
        if index == count:
            return None
        return Begin(times[0] * noise, jnp.asarray(times) * (1 - index % 2 / 8))

    return begin


def streamed(params, ring=FIXED, schedule=THREE, count=None, pattern="c2-1", decode=lambda x, _: (x, None), **kwargs):
    return rows.stream_batch(
        network(pattern), ring, params, TEXT, NOISES, schedule, decode, begins(count), **kwargs
    )  # fmt: skip


@pytest.mark.slow
def test_one_step_is_the_same_in_rows_and_in_turn(params):
    """Nothing is in a row before it then; the sink adapts in both."""
    ring, schedule = SlotRing(4, 2, 0.9), RolloutSchedule(((0.8, 0.0),))
    one, other = (
        np.concatenate(list(streamed(params, ring, schedule, chunks=8, one_by_one=by)), axis=1) for by in (True, False)
    )
    assert one.shape[1] == 9
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_the_first_chunk_is_the_same_and_later_ones_see_their_own_step(params):
    together, apart = (list(streamed(params, chunks=6, one_by_one=by)) for by in (False, True))
    assert [part.shape[1] for part in together] == [part.shape[1] for part in apart] == [2, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(together[0], apart[0], atol=2e-5)
    assert np.abs(together[-1] - apart[-1]).max() > 1e-4


@pytest.mark.parametrize(("count", "chunks"), [(5, None), (None, 5), (3, None), (2, None), (1, None), (5, 3)])
def test_all_that_came_in_comes_out(params, count, chunks):
    """And what comes after it is of no effect: chunks of a row know nothing of the rows behind them."""
    whole = list(streamed(params, chunks=7))
    got = list(streamed(params, count=count, chunks=chunks))
    assert len(got) == min(count or 9, chunks or 9)
    for part, want in zip(got, whole, strict=False):
        np.testing.assert_allclose(part, want, atol=2e-5)


def test_input_without_a_chunk_gives_nothing(params):
    assert list(streamed(params, count=0)) == []


def test_one_program_and_as_much_memory_for_every_tick(params):
    """Without an end; past what is cached, and while the rows still fill."""
    parts, sizes, live = streamed(params, SlotRing(6, 3, 0.5)), [], []
    for _ in range(14):
        next(parts)
        sizes.append((rows.tick._cache_size(), rows.in_turn._cache_size(), rows._row_noises._cache_size()))
        live.append(sum(x.nbytes for x in jax.live_arrays()))
    assert sizes[1] == sizes[-1]
    assert len(set(live[3:])) == 1
    parts.close()
    assert sum(x.nbytes for x in jax.live_arrays()) < live[-1]


def test_the_cache_is_written_in_place(params):
    """The compiled tick has one copy of the caches, which it gives back where they were."""
    how = rows.StreamBatch(network(), FIXED, 3)
    begin = rows.Coming(jnp.zeros((1, 2, *SIZE, MODEL.in_channels)), *[jnp.asarray(THREE.times[0])] * 2)
    state = rows.rows_after(how, how.open(1), begin)
    prompt = how.network.prompt(params, TEXT[:1])
    begin = begin._replace(start=begin.start[:, :1])
    eps = jnp.zeros((2, *begin.start.shape))
    compiled = rows.tick.lower(how, params, prompt, state, begin, jnp.int32(2), eps).compile()
    cache = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache


def test_a_video_is_the_same_in_every_batch(params):
    """The sink adapts to each by itself."""
    ring = SlotRing(5, 3, 0.95)

    def made(texts, index):
        noises = chunk_noises(5, jnp.asarray(index), 3, (*SIZE, MODEL.in_channels))
        parts = rows.stream_batch(
            network(), ring, params, texts, noises, THREE, lambda x, _: (x, None), begins(), chunks=9
        )
        return np.concatenate(list(parts), axis=1)

    both = made(TEXT, [0, 1])
    np.testing.assert_allclose(made(TEXT[1:], [1]), both[1:], atol=2e-5)


@pytest.mark.slow
def test_the_sink_adapts(params):
    def made(threshold, pattern="c2-1"):
        ring = SlotRing(6, 3, threshold)
        return np.concatenate(list(streamed(params, ring, pattern=pattern, chunks=8)), axis=1)

    for pattern in ("c2-1", "c1-1"):
        assert np.abs(made(0.999, pattern) - made(-1.0, pattern)).max() > 1e-4
    np.testing.assert_array_equal(made(0.999, "c1-2"), made(-1.0, "c1-2"))  # of one frame alone


def test_a_prompt_changes_all_that_is_under_way(params):
    parts, want = streamed(params, chunks=6), list(streamed(params, chunks=6))
    got = [next(parts), next(parts)]
    assert parts.send(OTHER) is None
    got += list(parts)
    assert len(got) == 6
    differs = [np.abs(a - b).max() > 1e-4 for a, b in zip(got, want, strict=True)]
    assert differs == [False, False, False, True, True, True]


def test_published_levels_are_near_their_times():
    times = jnp.asarray([0.7, 0.5, 0.4, 0.0])
    levels = published_levels(times)
    np.testing.assert_allclose(levels, times, atol=7e-4)
    assert levels[-1] == 0
    assert levels[0] != times[0]


@pytest.mark.parametrize("schedule", [ode_schedule(2), RolloutSchedule(((0.8, 0.4, 0.0), (0.8, 0.0)))])
def test_all_chunks_take_the_same_few_steps(params, schedule):
    with pytest.raises(ValueError, match="all chunks down the same few steps"):
        streamed(params, schedule=schedule)


def test_a_ring_that_is_all_sink_is_refused(params):
    with pytest.raises(ArgumentError, match="num_kv_cache=4 must be at least 5"):
        streamed(params, SlotRing(4, 4))
