"""The built-in world: one coloured shape moving over a grey background, with a codec and a text encoder of its own.

A video is FRAMES frames of SIZE x SIZE RGB in [-1, 1]. Its caption, "a red circle moving left", fixes colour, shape
and direction; start, size, speed and background brightness are free, so that diversity can be measured. Video i of a
seed depends on (seed, i) alone. Lengths are in pixels and frames; the centre of pixel (row y, column x) is at (x, y),
so the frame reaches from -0.5 to SIZE - 0.5 and y points down. The shapes of one radius have one area, that of the
circle: size tells nothing about shape.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rcm_jax.types import Latents, Video

FRAMES, SIZE = 9, 24
RADIUS, SPEED, BACKGROUND = (4.0, 5.5), (0.8, 1.2), (-0.6, 0.4)  # ranges: pixels, pixels a frame, grey level
COLOURS = {
    "red": (0.9, -0.7, -0.7),
    "green": (-0.7, 0.7, -0.6),
    "blue": (-0.7, -0.4, 0.9),
    "yellow": (0.9, 0.8, -0.7),
}
SHAPES = {"circle": 1.0, "square": math.sqrt(math.pi) / 2, "diamond": math.sqrt(math.pi / 2)}  # half extent / radius
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WORDS = {
    "article": ("a",),
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "verb": ("moving",),
    "direction": tuple(DIRECTIONS),
}
TEXT_LEN, TEXT_DIM = 8, 64
CODEC_FILE = Path(__file__).with_name("toy_codec.npz")

# --- captions -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Caption:
    colour: str
    shape: str
    direction: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"

    @classmethod
    def parse(cls, text: str) -> "Caption":
        """Reads a full caption; raises ValueError for anything else, prompts of fewer words included."""
        match _words(text):
            case ["a", colour, shape, "moving", direction] if (
                colour in COLOURS and shape in SHAPES and direction in DIRECTIONS
            ):
                return cls(colour, shape, direction)
        raise ValueError(f"{text!r} is not a caption of the built-in world, as {captions()[0]!r} is; {_vocabulary()}")


@functools.cache
def _all_captions() -> tuple[Caption, ...]:
    return tuple(Caption(*names) for names in itertools.product(COLOURS, SHAPES, DIRECTIONS))


def captions() -> list[str]:
    """The 48 captions; `Scenes.caption` counts in this order."""
    return [str(c) for c in _all_captions()]


# --- videos ---------------------------------------------------------------------------------------------------------


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
        which = np.floor(u[:, 0] * len(_all_captions())).astype(int)
    else:
        wanted = [caption] * len(u) if isinstance(caption, str) else caption
        if len(wanted) != len(u):
            raise ValueError(f"{len(wanted)} captions for {len(u)} videos")
        which = np.array([_all_captions().index(Caption.parse(c)) for c in wanted], int)
    radius, speed, background = (
        low + (high - low) * u[:, k] for k, (low, high) in enumerate((RADIUS, SPEED, BACKGROUND), start=1)
    )
    step = np.array([DIRECTIONS[c.direction] for c in _all_captions()], float)[which] * speed[:, None]
    extent = np.array([SHAPES[c.shape] for c in _all_captions()])[which] * radius
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
    shapes = np.array([c.shape for c in _all_captions()])[scene.caption]
    for shape in SHAPES:
        i = np.flatnonzero(shapes == shape)
        cover[i] = coverage(shape, scene.centre[i], scene.radius[i, None])
    colour = np.array([COLOURS[c.colour] for c in _all_captions()])[scene.caption]
    contrast = (colour - scene.background[:, None]).astype(np.float32)
    video = cover[..., None] * contrast[:, None, None, None, :]
    video += scene.background.astype(np.float32)[:, None, None, None, None]
    return video


def batch(
    seed: int, indices: Sequence[int], caption: str | Sequence[str] | None = None
) -> tuple[Float[np.ndarray, "B F H W 3"], list[str]]:
    """Videos `indices` of `seed` and their captions. With `caption`, of these: what the scores compare samples with."""
    scene = scenes(seed, indices, caption)
    return render(scene), [str(_all_captions()[i]) for i in scene.caption]


def sample(seed: int, index: int) -> ToyVideo:
    """One video, its caption and its free parameters (x, y: the centre in the first frame)."""
    scene = scenes(seed, [index])
    x, y = scene.centre[0, 0]
    params = {"radius": scene.radius[0], "speed": scene.speed[0], "background": scene.background[0], "x": x, "y": y}
    return ToyVideo(render(scene)[0], str(_all_captions()[scene.caption[0]]), {k: float(v) for k, v in params.items()})


# --- codec ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ToyCodec:
    """A linear stand-in for the VAE: square patches to a few whitened principal components, frame by frame.

    `encode` and `decode` are pure and work under jit, grad and vmap; the arrays are constants of the trace.
    """

    mean: Float[np.ndarray, " P"]  # P = spatial * spatial * 3 numbers a patch, ordered (row, column, RGB)
    encoder: Float[np.ndarray, "P C"]
    decoder: Float[np.ndarray, "C P"]

    temporal = 1

    @property
    def channels(self) -> int:
        return self.decoder.shape[0]

    @property
    def spatial(self) -> int:
        return math.isqrt(len(self.mean) // 3)

    @classmethod
    def load(cls, path: str | Path = CODEC_FILE) -> "ToyCodec":
        with np.load(path) as file:
            return cls(file["mean"], file["encoder"], file["decoder"])

    def save(self, path: str | Path = CODEC_FILE) -> None:
        np.savez(path, mean=self.mean, encoder=self.encoder, decoder=self.decoder)

    def encode(self, video: Video) -> Latents:
        """[B, F, H, W, 3] in [-1, 1] to latents [B, F, H/4, W/4, 12] of mean 0 and variance 1 over the world."""
        x = _to_patches(jnp.asarray(video, jnp.float32), self.spatial)
        shift = -self.mean @ self.encoder
        # full float32: GPUs round the factors of a product to fewer digits unless told otherwise
        z = jnp.einsum("bthwp,pc->bthwc", x, self.encoder, precision=jax.lax.Precision.HIGHEST)
        return z + jnp.broadcast_to(shift, z.shape)

    def decode(self, latents: Latents) -> Video:
        """Latents [B, T, H, W, 12] to video [B, T, 4H, 4W, 3], clipped to [-1, 1]."""
        z = jnp.asarray(latents, jnp.float32)
        x = jnp.einsum("bthwc,cp->bthwp", z, self.decoder, precision=jax.lax.Precision.HIGHEST)
        return jnp.clip(_from_patches(x + jnp.broadcast_to(self.mean, x.shape), self.spatial), -1, 1)


def _to_patches(video: Array, p: int) -> Array:
    B, F, H, W, C = video.shape
    if H % p or W % p:
        raise ValueError(f"a video of {H}x{W} pixels does not divide into {p}x{p} patches; use multiples of {p}")
    rows = video.reshape(B, F, H // p, p, W // p, p, C)
    return rows.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, F, H // p, W // p, p * p * C)


def _from_patches(patches: Array, p: int) -> Array:
    B, F, H, W, _ = patches.shape
    return patches.reshape(B, F, H, W, p, p, 3).transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, F, H * p, W * p, 3)


def fit_codec(*, videos: int = 2048, seed: int = 2025, spatial: int = 4, channels: int = 12) -> ToyCodec:
    """Principal components of all patches of `videos` videos. The shipped file is `fit_codec().save()`."""
    total, product, count = 0.0, 0.0, 0
    for start in range(0, videos, 256):
        pixels, _ = batch(seed, range(start, min(start + 256, videos)))
        x = np.asarray(_to_patches(pixels, spatial), np.float64).reshape(-1, spatial * spatial * 3)
        total, product, count = total + x.sum(0), product + x.T @ x, count + len(x)
    mean = total / count
    variance, vectors = np.linalg.eigh(product / count - np.outer(mean, mean))
    variance, vectors = variance[::-1][:channels], vectors[:, ::-1][:, :channels]
    # an eigenvector's sign is free: make its largest entry positive, so that every machine fits the same codec
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(channels)])
    encoder, decoder = vectors / np.sqrt(variance), (vectors * np.sqrt(variance)).T
    return ToyCodec(mean.astype(np.float32), encoder.astype(np.float32), decoder.astype(np.float32))


# --- text -----------------------------------------------------------------------------------------------------------


def encode_text(prompts: Sequence[str]) -> Float[np.ndarray, "B L D"]:
    """One fixed random vector a word, in order, zero rows after the last; "" is all zeros, the unconditional text.

    A prompt need not be a full caption ("red circle" will do). An unknown word or more than TEXT_LEN words raise
    ValueError.
    """
    vectors = _word_vectors()
    out = np.zeros((len(prompts), TEXT_LEN, TEXT_DIM), np.float32)
    for row, prompt in zip(out, prompts, strict=True):
        words = _words(prompt)
        if unknown := [w for w in words if w not in vectors]:
            raise ValueError(f"unknown words {unknown} in the prompt {prompt!r}; {_vocabulary()}")
        if len(words) > TEXT_LEN:
            raise ValueError(f"the prompt {prompt!r} has {len(words)} words; at most {TEXT_LEN} fit")
        for slot, word in zip(row, words, strict=False):
            slot[:] = vectors[word]
    return out


def _words(prompt: str) -> list[str]:
    return prompt.lower().split()


def _vocabulary() -> str:
    return "the known words are " + "; ".join(f"{group}: {', '.join(words)}" for group, words in WORDS.items())


@functools.cache
def _word_vectors() -> dict[str, Float[np.ndarray, " D"]]:
    # RandomState's normals are frozen for ever, a Generator's are not; trained checkpoints depend on these numbers.
    words = [w for group in WORDS.values() for w in group]
    return dict(zip(words, np.random.RandomState(11).standard_normal((len(words), TEXT_DIM)), strict=True))
