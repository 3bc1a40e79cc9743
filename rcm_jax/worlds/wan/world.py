"""The world of the published networks: umT5 reads prompts, the video autoencoder and CLIP see and paint.

Each network is loaded when it is needed and freed when its work is done, so that one at a time is in memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree
from PIL import Image
from tqdm import tqdm

from rcm_jax.convert.load import load_params
from rcm_jax.errors import ArgumentError
from rcm_jax.kernels.target import target
from rcm_jax.media.images import first_frame, pixels
from rcm_jax.media.sizes import adapted_size, latent_shape, parse_size, table_size
from rcm_jax.parallel import make_mesh
from rcm_jax.sampling.stream import Decode
from rcm_jax.types import Latents, Params, Video
from rcm_jax.wan.clip import CLIP, preprocess
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.image import image_condition
from rcm_jax.wan.in_chunks import encode_compiled
from rcm_jax.wan.tiny_vae import TinyVAE
from rcm_jax.wan.vae import VAE
from rcm_jax.worlds.painted import Painted, paint, paint_on_host
from rcm_jax.worlds.wan.files import WanFiles
from rcm_jax.worlds.wan.text import encode_prompts
from rcm_jax.worlds.world import Encode, Pixels, Size

REMEMBERED = 64  # prompts: 4 MB each at Wan's size


class Usual(NamedTuple):
    """What a video has as published: frames a second, how many frames, its resolution."""

    fps: int
    frames: int
    resolution: str


WAN21, WAN22 = Usual(16, 77, "480p"), Usual(24, 121, "720p")  # of the latents of either autoencoder


def decoder_dtype() -> str:
    """What decoders compute in unless they are told, by the device that is compiled for: bfloat16 on GPUs, float32 on
    CPUs, where bfloat16 takes as long (docs/causal.md)."""
    return "bfloat16" if target().is_gpu else "float32"


def _as_it_is(video: Video) -> Video:
    return video


@functools.partial(jax.jit, static_argnames=("painter", "finish"), donate_argnames="state")
def decode_step(
    painter: VAE | TinyVAE, params: Params, latents: Latents, state: PyTree | None, finish: Callable[[Video], PyTree]
) -> tuple[PyTree, PyTree]:  # fmt: skip
    """What `finish` makes of the next latent frames' frames, and the state after them."""
    frames, state = painter.decode_chunk(params, latents, state)
    return finish(frames), state


@functools.partial(jax.jit, static_argnames="network")
def _see(network: CLIP, params: Params, image: Float[Array, "B H W 3"]) -> Float[Array, "B K D"]:
    return network.apply({"params": params}, image)


