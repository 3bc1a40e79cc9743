"""Pictures of videos: grids, strips, labels, and PNG files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from einops import rearrange
from jaxtyping import Float, Shaped, UInt8

from rcm_jax.media.sizes import columns
from rcm_jax.outputs import unfinished

Frames = UInt8[np.ndarray, "F H W 3"]
WHITE = 255


def to_uint8(video: Float[np.ndarray, "... 3"]) -> UInt8[np.ndarray, "... 3"]:
    """[-1, 1] to 0..255."""
    return np.round((np.clip(video, -1, 1) + 1) * 127.5).astype(np.uint8)


def enlarge(video: Shaped[np.ndarray, "... H W 3"], scale: int) -> Shaped[np.ndarray, "... h w 3"]:
    """Every pixel becomes scale x scale pixels."""
    return video.repeat(scale, axis=-3).repeat(scale, axis=-2)


def grid(rows: Sequence[Sequence[Frames]], *, gap: int = 1) -> Frames:
    """Rows of videos of one shape as one video, `gap` white pixels apart."""
    (F, H, W, _), N = rows[0][0].shape, max(map(len, rows))
    out = np.full((F, len(rows) * (H + gap) - gap, N * (W + gap) - gap, 3), WHITE, np.uint8)
    for r, row in enumerate(rows):
        for n, video in enumerate(row):
            out[:, r * (H + gap) : r * (H + gap) + H, n * (W + gap) : n * (W + gap) + W] = video
    return out


def tiled(videos: Sequence[Frames], *, scale: int = 1, gap: int = 1) -> Frames:
    """The `grid` of videos of one size in one row, or in as many as a file needs when it is enlarged `scale` times.
    Raises ArgumentError where even those do not fit."""
    _, H, W, _ = videos[0].shape
    n = columns(len(videos), (W * scale, H * scale), gap * scale)
    return grid([videos[i : i + n] for i in range(0, len(videos), n)], gap=gap)


def strip(video: Frames, *, frames: int) -> UInt8[np.ndarray, "H w 3"]:
    """`frames` of its frames from first to last, side by side."""
    picked = video[np.linspace(0, len(video) - 1, frames).round().astype(int)]
    return rearrange(picked, "f h w c -> h (f w) c")


def label_rows(frames: Frames, labels: list[str], *, width: int = 150) -> Frames:
    """A margin on the left with one label a row of the grid, centred on it."""
    from PIL import Image, ImageDraw

    F, H, _, _ = frames.shape
    margin = Image.new("RGB", (width, H), "white")
    for i, label in enumerate(labels):
        ImageDraw.Draw(margin).text((8, (i + 0.5) * H / len(labels)), label, fill="black", anchor="lm", font_size=14)
    return np.concatenate([np.broadcast_to(np.asarray(margin), (F, H, width, 3)), frames], axis=2)


def label_columns(frames: Frames, labels: list[str], *, left: int = 0) -> Frames:
    """A margin on top with one label a column of the grid, which begins `left` pixels from the left; words that would
    leave their column go to the next line."""
    from PIL import Image, ImageDraw

    F, _, W, _ = frames.shape
    width, size = (W - left) / len(labels), 13
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    wrapped = [_wrapped(label, lambda text: draw.textlength(text, font_size=size) <= width - 4) for label in labels]
    height = 8 + (size + 4) * max(text.count("\n") + 1 for text in wrapped)
    margin = Image.new("RGB", (W, height + height % 2), "white")
    for i, text in enumerate(wrapped):
        where = (left + (i + 0.5) * width, height - 4)
        ImageDraw.Draw(margin).text(where, text, fill="black", anchor="md", align="center", font_size=size)
    return np.concatenate([np.broadcast_to(np.asarray(margin), (F, *np.shape(margin))), frames], axis=1)


def _wrapped(text: str, fits: Callable[[str], bool]) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if fits(longer) else [lines[-1], word]
    return "\n".join(line for line in lines if line)


def write_png(path: str | Path, image: UInt8[np.ndarray, "H W 3"], tags: Mapping[str, str] | None = None) -> Path:
    """The file appears under its name only when it is whole. tags: of its text, e.g. title and comment."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    for name, value in (tags or {}).items():
        text.add_itxt(name.title(), value)
    return write_whole(path, image, **({"plugin": "pillow", "pnginfo": text} if tags else {}))


def write_whole(path: str | Path, image: UInt8[np.ndarray, "... H W 3"], **how: Any) -> Path:
    """Writes with imageio, `how` being its options, under another name until it is whole. Makes the folder."""
    with unfinished(path) as new:
        iio.imwrite(new, image, **how)
    return Path(path)
