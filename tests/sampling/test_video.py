"""Video files are whole or absent, and hold the frames they were given."""

import sys

import imageio.v3 as iio
import numpy as np
import pytest

from rcm_jax.sampling.video import enlarge, grid, label_rows, strip, to_uint8, write_png, write_video


def moving(frames=6, size=32):
    video = np.zeros((frames, size, size, 3), np.uint8)
    for f in range(frames):
        video[f, :, : 4 * f + 4] = (200, 40, 40)
    return video


def test_mp4_holds_the_frames(tmp_path):
    path = write_video(tmp_path / "new" / "v.mp4", moving(), fps=8)
    back = iio.imread(path, plugin="pyav")
    assert back.shape == moving().shape
    assert np.abs(back.astype(int) - moving()).mean() < 8  # lossy, and chroma is halved
    assert [p.name for p in path.parent.iterdir()] == ["v.mp4"]


def test_odd_sizes_are_cut_to_even(tmp_path):
    path = write_video(tmp_path / "v.mp4", moving(size=33), fps=8)
    assert iio.imread(path, plugin="pyav").shape == (6, 32, 32, 3)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", moving(), fps=8)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(iio, "imwrite", fail)
    with pytest.raises(OSError, match="No space"):
        write_video(path, moving(), fps=8)
    with pytest.raises(OSError, match="No space"):
        write_png(tmp_path / "p.png", moving()[0])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_missing_ffmpeg_and_wrong_names(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"v.gif must end in .mp4"):
        write_video(tmp_path / "v.gif", moving(), fps=8)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RuntimeError, match="pip install av"):
        write_video(tmp_path / "v.mp4", moving(), fps=8)


def test_layouts():
    rows = np.random.default_rng(0).uniform(-1, 1, (2, 3, 5, 4, 4, 3))
    frames = grid(rows, gap=1)
    assert frames.shape == (5, 9, 14, 3)
    np.testing.assert_array_equal(frames[:, 5:9, 5:9], rows[1, 1])
    picture = strip(rows, frames=3, gap=1)
    np.testing.assert_array_equal(picture[:4, 4:8], rows[0, 0, 2])
    assert enlarge(frames, 2).shape == (5, 18, 28, 3)
    labelled = label_rows(to_uint8(frames), ["one", "two"], width=50)
    assert labelled.shape == (5, 9, 64, 3)
    assert to_uint8(np.array([-1.0, 0.0, 1.0, 3.0])).tolist() == [0, 128, 255, 255]
