"""Video files are whole or absent, and hold the frames they were given."""

import io
import sys

import av
import imageio.v3 as iio
import numpy as np
import pytest

from rcm_jax.media.pictures import enlarge, grid, label_rows, strip, to_uint8, write_png
from rcm_jax.media.video import GrowingVideo, mp4_bytes, write_gif, write_video


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

    monkeypatch.setattr(av, "open", fail)
    monkeypatch.setattr(iio, "imwrite", fail)
    with pytest.raises(OSError, match="No space.* PNGs cannot be written either: its frames are lost"):
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


def decoded(data):
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def close_to(seen, frames):
    return np.abs(seen.astype(int) - frames).mean() < 8  # lossy, and chroma is halved


def test_a_growing_video_plays_before_it_is_whole(tmp_path):
    path, frames = tmp_path / "new" / "v.mp4", moving(12, 49)
    with GrowingVideo(path, fps=8) as video:
        assert not path.exists()
        for start, end in ((0, 1), (1, 5), (5, 9), (9, 12)):
            video.append(frames[start:end])
            if start:
                seen = decoded(path.read_bytes())  # the file as another process finds it
                assert len(seen) == end - 1
                assert close_to(seen, frames[: end - 1, :48, :48])
    seen = decoded(path.read_bytes())
    assert len(seen) == 12
    assert close_to(seen, frames[:, :48, :48])


def test_a_growing_video_ends_whole_after_an_error(tmp_path):
    path = write_video(tmp_path / "v.mp4", moving(), fps=8)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), GrowingVideo(path, fps=8):
        raise RuntimeError("nothing was sampled")
    assert path.read_bytes() == before
    with GrowingVideo(path, fps=8) as video:
        video.append(moving(3))
        with pytest.raises(ValueError, match=r"frames of \(16, 16\) in a video of \(32, 32\)"):
            video.append(moving(2, 16))
    assert len(decoded(path.read_bytes())) == 3
    with pytest.raises(ValueError, match=r"v.gif must end in .mp4"):
        GrowingVideo(tmp_path / "v.gif", fps=8)


def test_layouts():
    rows = np.random.default_rng(0).integers(0, 255, (2, 3, 5, 4, 4, 3), np.uint8)
    frames = grid(rows, gap=1)
    assert frames.shape == (5, 9, 14, 3)
    np.testing.assert_array_equal(frames[:, 5:9, 5:9], rows[1, 1])
    assert (frames[:, 4] == 255).all()
    picture = strip(rows[0, 0], frames=3)
    assert picture.shape == (4, 12, 3)
    np.testing.assert_array_equal(picture[:, 4:8], rows[0, 0, 2])
    large = enlarge(frames, 2)
    assert large.shape == (5, 18, 28, 3)
    np.testing.assert_array_equal(large[:, 1::2, ::2], frames)
    labelled = label_rows(frames, ["one", "two"], width=50)
    assert labelled.shape == (5, 9, 64, 3)
    np.testing.assert_array_equal(labelled[:, :, 50:], frames)
    assert to_uint8(np.array([-1.0, 0.0, 1.0, 3.0])).tolist() == [0, 128, 255, 255]


def test_other_files_of_a_video(tmp_path):
    assert close_to(decoded(mp4_bytes(moving(size=33), fps=8)), moving(size=33)[:, :32, :32])
    path = write_gif(tmp_path / "new" / "v.gif", moving(), fps=8)
    np.testing.assert_array_equal(iio.imread(path, plugin="pillow"), moving())
    assert iio.immeta(path, plugin="pillow")["duration"] == pytest.approx(125, abs=5)
