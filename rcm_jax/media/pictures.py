"""Pictures of videos: grids, strips, labels, and PNG files."""

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
