"""Watching a call, ending it, and looking at a video that is half made."""

import numpy as np
import pytest

import rcm_jax
from rcm_jax.media.pictures import to_uint8


@pytest.fixture(scope="module")
def teacher():
    return rcm_jax.load("toy")


def test_every_step_is_shown_and_changes_nothing(teacher):
    asked = {"num_steps": 3, "num_samples": 2, "batch_size": 2, "progress": ""}
    seen = []
    prompts = ["a red circle moving left", "a blue square moving up"]
    watched = teacher(prompts, on_step=lambda x, i, n: seen.append((i, n, np.array(x))), **asked)
    assert [(i, n, x.shape) for i, n, x in seen] == [(i, 6, (2, 9, 6, 6, 12)) for i in range(1, 7)]
    assert np.abs(seen[2][2] - seen[1][2]).max() > 0.1
    for video, plain in zip(watched, teacher(prompts, **asked), strict=True):
        assert np.abs(video.frames.astype(int) - plain.frames).max() <= 1  # one program rounds as its steps do
    whole = np.stack([np.concatenate(list(parts)) for parts in teacher.world.decode(seen[2][2])])
    np.testing.assert_array_equal(to_uint8(whole), np.stack([v.frames for v in watched[:2]]))


def test_an_error_ends_the_call_and_not_the_pipeline(teacher):
    class Enough(Exception):
        pass

    def stop(latents, i, n):
        if i == 2:
            raise Enough

    with pytest.raises(Enough):
        teacher(num_steps=3, num_samples=2, batch_size=2, on_step=stop, progress="")
    assert len(teacher(num_steps=3, num_samples=2, batch_size=2, progress="")) == 2


@pytest.mark.long
def test_a_causal_networks_steps_are_chunks():
    pipe, seen = rcm_jax.load("toy_causal"), []
    asked = {"num_steps": 1, "num_samples": 2, "progress": ""}
    watched = pipe(on_step=lambda x, i, n: seen.append((x.shape[1], i, n)), **asked)
    assert seen == [(frames, i + 1, 5) for i, frames in enumerate((1, 3, 5, 7, 9))]
    for video, plain in zip(watched, pipe(**asked), strict=True):
        assert np.abs(video.frames.astype(int) - plain.frames).max() <= 1


def test_too_long_is_known_after_two_units(teacher, monkeypatch):
    seconds = iter(range(0, 10**6, 1000))
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    asked = {"num_steps": 3, "num_samples": 8, "batch_size": 2, "progress": ""}
    with pytest.raises(TimeoutError, match="after batch 2 of 4 about 33 minutes are left, more than 10 minutes"):
        teacher(time_limit=600, **asked)
    assert len(teacher(time_limit=None, **asked)) == 8


def test_a_preview_has_the_colours_of_the_video(teacher):
    """Of real videos' latents: the mean colour of the pixels of every latent."""
    videos = teacher(["a red circle moving left", "a green square moving up"], num_steps=3, batch_size=2, progress="")
    frames = np.stack([v.frames for v in videos]) / 127.5 - 1
    latents = np.asarray(teacher.world.codec.encode(frames.astype(np.float32)))
    seen = teacher.preview(latents).astype(float)
    assert seen.shape == (2, 9, 6, 6, 3)
    want = to_uint8(frames).reshape(2, 9, 6, 4, 6, 4, 3).mean((3, 5))
    assert np.abs(seen - want).mean() < 6
    shuffled = want[:, :, ::-1]
    assert np.abs(seen - shuffled).mean() > 3 * np.abs(seen - want).mean()
