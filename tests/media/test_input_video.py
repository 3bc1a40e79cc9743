"""Input video: files, arrays and cameras in chunks, read no further than they are used."""

import itertools

import numpy as np
import pytest

from rcm_jax.errors import ArgumentError
from rcm_jax.media.input_video import open_video
from rcm_jax.media.video import write_video
from tests.media.test_clips import levels

SIZE = (32, 32)


def opened(source, fps=16, size=SIZE):
    return open_video(source, fps=fps, size=size)


def numbers(chunks):
    return [[round(float(frame.mean()) / 20) for frame in chunk] for chunk in chunks]


@pytest.mark.parametrize(
    ("fps", "count", "length", "want"),
    [(16, 9, 9, [[0], [1, 2, 3, 4], [5, 6, 7, 8]]), (32, 12, 6, [[0], [2, 4, 6, 8]]), (8, 3, 6, [[0], [0, 1, 1, 2]])],
)
def test_a_file_comes_at_the_networks_rate(tmp_path, fps, count, length, want):
    video = opened(write_video(tmp_path / "v.mp4", levels(count), fps))
    assert video.length == length
    for _ in range(2):  # every run begins anew
        assert numbers(video.chunks(1, 4)) == want


def test_a_file_is_cut_to_the_networks_size(tmp_path):
    wide = np.zeros((3, 32, 64, 3), np.uint8)
    wide[:, :, 16:48] = 200
    chunk = next(opened(write_video(tmp_path / "v.mp4", wide, 16), size=(16, 16)).chunks(3, 1))
    assert chunk.shape == (3, 16, 16, 3)
    assert chunk.min() > 150


def test_a_camera_is_read_no_further_than_a_chunk():
    read = []

    def camera():
        for i in itertools.count():
            read.append(i)
            yield levels(1)[0]

    chunks = opened(camera()).chunks(5, 4)
    assert read == []
    assert next(chunks).shape == (5, 32, 32, 3)
    assert len(read) == 5
    next(chunks)
    assert len(read) == 9


@pytest.mark.parametrize("make", [np.asarray, list, iter], ids=["array", "list", "iterator"])
def test_what_is_left_over_is_no_chunk(make):
    video = opened(make(levels(8)))
    assert video.length == (None if make is iter else 8)
    assert numbers(video.chunks(3, 2)) == [[0, 1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (levels(4), "video has 4 frames at 16 a second; the first chunk takes 5"),
        (iter(levels(4)), "video has 4 frames at 16 a second; the first chunk takes 5"),
        (
            levels(9)[:, :24],
            r"frames of shape \(24, 32, 3\) in uint8; the network takes \(32, 32, 3\) in uint8",
        ),
        (levels(9) / 255, r"\(32, 32, 3\) in float64; the network takes"),
        (levels(9)[0], r"video has shape \(32, 32, 3\): give frames \[F, H, W, 3\]"),
        (iter([*levels(2), levels(1)[0][:5]]), r"shape \(5, 32, 3\)"),
        (7, "video is a int: give a path"),
    ],
)
def test_what_is_no_input(source, message):
    with pytest.raises(ArgumentError, match=message):
        list(opened(source).chunks(5, 4))


def test_files_that_are_no_video_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no video at video_path=.*nowhere.mp4"):
        opened(tmp_path / "nowhere.mp4")
    (tmp_path / "bad.mp4").write_text("nothing of the kind")
    with pytest.raises(ArgumentError, match="video_path=.*bad.mp4: it cannot be read") as caught:
        opened(tmp_path / "bad.mp4")
    assert "--video_path" in caught.value.as_flags()
    video = opened(write_video(tmp_path / "short.mp4", levels(4), 16))
    with pytest.raises(ArgumentError, match="short.mp4 has 4 frames at 16 a second; the first chunk takes 5"):
        next(video.chunks(5, 4))
