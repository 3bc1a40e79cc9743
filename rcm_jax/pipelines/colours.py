"""Latents as colours by a linear map: a look at a video while it is made."""

import numpy as np
from einops import reduce
from jaxtyping import Float

from rcm_jax.worlds.world import World

SIDE = 16  # random latents of one frame, SIDE x SIDE of them: many more than a map of 16 channels has numbers

Map = Float[np.ndarray, "C+1 3"]  # the last row is the colour of zeros


def fit_colours(world: World, channels: int) -> Map:
    """The least squares map from a latent to the mean colour of the pixels that it becomes."""
    latents = np.random.default_rng(0).standard_normal((1, 1, SIDE, SIDE, channels)).astype(np.float32)
    frame = np.concatenate([np.asarray(part) for part in next(iter(world.decode(latents)))])[0]
    colours = reduce(frame, "(h p) (w q) c -> (h w) c", "mean", h=SIDE, w=SIDE)
    return np.linalg.lstsq(_with_ones(latents.reshape(-1, channels)), colours, rcond=None)[0]


def apply_colours(colours: Map, latents: Float[np.ndarray, "B T H W C"]) -> Float[np.ndarray, "B T H W 3"]:
    return _with_ones(latents) @ colours


def _with_ones(latents: Float[np.ndarray, "*B C"]) -> Float[np.ndarray, "*B C+1"]:
    return np.concatenate([latents, np.ones_like(latents[..., :1])], axis=-1)