class WanWorld:
    """A `World` from opened files. The text encoder and CLIP compute in `dtype`, the autoencoder and the tiny one in
    `vae_dtype`; without it encoders in float32, decoders in `decoder_dtype()`.

    All of them run on one device. The last prompts that were encoded are remembered, and the last image. `tiled`
    decodes large frames in tiles: less memory, and not quite the same numbers. Frames come from the tiny autoencoder if
    the files have it; images are encoded by the full one all the same.
    """

    name, scale, gap, small = "wan", 1, 0, False
    prompt = (
        "A red fox trots through fresh snow at dawn; the camera follows it from the side, low sun behind the trees."
    )

    def __init__(
        self, files: WanFiles, *, dtype: str = "bfloat16", vae_dtype: str | None = None, tiled: bool = False
    ) -> None:
        self.files, self.dtype, self.vae_dtype, self.tiled = files, dtype, vae_dtype, tiled
        self.vae = VAE(dataclasses.replace(files.vae.config, dtype=vae_dtype or "float32"))  # encodes
        self.fps, self.usual_frames, self.usual_resolution = WAN22 if files.vae.config.residual else WAN21
        self.device = make_mesh(devices=jax.local_devices()[:1])  # of every host its own
        self._features: dict[str, Float[np.ndarray, "L D"]] = {}
        self._vae_params: dict[str, Params] = {}  # the halves that are needed, each in its dtype
        self._tiny_params: Params | None = None
        self._seen: tuple[tuple, tuple] | None = None
        self._clip_params: Params | None = None

    # --- sizes --------------------------------------------------------------------------------------------------------

    def size(
        self, resolution: str | None, aspect_ratio: str | None, size: str | None, image: Image.Image | None
    ) -> Size:
        step = self.files.vae.config.space * self.files.dit[0].config.patch_size[1]
        if size is None:
            sides = table_size(resolution or self.usual_resolution, aspect_ratio or "16:9")
            width, height = (side // step * step for side in sides)
        elif resolution or aspect_ratio:
            raise ArgumentError(
                "give {size}, or {resolution} and {aspect_ratio}", size=None, resolution=None, aspect_ratio=None
            )
        else:
            width, height = parse_size(size)
        return (width, height) if image is None else adapted_size(image.size, width * height, step)

    def latent_shape(self, size: Size, num_frames: int, model: DiTConfig) -> tuple[int, int, int]:
        vae = self.files.vae.config
        return latent_shape(size, num_frames, space=vae.space, time=vae.time, patch=model.patch_size[1])

    def num_frames(self, latent_frames: int) -> int:
        return self.files.vae.config.time * (latent_frames - 1) + 1

    # --- what the network reads ---------------------------------------------------------------------------------------

    def encode_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "B L D"]:
        """Features of 512 tokens, zeros after the prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        if new:
            features = encode_prompts(self.files.text, *self.files.tokenizer(new), dtype=self.dtype)
            self._features |= dict(zip(new, features, strict=True))
        out = np.stack([self._features[prompt] for prompt in prompts])
        for prompt in list(self._features)[:-REMEMBERED]:
            del self._features[prompt]
        return out

    def encode(self, video: Pixels) -> Float[np.ndarray, "T H W C"]:
        """Latents of a video in [-1, 1]. The autoencoder is kept until `release`, here and in what follows."""
        parts = self.vae.stream_latents(self._autoencoder(), jnp.asarray(video)[None])
        return np.concatenate([np.asarray(part)[0] for part in parts])

    def first_latent(self, image: Image.Image, size: Size) -> Float[np.ndarray, "1 1 H W C"]:
        frame = first_frame(image, size, cut=self.vae.config.residual)
        return np.asarray(self.vae.encode(self._autoencoder(), jnp.asarray(frame)[None, None]))

    def condition(
        self, image: Image.Image, size: Size, num_frames: int
    ) -> tuple[Float[np.ndarray, "1 T H W C"], Float[np.ndarray, "1 K D"] | None]:
        """The image of another size is CLIP's; the condition's is resized to the video's."""
        asked = (image.size, image.mode, image.tobytes(), size, num_frames)
        if self._seen is None or self._seen[0] != asked:
            self._seen = asked, self._condition(image, size, num_frames)
        return self._seen[1]

    def _condition(
        self, image: Image.Image, size: Size, num_frames: int
    ) -> tuple[Float[np.ndarray, "1 T H W C"], Float[np.ndarray, "1 K D"] | None]:
        condition = self.image_channels(pixels(image, size), num_frames)
        self.release()
        tokens = self.image_tokens(pixels(image))
        self.release()
        return condition, tokens

    def image_channels(self, image: Float[np.ndarray, "H W 3"], num_frames: int) -> Float[np.ndarray, "1 T H W C"]:
        """The condition of a video of the image's size."""
        params, vae = self._autoencoder(), self.vae

        def encode(video: Array) -> Latents:
            parts = vae.stream_latents(params, video)
            return jnp.concatenate(list(self._bar(parts, "image", self._latent_frames(num_frames))), axis=1)

        return np.asarray(image_condition(encode, jnp.asarray(image)[None], num_frames))

    def image_tokens(self, image: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "1 K D"] | None:
        """CLIP's, of an image of any size; None where there is no CLIP."""
        if self.files.clip is None:
            return None
        if self._clip_params is None:
            self._clip_params = load_params(self.files.clip, self.device, dtype=self.dtype)
        config = dataclasses.replace(self.files.clip.config, dtype=self.dtype)
        return np.asarray(
            _see(CLIP(config), self._clip_params, preprocess(jnp.asarray(image)[None], config.image_size))
        )

    # --- what it makes ------------------------------------------------------------------------------------------------

    @property
    def painter(self) -> VAE | TinyVAE:
        """What makes the frames, in its dtype on the device that is compiled for."""
        kind, source = (VAE, self.files.vae) if self.files.tiny is None else (TinyVAE, self.files.tiny)
        return kind(dataclasses.replace(source.config, dtype=self.vae_dtype or decoder_dtype()))

    def decode(self, latents: Latents) -> Iterator[Iterator[Pixels]]:
        if not self.tiled:
            return (self._parts(one, _as_it_is) for one in latents)
        return (iter(video) for video in self._tiled(latents))

    def paint(self, latents: Latents) -> Iterator[Iterator[Painted]]:
        if not self.tiled:
            return (self._parts(one, paint) for one in latents)
        return (iter([paint_on_host(video[0])]) for video in self._tiled(latents))

    def _parts(self, latents: Float[np.ndarray, "T H W C"], finish: Callable[[Video], PyTree]) -> Iterator[PyTree]:
        """What `finish` makes of one video's frames, a latent frame after the other."""
        params, state, painter = self._paints(), None, self.painter
        for i in self._bar(range(len(latents)), "decode", len(latents)):
            made, state = decode_step(painter, params, jnp.asarray(latents[None, i : i + 1]), state, finish)
            yield jax.tree.map(lambda x: x[0], jax.device_get(made))

    def _tiled(self, latents: Latents) -> Iterator[Float[np.ndarray, "1 F H W 3"]]:
        params, vae = self._paints(), self.painter
        return (vae.decode_tiled(params, one[None]) for one in latents)

    def decoder(self) -> Decode:
        """On one device, whatever devices the network has."""
        here = NamedSharding(self.device, P())
        with jax.set_mesh(self.device):
            params, painter = self._paints(), self.painter

        def decode(latents: Latents, state: PyTree | None) -> tuple[Painted, PyTree]:
            with jax.set_mesh(self.device):
                return decode_step(painter, params, jax.device_put(latents, here), state, paint)

        return decode

    def encoder(self) -> Encode:
        """By the full autoencoder, whatever decodes; on one device, which keeps its state: 1 + 4k frames, then 4k each.

        Latents are normalised, as the network was trained with them and as the decoder takes them. StreamDiffusionV2's
        code hands the network the encoder's means as they are, and its decoder normalised latents all the same.
        """
        params, here = self._autoencoder(), NamedSharding(self.device, P())

        def encode(video: Video, state: PyTree | None) -> tuple[Latents, PyTree]:
            with jax.set_mesh(self.device):
                return encode_compiled(self.vae, params, jax.device_put(video, here), state)

        return encode

    def release(self) -> None:
        self._vae_params, self._tiny_params, self._clip_params = {}, None, None

    def _paints(self) -> Params:
        """Parameters of what makes the frames."""
        dtype = self.painter.config.dtype
        if self.files.tiny is None:
            return self._half("decoder", dtype)
        if self._tiny_params is None:
            self._tiny_params = load_params(self.files.tiny, self.device, dtype=dtype, part="decoder")
        return self._tiny_params

    def _autoencoder(self) -> Params:
        """Parameters of what encodes."""
        return self._half("encoder", self.vae.config.dtype)

    def _half(self, name: str, dtype: str) -> Params:
        if name not in self._vae_params:
            self._vae_params |= load_params(self.files.vae, self.device, dtype=dtype, part=name)
        return {name: self._vae_params[name]}

    def _latent_frames(self, num_frames: int) -> int:
        return 1 + (num_frames - 1) // self.files.vae.config.time

    @staticmethod
    def _bar(parts: Iterable, what: str, count: int) -> Iterator:
        return tqdm(parts, what, count, unit="latent frame", delay=2, leave=False)
