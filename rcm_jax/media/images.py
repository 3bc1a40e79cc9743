"""Images to start a video from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from PIL import Image


def open_image(path: str | Path) -> Image.Image:
    """An image in RGB, upright. Raises FileNotFoundError, or ValueError for what is not an image."""
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image at {path}")
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises over other files and damaged ones
        raise ValueError(f"{path} is not an image that can be read: {error}") from error


def pixels(image: Image.Image, size: tuple[int, int] | None = None) -> Float[np.ndarray, "H W 3"]:
    """In [-1, 1], resized to `size` (width, height) if given: bilinear and antialiased, as in rCM."""
    from PIL import Image

    image = image if size is None else image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 127.5 - 1
