"""The built-in world's stand-in for an autoencoder, fitted to its videos."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from rcm_jax.types import Latents, Video
from rcm_jax.worlds.toy.videos import batch

CODEC_FILE = Path(__file__).with_name("codec.npz")


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
    H, W = video.shape[2:4]
    if H % p or W % p:
        raise ValueError(f"a video of {H}x{W} pixels does not divide into {p}x{p} patches; use multiples of {p}")
    return rearrange(video, "b f (h p) (w q) c -> b f h w (p q c)", p=p, q=p)


def _from_patches(patches: Array, p: int) -> Array:
    return rearrange(patches, "b f h w (p q c) -> b f (h p) (w q) c", p=p, q=p)


def fit_codec(*, videos: int = 2048, seed: int = 2025, spatial: int = 4, channels: int = 12) -> ToyCodec:
    """Principal components of all patches of `videos` videos. The shipped file is `fit_codec().save()`."""
    total, product, count = 0.0, 0.0, 0
    for start in range(0, videos, 256):
        pixels, _ = batch(seed, range(start, min(start + 256, videos)))
        x = rearrange(np.asarray(_to_patches(pixels, spatial), np.float64), "b f h w p -> (b f h w) p")
        total, product, count = total + x.sum(0), product + x.T @ x, count + len(x)
    mean = total / count
    variance, vectors = np.linalg.eigh(product / count - np.outer(mean, mean))
    variance, vectors = variance[::-1][:channels], vectors[:, ::-1][:, :channels]
    # an eigenvector's sign is free: make its largest entry positive, so that every machine fits the same codec
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(channels)])
    encoder, decoder = vectors / np.sqrt(variance), (vectors * np.sqrt(variance)).T
    return ToyCodec(mean.astype(np.float32), encoder.astype(np.float32), decoder.astype(np.float32))
