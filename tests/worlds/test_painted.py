"""A file's frames, made under jit as they are made on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax.media.pictures import to_uint8
from rcm_jax.worlds.painted import checked, paint, paint_on_host


def around_every_step():
    """Numbers at, just below and just above where one level becomes the next, and levels; beyond the ends too."""
    levels = (np.arange(-4, 516, dtype=np.float64) / 2 / 127.5 - 1).astype(np.float32)
    near = [np.nextafter(levels, np.float32(end)) for end in (-9, 9)]
    rest = np.random.default_rng(0).normal(size=3 * 2**12).astype(np.float32)
    return np.concatenate([levels, *near, rest])[: 3 * 4096].reshape(2, 2, 16, 64, 3)


@pytest.mark.parametrize("optimised", [pytest.param(True, marks=pytest.mark.optimised), False])
def test_the_levels_are_those_of_the_host(optimised):
    video = around_every_step()
    painted = jax.device_get(jax.jit(paint)(video))
    np.testing.assert_array_equal(painted.frames, to_uint8(video))
    assert painted.frames.dtype == np.uint8
    assert painted.wrong.tolist() == [0, 0]
    assert checked(painted, "x") is painted.frames


@pytest.mark.parametrize("make", [jax.jit(paint), lambda video: paint_on_host(video[1])], ids=["device", "host"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_what_was_not_finite_is_counted_before_it_is_rounded(make):
    video = np.zeros((2, 3, 4, 4, 3), np.float32)
    video[1, 0, 0, 0] = np.nan, np.inf, -np.inf
    painted = make(video)
    assert int(jnp.sum(painted.wrong)) == 3
    with pytest.raises(FloatingPointError, match=rf"a place: 3 of {painted.frames.size} numbers are NaN or infinite"):
        checked(painted, "a place")


def test_floats_are_checked_as_they_are():
    video = np.zeros((1, 2, 2, 3), np.float32)
    assert checked(video, "x") is video
    video[0, 0, 0, 0] = np.inf
    with pytest.raises(FloatingPointError, match="x: 1 of 12"):
        checked(video, "x")


def test_one_video_of_several():
    video = np.stack([np.zeros((1, 2, 2, 3)), np.ones((1, 2, 2, 3))]).astype(np.float32)
    video[0, 0, 0, 0, 0] = np.nan
    painted = jax.device_get(paint(video))
    assert checked(painted.video(1), "the second").tolist() == np.full((1, 2, 2, 3), 255).tolist()
    with pytest.raises(FloatingPointError, match="the first: 1 of 12"):
        checked(painted.video(0), "the first")
