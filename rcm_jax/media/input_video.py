"""Video that comes in: frames of a file, an array or a camera, a chunk at a time and nothing read ahead of it."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rcm_jax.errors import ArgumentError, MissingFileError
from rcm_jax.media.clips import BadVideo, Picture, frames_at, read_header

Source = str | Path | UInt8[np.ndarray, "F H W 3"] | Iterable[Picture]


@dataclasses.dataclass(frozen=True)
class InputVideo:
    """frames: begins anew at each call, but for an iterator's, which go on. length: how many, where that is known.
    path: of a file, None for others."""

    frames: Callable[[], Iterator[Picture]]
    length: int | None
    fps: float
    path: Path | None = None

    def chunks(self, first: int, rest: int) -> Iterator[UInt8[np.ndarray, "f H W 3"]]:
        """`first` frames, then `rest` each, until there are no more for a whole chunk; a chunk is read when it is asked
        for. Raises ArgumentError where there are too few for the first."""
        with contextlib.closing(self.frames()) as frames:
            for size in itertools.chain((first,), itertools.repeat(rest)):
                chunk = list(itertools.islice(frames, size))
                if len(chunk) < size:
                    break
                yield np.stack(chunk)
                first = 0
        if first:
            raise self.too_short(len(chunk), first)

    def too_short(self, frames: int, first: int) -> ArgumentError:
        return self.error(f"has {frames} frames at {self.fps:g} a second; the first chunk takes {first}")

    def error(self, words: str, **arguments: Any) -> ArgumentError:
        name = "video" if self.path is None else "video_path"
        return ArgumentError(f"{{{name}}} {words}", **{name: self.path}, **arguments)


def open_video(source: Source, *, fps: float, size: tuple[int, int]) -> InputVideo:
    """Of `size` (width, height): files are resampled to `fps` and cut to that size as training clips are; what is given
    as frames must have it, and is taken as it comes.

    Raises ArgumentError for a file that is missing or cannot be read, and for frames that are not uint8 of that size,
    where these are here already; else when they are read.
    """
    if isinstance(source, str | Path):
        return _of_file(Path(source), fps, size)
    if not isinstance(source, Iterable):
        raise ArgumentError(
            f"{{video}} is a {type(source).__name__}: give a path, an array [F, H, W, 3] or an iterable of frames",
            video=None,
        )
    if hasattr(source, "ndim"):
        source = np.asarray(source)
        if source.ndim != 4:
            raise ArgumentError(f"{{video}} has shape {source.shape}: give frames [F, H, W, 3]", video=None)
        _check(source.shape[1:], source.dtype, size)
    length = len(source) if isinstance(source, Sized) else None
    return InputVideo(lambda: _checked(source, size), length, fps)


def _of_file(path: Path, fps: float, size: tuple[int, int]) -> InputVideo:
    if not path.is_file():
        raise MissingFileError("there is no video at {video_path}", video_path=path)

    def frames() -> Iterator[Picture]:
        with _named(path):
            yield from frames_at(path, fps, size)

    with _named(path):
        return InputVideo(frames, read_header(path).frames(fps), fps, path)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Around reading it: errors say which file."""
    try:
        yield
    except BadVideo as error:
        raise ArgumentError(f"{{video_path}}: {error}", video_path=path) from error


def _checked(frames: Iterable[Any], size: tuple[int, int]) -> Iterator[Picture]:
    for frame in frames:
        picture = np.asarray(frame)
        _check(picture.shape, picture.dtype, size)
        yield picture


def _check(shape: tuple[int, ...], dtype: np.dtype, size: tuple[int, int]) -> None:
    wanted = (size[1], size[0], 3)
    if shape != wanted or dtype != np.uint8:
        raise ArgumentError(
            f"{{video}} has frames of shape {shape} in {dtype}; the network takes {wanted} in uint8", video=None
        )
