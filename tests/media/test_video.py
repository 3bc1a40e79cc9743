"""Video files are whole or absent, and hold the frames they were given."""

import sys

import av
import imageio.v3 as iio
import numpy as np
import pytest

from rcm_jax.media.pictures import enlarge, grid, label_rows, strip, to_uint8, write_png
from rcm_jax.media.tags import read_tags
from rcm_jax.media.video import GrowingVideo, check_fps, mp4_bytes, write_gif, write_video
from tests.media.videos import close_to, decoded, fails_at, moving


def test_mp4_holds_the_frames(tmp_path):
    path = write_video(tmp_path / "new" / "v.mp4", moving(), fps=8)
    back = iio.imread(path, plugin="pyav")
    assert back.shape == moving().shape
    assert np.abs(back.astype(int) - moving()).mean() < 8  # lossy, and chroma is halved
    assert [p.name for p in path.parent.iterdir()] == ["v.mp4"]


def test_a_name_that_begins_like_a_protocol(tmp_path, monkeypatch):
    """`Surreal:` is none, though FFmpeg would take it for one."""
    monkeypatch.chdir(tmp_path)
    with GrowingVideo("Surreal: a cat.mp4", fps=8, tags={"title": "a cat"}) as video:
        video.append(moving())
    write_video("Surreal: a dog.mp4", moving(), 8, {"title": "a dog"})
    assert [read_tags(f"Surreal: a {animal}.mp4")["title"] for animal in ("cat", "dog")] == ["a cat", "a dog"]


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


# --- what players and people find in a file ---------------------------------------------------------------------------

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 50), (30, 160, 220)]


def patches():
    return np.concatenate([np.full((32, 32, 3), c, np.uint8) for c in COLOURS], 1)[None].repeat(3, 0)


def grown(path, frames, fps, tags=None):
    with GrowingVideo(path, fps, tags) as video:
        video.append(frames)
    return path


@pytest.mark.parametrize("write", [write_video, grown])
def test_an_mp4_says_its_colours_and_they_come_back(tmp_path, write):
    path = write(tmp_path / "v.mp4", patches(), 8)
    with av.open(path) as file:
        codec = file.streams.video[0].codec_context
        said = codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range
        frame = next(file.decode(video=0))
    assert said == (1, 1, 1, 1)  # BT.709 thrice, 16..235
    seen = frame.reformat(format="rgb24", src_colorspace="ITU709", dst_color_range="JPEG").to_ndarray()
    assert np.abs(seen[16, 16::32].astype(int) - COLOURS).max() <= 4  # with BT.601's matrix 25
    red, green, blue = np.array(COLOURS, float).T / 255
    luma = 16 + 219 * (0.2126 * red + 0.7152 * green + 0.0722 * blue)
    assert np.abs(frame.to_ndarray()[16, 16 : 32 * len(COLOURS) : 32] - luma).max() <= 1.5


def test_an_mp4s_index_is_in_front(tmp_path):
    data = write_video(tmp_path / "v.mp4", moving(), 8).read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("fps", [0.01, 8, 23.976, 120])
def test_the_rate_is_kept(tmp_path, fps):
    with av.open(write_video(tmp_path / "v.mp4", moving(), fps)) as file:
        assert float(file.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-6)
        assert [frame.time for frame in file.decode(video=0)] == pytest.approx([i / fps for i in range(6)], abs=1e-3)


def test_rates_that_are_none(tmp_path):
    for fps, suffix, words in (
        (0, ".mp4", "fps=0 must be at least 0.01 and at most 120"), (-1, ".png", "fps=-1"),
        (121, ".mp4", "at most 120"), (float("nan"), ".mp4", "fps=nan"),
        (60, ".gif", "fps=60 must be at least 0.01 and at most 50 in a GIF"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            check_fps(fps, suffix)
    for fps, suffix in ((120, ".mp4"), (50, ".gif"), (0.01, ".gif")):
        check_fps(fps, suffix)
    np.testing.assert_array_equal(iio.imread(write_gif(tmp_path / "v.gif", moving(), 0.01)), moving())


def test_files_carry_title_and_comment(tmp_path):
    tags = {"title": "ein grüner Kreis\n第二", "comment": '{"long": "' + "ü" * 3000 + '"}'}
    for write in (write_video, grown):
        found = read_tags(write(tmp_path / "v.mp4", moving(), 8, tags))
        assert tags.items() <= found.items()
    assert read_tags(write_png(tmp_path / "p.png", moving()[0], tags)) == tags
    path = write_gif(tmp_path / "v.gif", moving(), 8, tags)
    assert read_tags(path) == {"comment": tags["comment"]}
    np.testing.assert_array_equal(iio.imread(path), moving())
    assert read_tags(write_png(tmp_path / "bare.png", moving()[0])) == {}


def test_other_files_have_no_tags(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no video at .*none\.mp4"):
        read_tags(tmp_path / "none.mp4")
    for name in ("x.mp4", "x.gif", "x.txt"):
        (tmp_path / name).write_text("no video")
        with pytest.raises(ValueError, match=rf"{name} is not an MP4, GIF or PNG that can be read"):
            read_tags(tmp_path / name)


# --- what an encoder refuses ------------------------------------------------------------------------------------------

TOO_WIDE = np.random.default_rng(0).integers(0, 255, (3, 2, 16500, 3), np.uint8)  # libx264 ends at 16384


def test_frames_that_cannot_be_encoded_are_left_as_pngs(tmp_path):
    path = write_video(tmp_path / "v.mp4", moving(), fps=8)
    before = path.read_bytes()
    for folder in ("v_frames", "v_frames_1"):  # the first one's are not replaced
        with pytest.raises(OSError, match=rf"v\.mp4 cannot be encoded \(.*\); its frames are in .*{folder} as PNGs"):
            write_video(path, TOO_WIDE, fps=8)
        names = sorted(p.name for p in (tmp_path / folder).iterdir())
        assert names == ["00000.png", "00001.png", "00002.png"]
        np.testing.assert_array_equal(iio.imread(tmp_path / folder / "00002.png"), TOO_WIDE[2])
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="v_frames_2 as PNGs"), GrowingVideo(path, fps=8) as video:
        video.append(TOO_WIDE)
    assert path.read_bytes() == before  # not even begun
    assert not list(tmp_path.glob(".*"))


def test_a_growing_video_leaves_what_it_could_not_write(tmp_path, monkeypatch):
    frames = moving(9)
    fails_at(monkeypatch, frames[5])
    video = GrowingVideo(tmp_path / "v.mp4", fps=8)
    video.append(frames[:3])
    with (
        pytest.raises(OSError, match=r"\(No space left on device\); its frames from 5 on, .* are in .*v_frames"),
        video,
    ):
        video.append(frames[3:6])
    assert close_to(decoded((tmp_path / "v.mp4").read_bytes()), frames[:5])
    assert [p.name for p in (tmp_path / "v_frames").iterdir()] == ["00005.png"]
    np.testing.assert_array_equal(iio.imread(tmp_path / "v_frames" / "00005.png"), frames[5])
