"""The built-in world's videos: scenes drawn from (seed, index), and how they look."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from rcm_jax.worlds.toy.text import COLOURS, DIRECTIONS, SHAPES, Caption, all_captions

FRAMES, SIZE = 9, 24
RADIUS, SPEED, BACKGROUND = (4.0, 5.5), (0.8, 1.2), (-0.6, 0.4)  # ranges: pixels, pixels a frame, grey level


@dataclasses.dataclass(frozen=True)
class Scenes:
    """What the videos of a batch show. `centre` is (x, y) in every frame."""

    caption: Int[np.ndarray, " B"]
    radius: Float[np.ndarray, " B"]
    speed: Float[np.ndarray, " B"]
    background: Float[np.ndarray, " B"]
    centre: Float[np.ndarray, "B F 2"]


@dataclasses.dataclass(frozen=True)
class ToyVideo:
    video: Float[np.ndarray, "F H W 3"]
    caption: str
    params: dict[str, float]


def scenes(seed: int, indices: Sequence[int], caption: str | Sequence[str] | None = None) -> Scenes:
    """Scenes `indices` of `seed`. Captions given here (one, or one an index) replace the drawn ones, nothing else."""
    # PCG64 by name and nothing but uniform doubles: what default_rng means may change between numpy versions.
    draws = [np.random.Generator(np.random.PCG64([seed, int(i)])).random(6) for i in indices]
    u = np.stack(draws) if draws else np.empty((0, 6))
    if caption is None:
        which = np.floor(u[:, 0] * len(all_captions())).astype(int)
    else:
        wanted = [caption] * len(u) if isinstance(caption, str) else caption
        if len(wanted) != len(u):
            raise ValueError(f"{len(wanted)} captions for {len(u)} videos")
        which = np.array([all_captions().index(Caption.parse(c)) for c in wanted], int)
    radius, speed, background = (
        low + (high - low) * u[:, k] for k, (low, high) in enumerate((RADIUS, SPEED, BACKGROUND), start=1)
    )
    step = np.array([DIRECTIONS[c.direction] for c in all_captions()], float)[which] * speed[:, None]
    extent = np.array([SHAPES[c.shape] for c in all_captions()])[which] * radius
    # The middle of the path is uniform over all places that keep the shape inside the frame from first to last.
    room = SIZE / 2 - extent[:, None] - np.abs(step) * (FRAMES - 1) / 2
    middle = (SIZE - 1) / 2 + (2 * u[:, 4:6] - 1) * room
    time = np.arange(FRAMES) - (FRAMES - 1) / 2
    centre = middle[:, None, :] + time[None, :, None] * step[:, None, :]
    return Scenes(which, radius, speed, background, centre)


def coverage(
    shape: str, centre: Float[np.ndarray, "... 2"], radius: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "... H W"]:
    """The share of every pixel that the shape covers, in [0, 1]: a ramp of one pixel across its edge."""
    grid = np.arange(SIZE, dtype=np.float32)
    centre, extent = np.asarray(centre, np.float32), np.asarray(radius * SHAPES[shape], np.float32)
    dx = np.abs(grid - centre[..., 0, None])[..., None, :]
    dy = np.abs(grid - centre[..., 1, None])[..., :, None]
    extent = extent[..., None, None]
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - extent
    elif shape == "square":
        distance = np.maximum(dx, dy) - extent
    else:
        distance = (dx + dy - extent) * np.float32(math.sqrt(0.5))
    return np.clip(0.5 - distance, 0, 1)


def render(scene: Scenes) -> Float[np.ndarray, "B F H W 3"]:
    """Draws the scenes, float32 in [-1, 1]."""
    cover = np.empty((len(scene.caption), FRAMES, SIZE, SIZE), np.float32)
    shapes = np.array([c.shape for c in all_captions()])[scene.caption]
    for shape in SHAPES:
        i = np.flatnonzero(shapes == shape)
        cover[i] = coverage(shape, scene.centre[i], scene.radius[i, None])
    colour = np.array([COLOURS[c.colour] for c in all_captions()])[scene.caption]
    contrast = (colour - scene.background[:, None]).astype(np.float32)
    video = cover[..., None] * contrast[:, None, None, None, :]
    video += scene.background.astype(np.float32)[:, None, None, None, None]
    return video


def batch(
    seed: int, indices: Sequence[int], caption: str | Sequence[str] | None = None
) -> tuple[Float[np.ndarray, "B F H W 3"], list[str]]:
    """Videos `indices` of `seed` and their captions. With `caption`, of these: what the scores compare samples with."""
    scene = scenes(seed, indices, caption)
    return render(scene), [str(all_captions()[i]) for i in scene.caption]


def sample(seed: int, index: int) -> ToyVideo:
    """One video, its caption and its free parameters (x, y: the centre in the first frame)."""
    scene = scenes(seed, [index])
    x, y = scene.centre[0, 0]
    params = {"radius": scene.radius[0], "speed": scene.speed[0], "background": scene.background[0], "x": x, "y": y}
    return ToyVideo(render(scene)[0], str(all_captions()[scene.caption[0]]), {k: float(v) for k, v in params.items()})
