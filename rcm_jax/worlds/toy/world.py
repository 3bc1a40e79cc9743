"""The built-in world around a network: word vectors in front, the linear codec behind."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from rcm_jax.media.images import pixels
from rcm_jax.sampling.stream import Decode
from rcm_jax.types import Latents
from rcm_jax.wan.config import DiTConfig
from rcm_jax.worlds.painted import Painted, paint
from rcm_jax.worlds.toy.codec import ToyCodec
from rcm_jax.worlds.toy.text import encode_text
from rcm_jax.worlds.toy.videos import SIZE
from rcm_jax.worlds.world import Encode, Pixels, Size


class ToyWorld:
    """A `World` without files; its latent frames are its frames, and its codec needs no state."""

    name, prompt, fps, scale, gap, small = "toy", "a red circle moving left", 8, 8, 1, True
    usual_frames = None

    def __init__(self) -> None:
        self.codec = ToyCodec.load()
        self._decode, self._encode = jax.jit(self.codec.decode), jax.jit(self.codec.encode)
        self._paint = jax.jit(lambda latents: paint(self.codec.decode(latents)))

    def size(self, *_: object) -> Size:
        return SIZE, SIZE

    def latent_shape(self, size: Size, num_frames: int, model: DiTConfig) -> tuple[int, int, int]:
        return num_frames, size[1] // self.codec.spatial, size[0] // self.codec.spatial

    def num_frames(self, latent_frames: int) -> int:
        return latent_frames

    def encode_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "B L D"]:
        return encode_text(prompts)

    def first_latent(self, image: Image.Image, size: Size) -> Float[np.ndarray, "1 1 H W C"]:
        return np.asarray(self.codec.encode(pixels(image, size)[None, None]))

    def condition(self, image: Image.Image, size: Size, num_frames: int) -> tuple[np.ndarray, None]:
        raise ValueError("the built-in world has no autoencoder that makes an image-to-video network's condition")

    def decode(self, latents: Latents) -> Iterator[Iterator[Pixels]]:
        return (iter([video]) for video in np.asarray(self._decode(latents)))

    def paint(self, latents: Latents) -> Iterator[Iterator[Painted]]:
        painted = jax.device_get(self._paint(latents))
        return (iter([painted.video(i)]) for i in range(len(latents)))

    def decoder(self) -> Decode:
        return lambda latents, state: (self._paint(latents), state)

    def encoder(self) -> Encode:
        return lambda video, state: (self._encode(video), state)

    def release(self) -> None:
        """Nothing is kept."""
