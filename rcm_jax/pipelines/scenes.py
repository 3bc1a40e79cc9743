"""Scenes in a prompt: "a red fox in snow [5s] | the fox sleeps [10s#] | it wakes [10s]", as infinity_rope has them.

Every scene says how long it lasts, and with that how long the video is; `#` makes it begin with a cut. A prompt without
a `|` that does not end in a length is plain text, other brackets included.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError

SCENE = re.compile(r"\s*(?P<text>.*?)\s*\[\s*(?P<seconds>\d+\.?\d*|\.\d+)\s*s\s*(?P<cut>#?)\s*\]\s*", re.DOTALL)


class Scene(NamedTuple):
    """blocks: how many chunks it lasts. cut: whether it begins with one."""

    text: str
    blocks: int
    cut: bool


def has_scenes(prompt: str) -> bool:
    return "|" in prompt or SCENE.fullmatch(prompt) is not None


def read_scenes(prompt: str, pattern: ChunkPattern, fps: int = 16, stride: int = 4) -> tuple[list[Scene], int]:
    """The scenes of a prompt in chunks, and the video's frames. stride: frames of a latent frame after the first.

    The frames are all the seconds', rounded down, then up to whole chunks. A scene has the chunks that its own latent
    frames touch if it begins one, but leaves one to each scene after it; the last has what is left.
    Raises ArgumentError for a scene without text or length, and for more scenes than chunks.
    """
    parts = [_scene(part, i) for i, part in enumerate(prompt.split("|"), 1)]
    seconds = [float(part["seconds"]) for part in parts]
    latent = max(1, 1 + (int(fps * sum(seconds)) - 1) // stride)
    chunks = 1 + max(0, math.ceil((latent - pattern.first) / pattern.rest))
    if len(parts) > chunks:
        raise ArgumentError(
            f"{{prompt}} has {len(parts)} scenes in {sum(seconds):g} s, which are {chunks} chunks of {pattern}: give "
            "them longer, one chunk each at least", prompt=None,
        )  # fmt: skip
    blocks = _blocks([max(1, round(fps / stride * s)) for s in seconds], pattern, chunks)
    scenes = [
        Scene(part["text"], count, bool(part["cut"]) and i > 0)
        for i, (part, count) in enumerate(zip(parts, blocks, strict=True))
    ]
    return scenes, (pattern.first + (chunks - 1) * pattern.rest - 1) * stride + 1


def _scene(part: str, number: int) -> re.Match:
    match = SCENE.fullmatch(part)
    if match is None:
        raise ArgumentError(
            f"{{prompt}}: scene {number}, {part.strip()!r}, does not end in its length, as in 'a red fox [5s]'",
            prompt=None,
        )  # fmt: skip
    if not match["text"]:
        raise ArgumentError(f"{{prompt}}: scene {number} has a length, {part.strip()!r}, and no text", prompt=None)
    if not float(match["seconds"]):
        raise ArgumentError(f"{{prompt}}: scene {number}, {part.strip()!r}, must last more than 0 s", prompt=None)
    return match


def _blocks(latent: Sequence[int], pattern: ChunkPattern, chunks: int) -> list[int]:
    out: list[int] = []
    for i, frames in enumerate(latent[:-1]):
        own = 1 + max(0, math.ceil((frames - pattern.first) / pattern.rest)) if i == 0 else -(-frames // pattern.rest)
        later = len(latent) - 1 - i
        out.append(min(own, chunks - sum(out) - later))
    return [*out, chunks - sum(out)]
