"""Images to start a video from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from PIL import Image


def open_image(path: str | Path) -> Image.Image:
    """An image in RGB, upright; deeper ones scaled to 8 bits, transparent ones on white, with a warning.

    Raises FileNotFoundError, or ValueError for what is not an image."""
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image at {path}")
    try:
        with Image.open(path) as opened:
            return _opaque(_eight_bits(ImageOps.exif_transpose(opened)), path).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises over other files and damaged ones
        raise ValueError(f"{path} is not an image that can be read: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow would clip what has more bits. White is the end of the smallest range that holds the values, as I and F do
    not say theirs: 65535 of I;16, of the others 1 (F alone), 255 or 65535."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= whites[-1]):
        raise ValueError(f"its values go from {low:g} to {high:g}; they must be in 0..{whites[-1]}")
    white = next(white for white in whites if high <= white)
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def _opaque(image: Image.Image, path: Path) -> Image.Image:
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return image
    warnings.warn(f"{path} has transparent pixels: they are shown on white", stacklevel=3)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def pixels(image: Image.Image, size: tuple[int, int] | None = None) -> Float[np.ndarray, "H W 3"]:
    """In [-1, 1], stretched to `size` (width, height) if given: bilinear and antialiased, as in rCM for Wan2.2."""
    from PIL import Image

    return _scaled(image if size is None else image.resize(size, Image.Resampling.BILINEAR))


def first_frame(image: Image.Image, size: tuple[int, int], *, cut: bool) -> Float[np.ndarray, "H W 3"]:
    """In [-1, 1], what a video of `size` (width, height) begins with, by Lanczos' kernel: stretched, as in Causal-rCM,
    or with `cut` in its own proportions and cut on both sides, as in Wan2.2's code for TI2V-5B."""
    from PIL import Image, ImageOps

    return _scaled((ImageOps.fit if cut else Image.Image.resize)(image, size, Image.Resampling.LANCZOS))


def _scaled(image: Image.Image) -> Float[np.ndarray, "H W 3"]:
    return np.asarray(image, np.float32) / 127.5 - 1
