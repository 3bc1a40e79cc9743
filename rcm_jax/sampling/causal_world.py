"""What surrounds a causal network when it streams: a world's text features, latents of an image, and its decoder."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, PyTree

from rcm_jax.media.images import open_image, pixels
from rcm_jax.media.sizes import adapted_size
from rcm_jax.parallel import make_mesh
from rcm_jax.sampling.stream import Decode
from rcm_jax.types import Latents, Video
from rcm_jax.wan.vae import VAE
from rcm_jax.worlds import toy
from rcm_jax.worlds.wan.files import WanFiles, load
from rcm_jax.worlds.wan.world import WanWorld
from rcm_jax.worlds.world import ToyWorld


class Surroundings(NamedTuple):
    """`image`, latents of the first frame or None. `scale`: how much larger the frames are shown."""

    text: Float[np.ndarray, "B L D"]
    null_text: Float[np.ndarray, "L D"]
    image: Float[np.ndarray, "B 1 H W C"] | None
    decode: Decode
    fps: int
    scale: int = 1


def toy_surroundings(
    prompt: str, negative_prompt: str, *, num_samples: int, image_path: Path | None = None
) -> Surroundings:
    """Of the built-in world, whose codec keeps no state. Raises ValueError for unknown words and unreadable images."""
    codec, image = toy.ToyCodec.load(), None
    text, null_text = toy.encode_text([prompt] * num_samples), toy.encode_text([negative_prompt])[0]
    if image_path is not None:
        frame = pixels(open_image(image_path), (toy.SIZE, toy.SIZE))
        image = np.repeat(codec.encode(frame[None, None]), num_samples, axis=0)
    decode = jax.jit(lambda latents, state: (codec.decode(latents), state))
    return Surroundings(text, null_text, image, decode, ToyWorld.fps, scale=8)


def wan_size(size: tuple[int, int], image_path: Path | None, *, adaptive: bool, step: int) -> tuple[int, int]:
    """(width, height), with the proportions of the image where `adaptive`, in multiples of `step`."""
    if not adaptive:
        return size
    if image_path is None:
        raise ValueError("--adaptive_resolution takes its proportions from an image: give --image_path")
    return adapted_size(open_image(image_path).size, size[0] * size[1], step)


def wan_surroundings(
    files: WanFiles,
    prompt: str,
    negative_prompt: str,
    *,
    num_samples: int,
    size: tuple[int, int],
    dtype: str,
    vae_dtype: str,
    guided: bool,
    image_path: Path | None = None,
) -> Surroundings:
    """Of Wan's networks: the text encoder is read and freed again, the autoencoder stays, for it decodes on the way."""
    world = WanWorld(files, dtype=dtype)
    text, *null = world.encode_text([prompt, *([negative_prompt] if guided else [])])
    vae, image = VAE(dataclasses.replace(files.vae.config, dtype=vae_dtype)), None
    first = make_mesh(devices=jax.devices()[:1])  # decodes, whatever devices the network has
    params = load(files.vae, first, dtype=vae_dtype)
    if image_path is not None:
        frame = pixels(open_image(image_path), size)
        image = np.repeat(vae.encode(params, jnp.asarray(frame)[None, None]), num_samples, axis=0)
    decode_chunk = jax.jit(vae.decode_chunk, donate_argnums=2)

    def decode(latents: Latents, state: PyTree | None) -> tuple[Video, PyTree]:
        with jax.set_mesh(first):
            return decode_chunk(params, jax.device_put(latents, NamedSharding(first, P())), state)

    return Surroundings(
        np.repeat(text[None], num_samples, axis=0), null[0] if guided else np.zeros_like(text), image, decode,
        WanWorld.fps,
    )  # fmt: skip
