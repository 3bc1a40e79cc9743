"""What a pipeline makes: a video that knows where it comes from, saves itself and shows itself in a notebook."""

import base64
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rcm_jax.media.pictures import enlarge, strip, tiled, write_png
from rcm_jax.media.video import mp4_bytes, video_path, write_gif, write_video
from rcm_jax.pipelines.about import join, tags

STRIP = 5  # frames of a strip


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """frames: [F, H, W, 3], 0 to 255. fps: frames a second. index: which of its seed's noises it was made from.

    scale: how many times files and notebooks enlarge a pixel (the built-in world's frames have 24 of them). about: how
    it was made; files carry it as their comment, beside the prompt as their title."""

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float
    seed: int
    prompt: str
    index: int = 0
    scale: int = 1
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes .mp4, .gif, or as .png a strip of some frames; the file appears under its name when it is whole.

        Raises ArgumentError (a ValueError) for another suffix and for a path that cannot be written, and OSError that
        says where the frames are if they cannot be encoded."""
        path, frames = video_path(path), enlarge(self.frames, self.scale)
        says = tags(self.prompt, self.about, self.fps, self.scale)
        if path.suffix == ".png":
            return write_png(path, strip(frames, frames=min(STRIP, len(frames))), says)
        return (write_video if path.suffix == ".mp4" else write_gif)(path, frames, self.fps, says)

    def _repr_html_(self) -> str:
        """An MP4 inside the page, which plays and repeats by itself."""
        data = base64.b64encode(mp4_bytes(enlarge(self.frames, self.scale), self.fps)).decode()
        words = html.escape(f"{self.prompt} (seed {self.seed}, {self.index})", quote=True)
        return f'<video controls autoplay loop muted title="{words}" src="data:video/mp4;base64,{data}"></video>'


def side_by_side(videos: Sequence[Video], *, gap: int = 0) -> Video:
    """Videos of one size as one, `gap` pixels apart, in rows where one would be too wide for a file; it has the first
    one's seed and prompt. Raises ArgumentError where there are too many."""
    frames = tiled([video.frames for video in videos], scale=videos[0].scale, gap=gap)
    return dataclasses.replace(videos[0], frames=frames, about=join([video.about for video in videos]))
