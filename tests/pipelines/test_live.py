"""Videos that are made side by side are those that are made alone."""

import dataclasses

import jax
import numpy as np
import pytest

import rcm_jax
from rcm_jax.errors import ArgumentError
from rcm_jax.pipelines.live import Live, Pushed, advance, endless_policy
from rcm_jax.sampling import together

PROMPTS = ["a red circle moving left", "a blue square moving up", "a green circle moving right"]
WINDOW = dict(cache_policy="sliding_window", window_blocks=2, num_steps=2)


@pytest.fixture(scope="module")
def pipe():
    return rcm_jax.load("toy_causal")


def frames(part):
    if isinstance(part, Exception):
        raise part
    return np.asarray(part.frames[0])


def made(live, chunks):
    return [frames(advance([live])[0]) for _ in range(chunks)]


def same(some, others):
    for one, other in zip(some, others, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_alone_it_is_the_stream(pipe):
    live = Live(pipe, PROMPTS[0], seed=3, **WINDOW)
    same(made(live, 5), [part[0] for part in pipe.stream(PROMPTS[0], seed=3, **WINDOW)])
    assert live.chunk_frames == (1, 2)
    live.close()


@pytest.mark.parametrize(
    ("pattern", "frames", "blocks"), [("c1-2", 9, 4), ("c3-3", 21, 6), ("c1-1", 21, 20), ("c1-4", 5, 2)]
)
def test_without_a_word_a_video_keeps_as_much_as_the_network_was_made_for(pipe, pattern, frames, blocks):
    """With the chunk that is made."""
    info = dataclasses.replace(pipe.info, latent_shape=(frames, 6, 6), causal={"pattern": pattern})
    assert endless_policy(info) == {"cache_policy": "sliding_window", "window_blocks": blocks, "sw_sink_blocks": 1}


@pytest.mark.long
def test_together_they_are_what_they_are_alone(pipe):
    """However far each is, and in passes of any size."""
    alone = [made(Live(pipe, prompt, seed=i, **WINDOW), 5) for i, prompt in enumerate(PROMPTS)]
    lives = [Live(pipe, prompt, seed=i, **WINDOW) for i, prompt in enumerate(PROMPTS)]
    parts = [[frames(advance(lives[:1])[0])], [], []]
    for _ in range(4):
        for part, got in zip(parts, advance(lives, (2, 1)), strict=True):
            part.append(frames(got))
    for got, want in zip(parts, alone, strict=True):
        same(got, want[: len(got)])


def test_those_that_fit_share_a_pass(pipe, monkeypatch):
    passes = []

    def counted(network, params, rows, steps):
        passes.append(len(rows))
        return together.sample_together(network, params, rows, steps)

    monkeypatch.setattr("rcm_jax.pipelines.live.sample_together", counted)
    lives = [Live(pipe, prompt, **WINDOW) for prompt in PROMPTS]
    advance(lives, (2, 1))
    assert passes == [2, 1]
    passes.clear()
    lives.append(Live(pipe, PROMPTS[0], **WINDOW))  # whose first chunk is of another size
    advance(lives, (2, 1))
    assert sorted(passes) == [1, 1, 2]


def test_what_is_said_holds_from_the_next_chunk_on(pipe):
    plain, live = Live(pipe, PROMPTS[0], **WINDOW), Live(pipe, PROMPTS[0], **WINDOW)
    before, after = made(plain, 2), made(plain, 2)
    same(made(live, 2), before)
    live.say(PROMPTS[1])
    assert live.prompt == PROMPTS[1]
    assert np.abs(made(live, 1)[0].astype(int) - after[0]).max() > 20
    with pytest.raises(ValueError, match="unknown words"):
        live.say("a purple haze")
    with pytest.raises(ArgumentError, match="has no cuts"):
        live.say(PROMPTS[0], cut=True)
    assert live.prompt == PROMPTS[1]


@pytest.mark.long
def test_settings_change_on_the_way(pipe):
    live = Live(pipe, PROMPTS[0], seed=1, **WINDOW)
    made(live, 2)
    live.change(**WINDOW | dict(seed=2, num_steps=1))
    assert live.index == 2  # it goes on
    assert (live.settings["seed"], live.settings["num_steps"]) == (2, 1)
    other = Live(pipe, PROMPTS[0], seed=1, **WINDOW)
    made(other, 2)
    assert np.abs(made(live, 1)[0].astype(int) - made(other, 1)[0]).max() > 2
    live.say(PROMPTS[1])
    live.change(**WINDOW | dict(seed=2, num_steps=1, window_blocks=3))
    assert live.index == 0  # anew, with what was said
    want = made(Live(pipe, PROMPTS[1], seed=2, **WINDOW | dict(num_steps=1, window_blocks=3)), 2)
    same(made(live, 2), want)
    with pytest.raises(ValueError, match="7 steps must be 1..4"):
        live.change(**WINDOW | dict(num_steps=7))
    same(made(live, 1), made_after(pipe, want))


def made_after(pipe, before):
    live = Live(pipe, PROMPTS[1], seed=2, **WINDOW | dict(num_steps=1, window_blocks=3))
    same(made(live, len(before)), before)
    return made(live, 1)


@pytest.mark.long
def test_input_is_waited_for(pipe):
    pushed, rng = Pushed(), np.random.default_rng(0)
    video = rng.integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    live = Live(pipe, PROMPTS[0], pushed=pushed, noise_scale=0.5, **WINDOW)
    assert live.wanted == 1
    pushed.push(video[0])
    assert live.wanted == 0
    got = made(live, 1)
    assert live.wanted == 2
    for frame in video[1:]:
        pushed.push(frame)
    got += made(live, 2)
    same(got, [part[0] for part in pipe.stream(PROMPTS[0], video=video, noise_scale=0.5, **WINDOW)])
    pushed.push(video[0])
    pushed.close()
    assert live.wanted == 0
    assert advance([live]) == [None]  # not enough for another chunk


@pytest.mark.slow
def test_a_video_that_keeps_all_of_its_past_ends(pipe):
    live = Live(pipe, PROMPTS[0], num_steps=1)
    made(live, 5)
    assert live.ended
    assert advance([live]) == [None]


def test_what_goes_wrong_with_one_is_its_own(pipe, monkeypatch):
    good, bad = (Live(pipe, PROMPTS[0], **WINDOW) for _ in range(2))

    def broken(*_):
        raise RuntimeError("the decoder is broken")

    monkeypatch.setattr(bad, "_decode", broken)
    first, second = advance([good, bad])
    assert frames(first).shape == (1, 24, 24, 3)
    assert isinstance(second, RuntimeError)
    bad.close()
    assert frames(advance([good])[0]).shape == (2, 24, 24, 3)


def test_nothing_is_left_on_the_device(pipe):
    live = Live(pipe, PROMPTS[0], **WINDOW)
    made(live, 2)
    caches = jax.tree.leaves(live._course.caches)
    live.close()
    assert all(leaf.is_deleted() for leaf in caches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_samples=2), "num_samples=2 must be 1"),
        (dict(stream_batch=True), "stream_batch does not apply"),
        (dict(cache_policy="rolling_sink", window_blocks=3), "window_blocks is for cache_policy sliding_window"),
    ],
)
def test_what_no_reader_may_ask_for(pipe, options, message):
    with pytest.raises(ArgumentError, match=message):
        Live(pipe, None, **options)
