"""Writing videos and pictures: whole or not at all, but for the video that plays while it grows."""

import os
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from jaxtyping import Float, UInt8

Frames = UInt8[np.ndarray, "F H W 3"]


def to_uint8(video: Float[np.ndarray, "... 3"]) -> UInt8[np.ndarray, "... 3"]:
    """[-1, 1] to 0..255."""
    return np.round((np.clip(video, -1, 1) + 1) * 127.5).astype(np.uint8)


def enlarge(video: np.ndarray, scale: int) -> np.ndarray:
    """Every pixel of [..., H, W, 3] becomes scale x scale pixels."""
    return video.repeat(scale, axis=-3).repeat(scale, axis=-2)


def grid(
    rows: Float[np.ndarray, "R N F H W 3"], *, gap: int = 1, background: float = 1.0
) -> Float[np.ndarray, "F h w 3"]:
    """R rows of N videos side by side as one video, `gap` pixels apart."""
    R, N, F, H, W, _ = rows.shape
    out = np.full((F, R * (H + gap) - gap, N * (W + gap) - gap, 3), background, rows.dtype)
    for r in range(R):
        for n in range(N):
            out[:, r * (H + gap) : r * (H + gap) + H, n * (W + gap) : n * (W + gap) + W] = rows[r, n]
    return out


def strip(rows: Float[np.ndarray, "R N F H W 3"], *, frames: int, gap: int = 2) -> Float[np.ndarray, "h w 3"]:
    """The same grid as one picture: of every video, `frames` frames from first to last, side by side."""
    R, N, F, H, W, _ = rows.shape
    picked = rows[:, :, np.linspace(0, F - 1, frames).round().astype(int)]
    wide = picked.transpose(0, 1, 3, 2, 4, 5).reshape(R, N, 1, H, frames * W, 3)
    return grid(wide, gap=gap)[0]


def label_rows(frames: Frames, labels: list[str], *, width: int = 150) -> Frames:
    """A margin on the left with one label a row of the grid, centred on it."""
    from PIL import Image, ImageDraw

    F, H, _, _ = frames.shape
    margin = Image.new("RGB", (width, H), "white")
    for i, label in enumerate(labels):
        ImageDraw.Draw(margin).text((8, (i + 0.5) * H / len(labels)), label, fill="black", anchor="lm", font_size=14)
    return np.concatenate([np.broadcast_to(np.asarray(margin), (F, H, width, 3)), frames], axis=2)


def write_video(path: str | Path, frames: Frames, fps: int) -> Path:
    """H.264 MP4 through PyAV. Odd sizes lose their last row or column: the codec wants even ones.

    The file appears under its name only when it is whole. Raises RuntimeError where the video library is missing.
    """
    path = mp4_path(path)
    frames = _even(frames)
    unfinished = path.with_name(f".{path.stem}.part.mp4")
    try:
        iio.imwrite(unfinished, frames, plugin="pyav", codec="libx264", fps=fps, out_pixel_format="yuv420p")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def mp4_path(path: str | Path) -> Path:
    """The path in a folder that is there. Raises ValueError for another suffix, RuntimeError without PyAV."""
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"{path} must end in .mp4")
    try:
        import av  # noqa: F401  (imageio would only say that no plugin fits)
    except ImportError as error:
        raise RuntimeError("writing MP4 needs PyAV, which brings ffmpeg with it: pip install av") from error
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


def write_png(path: str | Path, image: UInt8[np.ndarray, "H W 3"]) -> Path:
    """The file appears under its name only when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.part.png")
    try:
        iio.imwrite(unfinished, image)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
