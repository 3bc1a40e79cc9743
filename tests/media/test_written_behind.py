"""The thread that writes a video holds nothing back, loses nothing, and is gone afterwards."""

import threading

import av
import imageio.v3 as iio
import numpy as np
import pytest

from rcm_jax.media.pictures import enlarge
from rcm_jax.media.tags import read_tags
from rcm_jax.media.video import GrowingVideo, WrittenBehind
from tests.media.videos import close_to, decoded, fails_at, moving


@pytest.fixture
def gate(monkeypatch):
    """The encoder takes a part when the gate is released for it."""
    opened, append = threading.Semaphore(0), GrowingVideo.append

    def slow(self, frames):
        assert opened.acquire(timeout=30)
        append(self, frames)

    monkeypatch.setattr(GrowingVideo, "append", slow)
    return opened


def test_a_slow_encoder_holds_nothing_back_until_too_much_waits(tmp_path, gate):
    frames, dispatched = moving(8), []

    def stream(video):
        for i in range(6):
            dispatched.append(i)
            if i == 5:
                reached.set()
            video.append(frames[i : i + 1])

    with WrittenBehind(tmp_path / "v.mp4", fps=8, ahead=3) as video:
        reached = threading.Event()
        maker = threading.Thread(target=stream, args=(video,))
        maker.start()
        maker.join(1)  # one part at the encoder, three wait, the fifth finds no room
        assert dispatched == [0, 1, 2, 3, 4]
        assert not (tmp_path / "v.mp4").exists()
        gate.release()
        assert reached.wait(30)
        maker.join(0.2)
        assert maker.is_alive()
        for _ in range(5):
            gate.release()
        maker.join(30)
        assert not maker.is_alive()
    assert close_to(decoded((tmp_path / "v.mp4").read_bytes()), frames[:6])
    assert no_thread()


def test_pictures_are_made_in_the_thread_too(tmp_path):
    seen = []

    def picture(part):
        seen.append(threading.current_thread().name)
        return enlarge(part, 2)

    with WrittenBehind(tmp_path / "v.mp4", fps=8, tags={"title": "red"}, picture=picture) as video:
        video.append(moving(2))
    assert decoded((tmp_path / "v.mp4").read_bytes()).shape == (2, 64, 64, 3)
    assert seen == ["writes v.mp4"]
    assert read_tags(tmp_path / "v.mp4")["title"] == "red"


MESSAGE = r"v\.mp4 cannot be encoded \(No space left on device\); its frames from 5 on, .* are in .*v_frames as PNGs"


def written(path, parts, appended=None, end=None, **how):
    with WrittenBehind(path, fps=8, **how) as video:
        for part in parts:
            if appended is not None:
                appended.append(part)
            video.append(part)
        if end is not None:
            raise end


def no_thread():
    return not [t for t in threading.enumerate() if t.name == "writes v.mp4"]


def test_an_error_of_the_thread_surfaces_and_no_frame_is_lost(tmp_path, monkeypatch):
    frames, appended = moving(400), []
    frames[:, 0, 0, 0] = np.arange(400) % 256
    frames[:, 1, 0, 0] = np.arange(400) // 256
    fails_at(monkeypatch, frames[5])
    with pytest.raises(OSError, match=MESSAGE):
        written(tmp_path / "v.mp4", frames.reshape(200, 2, 32, 32, 3), appended)
    assert no_thread()
    assert close_to(decoded((tmp_path / "v.mp4").read_bytes()), frames[:5])
    left = sorted((tmp_path / "v_frames").iterdir())
    assert [p.name for p in left] == [f"{i:05d}.png" for i in range(5, 2 * len(appended))]
    np.testing.assert_array_equal(iio.imread(left[-1]), appended[-1][-1])


def test_an_error_with_the_last_part_surfaces_too(tmp_path, monkeypatch):
    frames = moving(6)
    fails_at(monkeypatch, frames[5])
    with pytest.raises(OSError, match=MESSAGE):
        written(tmp_path / "v.mp4", [frames])


def test_an_error_while_nothing_can_be_written_does_not_hang(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(av, "open", full)
    monkeypatch.setattr(iio, "imwrite", full)
    with pytest.raises(OSError, match="No space.* PNGs cannot be written either: its frames are lost"):
        written(tmp_path / "v.mp4", [moving(1)] * 20, ahead=1)
    assert no_thread()
    assert not (tmp_path / "v.mp4").exists()


def test_a_picture_that_cannot_be_made_surfaces(tmp_path):
    with pytest.raises(ZeroDivisionError):
        written(tmp_path / "v.mp4", [moving(1)] * 9, picture=lambda part: 1 // 0)
    assert no_thread()


def test_closed_early_the_video_is_whole_and_the_thread_gone(tmp_path):
    path = tmp_path / "v.mp4"
    with pytest.raises(KeyboardInterrupt):
        written(path, [moving(4)], end=KeyboardInterrupt())
    assert no_thread()
    assert close_to(decoded(path.read_bytes()), moving(4))
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        written(path, [], end=RuntimeError("nothing was sampled"))
    assert path.read_bytes() == before
