"""Video files: written whole or not at all, but for the MP4 that plays while it grows.

What an encoder refuses is not lost: its frames are left as PNGs in a folder beside the file, and the error says where.
"""

import contextlib
import io
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from rcm_jax.errors import ArgumentError
from rcm_jax.media.pictures import Frames, write_png, write_whole
from rcm_jax.outputs import check_output, unfinished

if TYPE_CHECKING:
    import av

SUFFIXES = (".mp4", ".gif", ".png")
# a GIF's pause is 655 s at most; players take one of 1/100 s, the least, for 1/10 s
MIN_FPS, MAX_FPS, MAX_GIF_FPS = 0.01, 120, 50
BT709, LIMITED = 1, 1  # as H.264 counts primaries, transfer and matrix, and FFmpeg the range 16..235
WHOLE = {"movflags": "faststart"}  # the index in front: a browser plays what has come
# every packet is flushed
GROWING = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}


def check_fps(fps: float | None, suffix: str) -> None:
    """Raises ArgumentError for what is no rate, or none of a GIF. None: not given."""
    highest = MAX_GIF_FPS if suffix == ".gif" else MAX_FPS
    if fps is not None and not MIN_FPS <= fps <= highest:
        kind = " in a GIF" if suffix == ".gif" else ""
        raise ArgumentError(f"{{fps}} must be at least {MIN_FPS} and at most {highest}{kind}", fps=fps)


def video_path(path: str | Path, name: str = "path", suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """A path that can be written, as `check_output`; RuntimeError for an MP4 where the video library is missing."""
    path = check_output(path, name, suffixes)
    if path.suffix == ".mp4":
        _check_pyav()
    return path


def check_encoder() -> None:
    """Raises RuntimeError where H.264 cannot be encoded."""
    _check_pyav()
    import av

    if "libx264" not in av.codecs_available:
        raise RuntimeError("this PyAV has no H.264 encoder (libx264): pip install --force-reinstall av")


def _check_pyav() -> None:
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise RuntimeError("writing MP4 needs PyAV, which brings ffmpeg with it: pip install av") from error


def write_video(path: str | Path, frames: Frames, fps: float, tags: Mapping[str, str] | None = None) -> Path:
    """H.264 MP4 through PyAV. Odd sizes lose their last row or column: the codec wants even ones. tags: title, comment.

    The file appears under its name only when it is whole. Raises RuntimeError where the video library is missing, and
    OSError that says where the frames are if they cannot be encoded.
    """
    path = video_path(path, suffixes=(".mp4",))
    with _frames_kept(path, frames), unfinished(path, shared=True) as new:
        _encode(new, frames, fps, tags, WHOLE)
    return path


def write_gif(path: str | Path, frames: Frames, fps: float, tags: Mapping[str, str] | None = None) -> Path:
    """An animation that repeats, with the comment of the tags. The file appears under its name only when it is whole.

    Raises OSError that says where the frames are if they cannot be encoded."""
    path = video_path(path, suffixes=(".gif",))
    comment = {"comment": tags["comment"].encode()} if tags and "comment" in tags else {}
    with _frames_kept(path, frames):
        return write_whole(path, frames, plugin="pillow", duration=1000 / fps, loop=0, **comment)


def mp4_bytes(frames: Frames, fps: float) -> bytes:
    """The MP4 of `write_video`, for a page. Raises RuntimeError where the video library is missing."""
    _check_pyav()
    out = io.BytesIO()
    _encode(out, frames, fps, None, {})
    return out.getvalue()


def _encode(
    out: Path | BinaryIO, frames: Frames, fps: float, tags: Mapping[str, str] | None, options: dict[str, str]
) -> None:
    with contextlib.closing(Mp4(out, _size(frames), fps, tags, options)) as mp4:
        for frame in frames:
            mp4.add(frame)
        mp4.flush()


class Mp4:
    """H.264 in BT.709, frame by frame: `add` all frames, `flush`, `close`.

    tags: of the whole file. options: of the container. live: the encoder looks at no frame ahead."""

    def __init__(
        self, out: Path | BinaryIO, size: tuple[int, int], fps: float, tags: Mapping[str, str] | None,
        options: dict[str, str], *, live: bool = False,
    ):  # fmt: skip
        import av

        self._count = 0
        # absolute: FFmpeg takes what stands before a colon for a protocol
        out = out.absolute() if isinstance(out, Path) else out
        self._file = av.open(out, "w", format="mp4", options=options)
        self._file.metadata.update(tags or {})
        rate = Fraction(fps).limit_denominator(1001)
        self._stream = self._file.add_stream("libx264", rate=rate, options={"tune": "zerolatency"} if live else {})
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"
        codec = self._stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = BT709
        codec.color_range = LIMITED

    def add(self, frame: np.ndarray) -> None:
        self._file.mux(self.encoded(frame))

    def encoded(self, frame: np.ndarray) -> "list[av.Packet]":
        """What the encoder gives now."""
        import av

        width, height = self._stream.width, self._stream.height
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
        # without being told, FFmpeg converts with the matrix of standard definition
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.pts, picture.time_base = self._count, 1 / self._stream.codec_context.framerate
        self._count += 1
        return self._stream.encode(picture)

    def begin(self) -> None:
        """Opens the encoder, whose `profile` is known then."""
        self._file.start_encoding()

    @property
    def profile(self) -> bytes:
        """Of H.264: profile, constraints and level, which stand in its parameters behind their start code and kind."""
        return bytes(self._stream.codec_context.extradata[5:8])

    def mux(self, packets: "list[av.Packet]", file: "av.container.OutputContainer") -> None:
        """Packets of this encoder into another file, which has nothing yet."""
        stream = file.add_stream_from_template(self._stream)
        for packet in packets:
            packet.stream = stream
        file.mux(packets)

    def flush(self) -> None:
        self._file.mux(self._stream.encode())  # what the encoder still holds

    def close(self) -> None:
        self._file.close()


def _size(frames: Frames) -> tuple[int, int]:
    """(width, height) of what is encoded."""
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    return width, height


class GrowingVideo:
    """An H.264 MP4 that plays while it grows: one fragment a frame, each on disk when the next frame comes.

    with GrowingVideo(path, fps=16) as video:
        video.append(frames)

    The file is begun, and one of that name replaced, with the first frames; it is whole when the block is left, by an
    error too. Odd sizes lose their last row or column. Raises what `write_video` raises: before it touches the file, or
    of frames that cannot be encoded, those being in the folder that the error names.
    """

    def __init__(self, path: str | Path, fps: float, tags: Mapping[str, str] | None = None):
        self.path, self.fps, self.tags = video_path(path, suffixes=(".mp4",)), fps, tags
        self.count = 0  # frames in the file
        self._mp4: Mp4 | None = None
        self._size: tuple[int, int] | None = None

    def append(self, frames: Frames) -> None:
        size = _size(frames)
        if self._mp4 is not None and size != self._size:
            raise ValueError(f"frames of {size[::-1]} in a video of {self._size[::-1]}")
        begun = self.count
        try:
            if self._mp4 is None:
                self._mp4, self._size = Mp4(self.path, size, self.fps, self.tags, GROWING, live=True), size
            for frame in frames:
                self._mp4.add(frame)
                self.count += 1
        except Exception as error:
            left = itertools.chain(frames[self.count - begun :], self._later())
            raise _kept(self.path, left, error, first=self.count) from error

    def _later(self) -> Iterable[np.ndarray]:
        """Frames that were to follow those which could not be encoded."""
        return ()

    def close(self) -> None:
        if self._mp4 is not None:
            mp4, self._mp4 = self._mp4, None
            with contextlib.closing(mp4):
                mp4.flush()

    def __enter__(self) -> "GrowingVideo":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):  # the first error is told
            self.close()


