"""Decoding a large frame tile by tile."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from rcm_jax.types import Latents, Video


def _tiles(length: int, tile: int, overlap: int, scale: int) -> list[tuple[int, Float[np.ndarray, " p"]]]:
    """First latent pixel and weights of every tile along one axis: linear where two overlap, and summing to one."""
    if not 0 < overlap < tile:
        raise ValueError(f"{overlap=} must be at least 1 and less than the side of a tile, {tile}")
    tile = min(tile, length)
    count = 1 if tile == length else -(-(length - overlap) // (tile - overlap))
    starts = np.round(np.linspace(0, length - tile, count)).astype(int)
    place = (np.arange(length * scale) + 0.5) / scale
    weights = np.ones((count, length * scale))
    for k, (left, right) in enumerate(zip(starts, starts[1:], strict=False)):
        fade = ((place - right) / (left + tile - right)).clip(0, 1)  # over the part that tiles k and k + 1 share
        weights[k] *= 1 - fade
        weights[k + 1] *= fade
    weights /= weights.sum(axis=0)
    return [(int(s), w[s * scale : (s + tile) * scale]) for s, w in zip(starts, weights, strict=True)]


def blend_tiles(
    decode: Callable[[Latents], Video], latents: Latents, scale: int, tile: tuple[int, int], overlap: int
) -> Float[np.ndarray, "B F H W 3"]:
    """Decodes tiles of `tile` latent rows and columns one at a time and adds them up on the host.

    All tiles have one size, so `decode` compiles once; neighbours share at least `overlap` latent pixels, over which
    one fades into the other. Raises ValueError where the overlap is not smaller than the tile.
    """
    rows, columns = (_tiles(n, t, overlap, scale) for n, t in zip(latents.shape[2:4], tile, strict=True))
    h, w = (min(n, t) for n, t in zip(latents.shape[2:4], tile, strict=True))
    video = None
    for i, row_weights in rows:
        for j, column_weights in columns:
            frames = np.asarray(decode(latents[:, :, i : i + h, j : j + w]))
            if video is None:
                B, F, _, _, C = frames.shape
                video = np.zeros((B, F, latents.shape[2] * scale, latents.shape[3] * scale, C), frames.dtype)
            part = video[:, :, i * scale : (i + h) * scale, j * scale : (j + w) * scale]
            part += frames * (row_weights[:, None, None] * column_weights[:, None]).astype(frames.dtype)
    return video
