"""The built-in world: one coloured shape moving over a grey background, with a codec and a text encoder of its own.

A video is FRAMES frames of SIZE x SIZE RGB in [-1, 1]. Its caption, "a red circle moving left", fixes colour, shape
and direction; start, size, speed and background brightness are free, so that diversity can be measured. Video i of a
seed depends on (seed, i) alone. Lengths are in pixels and frames; the centre of pixel (row y, column x) is at (x, y),
so the frame reaches from -0.5 to SIZE - 0.5 and y points down. The shapes of one radius have one area, that of the
circle: size tells nothing about shape.
"""

from rcm_jax.worlds.toy.codec import CODEC_FILE, ToyCodec, fit_codec
from rcm_jax.worlds.toy.text import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    TEXT_DIM,
    TEXT_LEN,
    WORDS,
    Caption,
    captions,
    encode_text,
)
from rcm_jax.worlds.toy.videos import (
    BACKGROUND,
    FRAMES,
    RADIUS,
    SIZE,
    SPEED,
    Scenes,
    batch,
    coverage,
    render,
    sample,
    scenes,
)

__all__ = [
    "BACKGROUND",
    "CODEC_FILE",
    "COLOURS",
    "DIRECTIONS",
    "FRAMES",
    "RADIUS",
    "SHAPES",
    "SIZE",
    "SPEED",
    "TEXT_DIM",
    "TEXT_LEN",
    "WORDS",
    "Caption",
    "Scenes",
    "ToyCodec",
    "batch",
    "captions",
    "coverage",
    "encode_text",
    "fit_codec",
    "render",
    "sample",
    "scenes",
]