class WrittenBehind(GrowingVideo):
    """A `GrowingVideo` that a thread of its own writes, so that whoever makes the frames goes on at once.

    `append` waits only where `ahead` parts are waiting already: an encoder that is too slow holds back what it is fed
    from, and memory does not grow. picture: makes the frames of a part, in the thread too. What goes wrong there is
    raised by the next `append`, or by `close`; by then every frame that was appended is in the file or, where they
    cannot be encoded, in the folder that the error names. The thread ends when the block is left.
    """

    def __init__(
        self, path: str | Path, fps: float, tags: Mapping[str, str] | None = None, *, ahead: int = 2,
        picture: Callable[[np.ndarray], Frames] = lambda part: part,
    ):  # fmt: skip
        super().__init__(path, fps, tags)
        self._picture, self._queue = picture, queue.Queue(ahead)
        self._parts: Iterator[np.ndarray] = iter(())
        self._thread: threading.Thread | None = None
        self._failed, self._error = threading.Event(), None

    def append(self, frames: np.ndarray) -> None:
        if self._thread is None:
            self._parts = self._appended()
            self._thread = threading.Thread(target=self._write, name=f"writes {self.path.name}", daemon=True)
            self._thread.start()
        self._queue.put(frames)
        if self._failed.is_set():
            self.close()

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):  # the first error is told
            super().close()
        if error is not None:
            raise error

    def _appended(self) -> Iterator[np.ndarray]:
        while (part := self._queue.get()) is not None:  # None: that was all
            yield part

    def _write(self) -> None:
        try:
            for part in self._parts:
                super().append(self._picture(part))
        except BaseException as error:
            self._error = error
            self._failed.set()
            for _ in self._parts:  # to the end: or `append` would wait for room that nobody makes
                pass

    def _later(self) -> Iterator[np.ndarray]:
        self._failed.set()
        return itertools.chain.from_iterable(map(self._picture, self._parts))


@contextlib.contextmanager
def _frames_kept(path: Path, frames: Frames) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _kept(path, frames, error) from error


def _kept(path: Path, frames: Iterable[np.ndarray], error: Exception, first: int = 0) -> OSError:
    """Leaves the frames as PNGs in a folder of their own beside the file; the error that says so, or that it failed."""
    reason = f"{path} cannot be encoded ({getattr(error, 'strerror', None) or error})"
    folder, n = path.with_name(f"{path.stem}_frames"), 1
    while folder.exists():
        folder, n = path.with_name(f"{path.stem}_frames_{n}"), n + 1
    for i, frame in enumerate(frames, first):
        try:
            write_png(folder / f"{i:05d}.png", frame)
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()  # where there is none
            kept = f"only its frames {first} to {i - 1} are in {folder}" if i > first else "its frames are lost"
            return OSError(f"{reason}, and PNGs cannot be written either: {kept}")
    what = "its frames are" if not first else f"its frames from {first} on, as far as they are sampled, are"
    return OSError(f"{reason}; {what} in {folder} as PNGs")
