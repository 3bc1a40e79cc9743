"""An image as an image-to-video network sees it: resizing, and the channels that stand behind the noise."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rcm_jax.types import Latents

CUBIC = -0.75  # the slope of PyTorch's bicubic kernel; jax.image's is -0.5


def _weights(length: int, size: int) -> Float[np.ndarray, "size length"]:
    """Every output pixel's four taps along one axis; pixels beyond the border repeat it."""
    place = (np.arange(size) + 0.5) * length / size - 0.5
    out = np.zeros((size, length))
    for tap in range(-1, 3):
        index = np.floor(place).astype(int) + tap
        d = np.abs(place - index)
        near = (CUBIC + 2) * d**3 - (CUBIC + 3) * d**2 + 1
        far = CUBIC * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(out, (np.arange(size), index.clip(0, length - 1)), np.where(d <= 1, near, far))
    return out


def resize_bicubic(image: Float[Array, "... H W C"], size: tuple[int, int]) -> Float[Array, "... h w C"]:
    """Bicubic, half-pixel centres, no antialiasing: PyTorch's interpolate(mode="bicubic"). May overshoot."""
    rows, columns = (jnp.asarray(_weights(n, m), jnp.float32) for n, m in zip(image.shape[-3:-1], size, strict=True))
    return jnp.einsum("...ijc,hi,wj->...hwc", image, rows, columns, precision="highest")


def image_condition(
    encode: Callable[[Float[Array, "B F H W 3"]], Latents], image: Float[Array, "B H W 3"], frames: int
) -> Float[Array, "B T h w C+4"]:
    """The condition of an image-to-video network: mask and latents of a video that starts with `image`, in [-1, 1].

    The other frames are grey (0). The mask says of each latent frame's four pixel frames which are given: all of the
    first, which stands for one. `encode` is the autoencoder's.
    """
    B, H, W, C = image.shape
    latents = encode(jnp.concatenate([image[:, None], jnp.zeros((B, frames - 1, H, W, C), image.dtype)], axis=1))
    mask = jnp.zeros((*latents.shape[:-1], 4), latents.dtype).at[:, 0].set(1)
    return jnp.concatenate([mask, latents], axis=-1)
