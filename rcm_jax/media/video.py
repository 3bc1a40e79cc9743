"""Video files: written whole or not at all, but for the MP4 that plays while it grows."""

import io
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from rcm_jax.media.pictures import Frames, write_whole

H264 = {"plugin": "pyav", "codec": "libx264", "out_pixel_format": "yuv420p"}


def write_video(path: str | Path, frames: Frames, fps: int) -> Path:
    """H.264 MP4 through PyAV. Odd sizes lose their last row or column: the codec wants even ones.

    The file appears under its name only when it is whole. Raises RuntimeError where the video library is missing.
    """
    return write_whole(mp4_path(path), _even(frames), fps=fps, **H264)


def write_gif(path: str | Path, frames: Frames, fps: int) -> Path:
    """An animation that repeats. The file appears under its name only when it is whole."""
    return write_whole(path, frames, plugin="pillow", duration=1000 / fps, loop=0)


def mp4_bytes(frames: Frames, fps: int) -> bytes:
    """The MP4 of `write_video`, for a page. Raises RuntimeError where the video library is missing."""
    _check_pyav()
    out = io.BytesIO()
    iio.imwrite(out, _even(frames), extension=".mp4", fps=fps, **H264)
    return out.getvalue()


def _check_pyav() -> None:
    try:
        import av  # noqa: F401  (imageio would only say that no plugin fits)
    except ImportError as error:
        raise RuntimeError("writing MP4 needs PyAV, which brings ffmpeg with it: pip install av") from error


def mp4_path(path: str | Path) -> Path:
    """The path in a folder that is there. Raises ValueError for another suffix, RuntimeError without PyAV."""
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"{path} must end in .mp4")
    _check_pyav()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _even(frames: Frames) -> Frames:
    return np.ascontiguousarray(frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2])


class GrowingVideo:
    """An H.264 MP4 that plays while it grows: one fragment a frame, each on disk when the next frame comes.

    with GrowingVideo(path, fps=16) as video:
        video.append(frames)

    The file is begun, and one of that name replaced, with the first frames; it is whole when the block is left, by an
    error too. Odd sizes lose their last row or column. Raises what `write_video` raises, before it touches the file.
    """

    def __init__(self, path: str | Path, fps: int):
        self.path, self.fps = mp4_path(path), fps
        self._file = self._stream = None

    def append(self, frames: Frames) -> None:
        import av

        frames = _even(frames)
        if self._file is None:
            # every packet is flushed; the encoder looks at no frame ahead
            movflags = "frag_every_frame+empty_moov+default_base_moof"
            self._file = av.open(self.path, "w", options={"movflags": movflags, "flush_packets": "1"})
            self._stream = self._file.add_stream("libx264", rate=self.fps, options={"tune": "zerolatency"})
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._stream.pix_fmt = "yuv420p"
        if frames.shape[1:3] != (self._stream.height, self._stream.width):
            raise ValueError(f"frames of {frames.shape[1:3]} in a video of {(self._stream.height, self._stream.width)}")
        for frame in frames:
            self._file.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def close(self) -> None:
        if self._file is not None:
            self._file.mux(self._stream.encode())  # what the encoder still holds
            self._file.close()
            self._file = None

    def __enter__(self) -> "GrowingVideo":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
