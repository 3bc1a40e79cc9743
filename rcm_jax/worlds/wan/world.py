"""The world of the published networks: umT5 reads prompts, the video autoencoder and CLIP see and paint.

Each network is loaded when it is needed and freed when its work is done, so that one at a time is in memory.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from rcm_jax.media.pictures import to_uint8
from rcm_jax.parallel import make_mesh
from rcm_jax.types import Latents, Params
from rcm_jax.wan.clip import CLIP, preprocess
from rcm_jax.wan.image import image_condition
from rcm_jax.wan.vae import VAE
from rcm_jax.worlds.wan.files import WanFiles, load
from rcm_jax.worlds.wan.text import encode_prompts


@functools.partial(jax.jit, static_argnames="network")
def _see(network: CLIP, params: Params, image: Float[Array, "B H W 3"]) -> Float[Array, "B K D"]:
    return network.apply({"params": params}, image)


class WanWorld:
    """A `World` from opened files. The text encoder and CLIP compute in `dtype`, the autoencoder in float32.

    All of them run on one device. Prompts that were encoded once are remembered. `tiled` decodes large frames in tiles:
    less memory, and not quite the same numbers.
    """

    fps = 16

    def __init__(self, files: WanFiles, *, negative_prompt: str = "", dtype: str = "bfloat16", tiled: bool = False):
        self.files, self.dtype, self.tiled = files, dtype, tiled
        self.device = make_mesh(devices=jax.devices()[:1])
        self.negative_prompt = negative_prompt
        self._features: dict[str, Float[np.ndarray, "L D"]] = {}
        self._vae: Params | None = None

    @property
    def null_text(self) -> Float[np.ndarray, "L D"]:
        """What guidance leads away from: the features of the negative prompt."""
        return self.encode_text([self.negative_prompt])[0]

    def encode_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "B L D"]:
        """Features of 512 tokens, zeros after the prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        if new:
            features = encode_prompts(self.files.text, *self.files.tokenizer(new), dtype=self.dtype)
            self._features |= dict(zip(new, features, strict=True))
        return np.stack([self._features[prompt] for prompt in prompts])

    def encode_image(
        self, image: Float[np.ndarray, "h w 3"], frame: Float[np.ndarray, "H W 3"], frames: int
    ) -> tuple[Float[np.ndarray, "1 T H W C"], Float[np.ndarray, "1 K D"] | None]:
        """The condition [1, T, H/8, W/8, C+4] of a video of `frames` frames that starts with `frame`, and the CLIP
        tokens [1, 257, D] of the `image` in its own size, None for a network that takes none. Both in [-1, 1]."""
        vae = VAE(self.files.vae.config)
        params = self._autoencoder()

        def encode(video: Array) -> Latents:
            steps = tqdm(
                vae.stream_latents(params, video), "image", 1 + (frames - 1) // vae.config.time, delay=2, leave=False
            )
            return jnp.concatenate(list(steps), axis=1)

        condition = np.asarray(image_condition(encode, jnp.asarray(frame)[None], frames))
        self.release()
        if self.files.clip is None:
            return condition, None
        config = dataclasses.replace(self.files.clip.config, dtype=self.dtype)
        params = load(self.files.clip, self.device, dtype=self.dtype)
        tokens = _see(CLIP(config), params, preprocess(jnp.asarray(image)[None], config.image_size))
        return condition, np.asarray(tokens)

    def decode(self, latents: Latents) -> Float[np.ndarray, "B F H W 3"]:
        """Video, one sample at a time; values may leave [-1, 1]."""
        vae, params = VAE(self.files.vae.config), self._autoencoder()
        if self.tiled:
            return np.concatenate([vae.decode_tiled(params, one[None]) for one in tqdm(latents, "tiled", delay=2)])
        return np.concatenate([np.concatenate(list(self._frames(vae, params, one)), axis=1) for one in latents])

    def decode_uint8(self, latents: Float[Array, "T H W C"]) -> UInt8[np.ndarray, "F H W 3"]:
        """One video as it is written to files; holds no more than that in memory."""
        if self.tiled:
            return to_uint8(self.decode(latents[None])[0])
        frames = self._frames(VAE(self.files.vae.config), self._autoencoder(), latents)
        return np.concatenate([to_uint8(part[0]) for part in frames])

    def _frames(self, vae: VAE, params: Params, latents: Float[Array, "T H W C"]):
        parts = vae.stream(params, jnp.asarray(latents)[None])
        return map(np.asarray, tqdm(parts, "decode", len(latents), unit="latent frame", delay=2, leave=False))

    def _autoencoder(self) -> Params:
        if self._vae is None:
            self._vae = load(self.files.vae, self.device, dtype="float32")
        return self._vae

    def release(self) -> None:
        """Frees the autoencoder."""
        self._vae = None
