"""Clips: which frame is shown when, how it is cut to a size, and where scenes change."""

from fractions import Fraction

import av
import numpy as np
import pytest

from rcm_jax.media.clips import (
    BadVideo,
    SceneCut,
    covering,
    difference,
    frames_at,
    longest_run,
    read_clip,
    read_header,
    thumbnail,
)
from rcm_jax.media.video import write_video
from tests.media.test_video import COLOURS, patches
from tests.media.videos import moving

SIDE = (32, 32)


def levels(count, step=20):
    """Grey frames that tell their number."""
    return (np.arange(count, dtype=np.uint8) * step)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)


def numbers(path, fps=16):
    return [round(float(frame.mean()) / 20) for frame in frames_at(path, fps, SIDE)]


def write(path, frames, fps):
    """In the container of the path's suffix."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("fps", "count", "shown"),
    [
        (16, 6, [0, 1, 2, 3, 4, 5]),
        (24, 12, [0, 1, 3, 4, 6, 7, 9, 10]),
        (8, 3, [0, 0, 1, 1, 2, 2]),
        (30, 12, [0, 1, 3, 5, 7, 9, 11]),
    ],
)
def test_a_frame_is_the_one_shown_at_its_time(tmp_path, fps, count, shown):
    path = write_video(tmp_path / "v.mp4", levels(count), fps)
    assert numbers(path) == shown
    header = read_header(path)
    assert (header.width, header.height, header.frames(16)) == (32, 32, len(shown))


@pytest.mark.parametrize("suffix", ["mkv", "avi", "mov"])
def test_times_that_containers_round(tmp_path, suffix):
    """Matroska's are whole milliseconds, AVI's whole frames."""
    assert numbers(write(tmp_path / f"a.{suffix}", levels(6), 16)) == [0, 1, 2, 3, 4, 5]
    assert numbers(write(tmp_path / f"b.{suffix}", levels(12), 24)) == [0, 1, 3, 4, 6, 7, 9, 10]


def test_the_middle_is_averaged_or_enlarged():
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    middle = picture[:, 16:48]
    np.testing.assert_array_equal(covering(picture, (32, 32)), middle)
    means = middle.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(covering(picture, (16, 16)) - means).max() <= 1  # columns and rows are rounded each
    assert covering(picture, (64, 64)).shape == (64, 64, 3)
    assert (covering(np.full((8, 12, 3), 90, np.uint8), (48, 16)) == 90).all()
    wide = covering(picture[:, :32], (64, 32), aspect=2.0)  # pixels twice as wide as high: all of it is seen
    assert np.abs(wide[:, ::2].astype(int) - picture[:, :32]).mean() < np.abs(wide[:, ::2].astype(int) - 128).mean()


def test_colours_come_back(tmp_path):
    (frame,) = list(frames_at(write_video(tmp_path / "v.mp4", patches()[:1], 16), 16, (224, 32)))
    assert np.abs(frame[16, 16::32].astype(int) - COLOURS).max() <= 4


def test_a_turned_phone_is_upright(tmp_path):
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    frames[:, :, :16] = 200  # light on the left, as the sensor sees it
    data = write_video(tmp_path / "v.mp4", frames, 16).read_bytes()

    def matrix(*values):
        return b"".join(int(v * 65536).to_bytes(4, "big", signed=True) for v in values)

    plain, turned = matrix(1, 0, 0, 0, 1, 0), matrix(0, 1, 0, -1, 0, 0)  # a quarter, clockwise
    at = data.index(plain, data.index(b"tkhd"))
    (tmp_path / "t.mp4").write_bytes(data[:at] + turned + data[at + len(turned) :])
    frame = next(frames_at(tmp_path / "t.mp4", 16, SIDE)).astype(int)
    assert frame[:12].min() > 150
    assert frame[20:].max() < 50


def test_what_gives_no_clip(tmp_path):
    data = write_video(tmp_path / "v.mp4", moving(), 16).read_bytes()
    for name, content, words in (
        ("a", b"no video", "it cannot be read"),
        ("b", data.replace(b"avc1", b"zzzz"), "its codec cannot be read"),
        ("c", data[: len(data) // 2], "no frame that can be decoded|it cannot be read"),
    ):
        (tmp_path / f"{name}.mp4").write_bytes(content)
        with pytest.raises(BadVideo, match=words):
            read_header(tmp_path / f"{name}.mp4")
    with pytest.raises(BadVideo, match="it has 6 frames at 16 a second, and 9 are asked for"):
        read_clip(tmp_path / "v.mp4", size=SIDE, num_frames=9, fps=16)
    assert read_clip(tmp_path / "v.mp4", size=SIDE, num_frames=5, fps=16).shape == (5, 32, 32, 3)


def test_the_longest_run_without_a_cut(tmp_path):
    dark, light = moving(4), 255 - moving(6)
    frames = np.concatenate([dark, light, dark])
    best, longest, count = longest_run(frames, 5, 0.1)
    assert (longest, count) == (6, 14)
    np.testing.assert_array_equal(np.stack(best), light[:5])
    neighbours = [difference(thumbnail(a), thumbnail(b)) for a, b in zip(frames[:-1], frames[1:], strict=True)]
    assert [i for i, d in enumerate(neighbours) if d > 0.1] == [3, 9]
    assert longest_run(iter(moving(6)), 9, 0.1)[1] == 6
    path = write_video(tmp_path / "v.mp4", frames, 16)
    clip = read_clip(path, size=SIDE, num_frames=5, fps=16, cut=0.1)
    assert np.abs(clip.astype(int) - light[:5]).mean() < 8
    with pytest.raises(SceneCut, match="its longest run without a cut has 6 frames of 9"):
        read_clip(path, size=SIDE, num_frames=9, fps=16, cut=0.1)
    with pytest.raises(BadVideo, match="it has 14 frames"):
        read_clip(path, size=SIDE, num_frames=17, fps=16, cut=0.1)
