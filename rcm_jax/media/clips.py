"""Clips out of video files: frames by their times, resized to cover a size and cropped, with no change of scene inside.

A frame of the clip is the one that a player would show at its time, counted from the file's first frame: so sources of
more frames a second lose some, and those of fewer show some twice.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
TICK = Fraction(1, 1000)  # seconds to which containers round the times of frames
THUMBNAIL = (16, 16)  # of the pictures by which scenes are told apart
CUT = 0.1  # mean difference of two thumbnails, as a part of the range of values, above which a scene has changed
HD = 720  # lines from which on pictures that do not say their matrix have that of BT.709
Picture = UInt8[np.ndarray, "H W 3"]


class BadVideo(ValueError):
    """A file that gives no clip; the message says why, without its name."""


class SceneCut(BadVideo):
    """A file whose scenes are all too short."""


@dataclasses.dataclass(frozen=True)
class Header:
    """seconds: None where the file does not say how long it is."""

    width: int
    height: int
    seconds: float | None

    def frames(self, fps: float) -> int | None:
        """How many frames it gives at that rate."""
        return None if self.seconds is None else math.ceil((Fraction(self.seconds) - TICK) * Fraction(fps))


def read_header(path: str | Path) -> Header:
    """What the file says of itself; its first frame is decoded too. Raises BadVideo."""
    with _opened(path) as (file, stream):
        picture = next(file.decode(stream), None)
        if picture is None:
            raise BadVideo("it has no frame that can be decoded")
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = None if file.duration is None else file.duration / 1e6
        return Header(picture.width, picture.height, seconds)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; what the library raises inside becomes BadVideo."""
    import av

    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise BadVideo("there is no video in it")
            stream = file.streams.video[0]
            if stream.codec_context is None:
                raise BadVideo("its codec cannot be read")
            stream.thread_type = "AUTO"
            yield file, stream
    except av.error.FFmpegError as error:
        raise BadVideo(f"it cannot be read: {error.strerror or error}") from error


def frames_at(path: str | Path, fps: float, size: tuple[int, int]) -> Iterator[Picture]:
    """The file's frames at 0, 1/fps, 2/fps … seconds as `covering` makes them; a frame that is shown twice is made
    once. Raises BadVideo."""
    step, count, begin, shown, picture = 1 / Fraction(fps), 0, None, None, None
    with _opened(path) as (file, stream):
        for frame in file.decode(stream):
            if frame.pts is None:
                raise BadVideo("its frames have no times")
            begin = frame.pts if begin is None else begin
            while shown is not None and count * step + TICK < (frame.pts - begin) * frame.time_base:
                picture = _covering(shown, stream, size) if picture is None else picture
                count += 1
                yield picture
            shown, picture = frame, None
        if shown is None:
            raise BadVideo("it has no frame that can be decoded")
        duration = shown.duration * shown.time_base if shown.duration else 1 / (stream.average_rate or step)
        while count * step + TICK < (shown.pts - begin) * shown.time_base + duration:
            picture = _covering(shown, stream, size) if picture is None else picture
            count += 1
            yield picture


def _covering(frame: Any, stream: Any, size: tuple[int, int]) -> Picture:
    """A decoded frame as it is meant to be seen: its own colours, upright, its pixels' proportions."""
    from av.video.reformatter import ColorRange, Colorspace

    known = {int(space) for space in Colorspace}
    unsaid = Colorspace.ITU709 if frame.height >= HD else Colorspace.ITU601
    matrix = {6: 5}.get(int(frame.colorspace), int(frame.colorspace))  # SMPTE 170M has BT.601's
    pixels = frame.reformat(
        format="rgb24", src_colorspace=matrix if matrix in known else unsaid,
        src_color_range=frame.color_range or ColorRange.MPEG, dst_color_range=ColorRange.JPEG,
    ).to_ndarray()  # fmt: skip
    aspect, turns = float(stream.sample_aspect_ratio or 1), round(frame.rotation / 90)
    return covering(np.rot90(pixels, turns), size, 1 / aspect if turns % 2 else aspect)


def covering(picture: Picture, size: tuple[int, int], aspect: float = 1.0) -> Picture:
    """The middle of a picture that has the proportions of (width, height), in that size: averaged where it becomes
    smaller, by Lanczos' kernel where it becomes larger. aspect: width of one of its pixels over its height."""
    from PIL import Image

    (height, width), (new_width, new_height) = picture.shape[:2], size
    scale = max(new_width / (width * aspect), new_height / height)
    half = min(width, new_width / (scale * aspect)) / 2, min(height, new_height / scale) / 2
    box = (width / 2 - half[0], height / 2 - half[1], width / 2 + half[0], height / 2 + half[1])
    how = Image.Resampling.BOX if scale <= 1 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size, how, box=box))


def read_clip(
    path: str | Path, *, size: tuple[int, int], num_frames: int, fps: float, cut: float | None = None
) -> UInt8[np.ndarray, "F H W 3"]:
    """The first `num_frames` frames of the file, or, with `cut`, of its longest run of frames in which no two
    neighbours differ by more (see `difference`). Raises BadVideo; SceneCut where that run is too short."""
    frames = frames_at(path, fps, size)
    with contextlib.closing(frames):
        if cut is None:
            clip = [picture for picture, _ in zip(frames, range(num_frames), strict=False)]
            if len(clip) < num_frames:
                raise BadVideo(too_short(len(clip), num_frames, fps))
        else:
            clip, longest, count = longest_run(frames, num_frames, cut)
            if count < num_frames:
                raise BadVideo(too_short(count, num_frames, fps))
            if longest < num_frames:
                raise SceneCut(f"its longest run without a cut has {longest} frames of {num_frames}")
    return np.stack(clip)


def too_short(frames: int, num_frames: int, fps: float) -> str:
    return f"it has {frames} frames at {fps:g} a second, and {num_frames} are asked for"


def longest_run(frames: Iterable[Picture], keep: int, cut: float) -> tuple[list[Picture], int, int]:
    """The first `keep` frames of the longest run without a cut, how long it is, and how many frames there are."""
    best: list[Picture] = []
    run: list[Picture] = []
    longest, length, count, last = 0, 0, 0, None
    for picture in frames:
        small = thumbnail(picture)
        if last is not None and difference(last, small) > cut:
            run, length = [], 0
        last, length, count = small, length + 1, count + 1
        if len(run) < keep:
            run.append(picture)
        if length > longest:
            best, longest = run, length
    return best, longest, count


def thumbnail(picture: Picture) -> Float[np.ndarray, "h w 3"]:
    """Averages over the cells of a coarse grid: what moves inside a scene changes them little."""
    from PIL import Image

    small = Image.fromarray(picture).resize(THUMBNAIL, Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def difference(one: Float[np.ndarray, "h w 3"], other: Float[np.ndarray, "h w 3"]) -> float:
    """Between two thumbnails, 0 to 1: the mean of the absolute differences."""
    return float(np.abs(one - other).mean())
