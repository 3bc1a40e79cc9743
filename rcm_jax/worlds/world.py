"""A world surrounds a network: it turns prompts and images into what the network reads, and latents into video."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, PyTree
from PIL import Image

from rcm_jax.sampling.stream import Decode
from rcm_jax.types import Latents, Video
from rcm_jax.wan.config import DiTConfig
from rcm_jax.worlds.painted import Painted

Size = tuple[int, int]  # width, height in pixels
Pixels = Float[np.ndarray, "F H W 3"]
Encode = Callable[[Video, PyTree | None], tuple[Latents, PyTree]]  # (a chunk, state; None at first) -> latents, state


class World(Protocol):
    """name: as model files have it. prompt: what is shown where nothing is asked for. fps: frames a second.

    scale: how many times its frames are enlarged for the eye. gap: pixels between videos side by side.
    small: its networks are sampled in one compiled program; else step by step from the host. usual_frames: of a
    bidirectional network's video where no number is asked for; None where they are the network's own.
    """

    name: str
    prompt: str
    fps: int
    scale: int
    gap: int
    small: bool
    usual_frames: int | None

    def size(
        self, resolution: str | None, aspect_ratio: str | None, size: str | None, image: Image.Image | None
    ) -> Size:
        """Of the video that is asked for; with an `image`, in its proportions. Raises ArgumentError for a size that the
        world does not have."""
        ...

    def latent_shape(self, size: Size, num_frames: int, model: DiTConfig) -> tuple[int, int, int]:
        """(T, H, W). Raises ArgumentError for a size or a number of frames that has no latents."""
        ...

    def num_frames(self, latent_frames: int) -> int:
        """Frames of a video of so many latent frames."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "B L D"]:
        """Features; "" is the unconditional text. Raises ValueError for a prompt that the world cannot read."""
        ...

    def first_latent(self, image: Image.Image, size: Size) -> Float[np.ndarray, "1 1 H W C"]:
        """Of a video that begins with an image: a causal network's, or one under `DiTConfig.image_first`."""
        ...

    def condition(
        self, image: Image.Image, size: Size, num_frames: int
    ) -> tuple[Float[np.ndarray, "1 T H W C"], Float[np.ndarray, "1 K D"] | None]:
        """Of an image-to-video network: the channels behind the noise, and CLIP's tokens where the network has them."""
        ...

    def decode(self, latents: Latents) -> Iterator[Iterator[Pixels]]:
        """Videos one after the other, each in parts along its frames; values may leave [-1, 1]."""
        ...

    def paint(self, latents: Latents) -> Iterator[Iterator[Painted]]:
        """`decode` in the frames of files: [F, H, W, 3] a part, on the host, to be `checked`."""
        ...

    def decoder(self) -> Decode:
        """`Painted` frames [B, f, H, W, 3] of one chunk of latents after the other, for streams."""
        ...

    def encoder(self) -> Encode:
        """Latents of one chunk of frames in [-1, 1] after the other, as the network takes them: for streams of input.
        A first chunk of `num_frames(T)` frames gives T latent frames."""
        ...

    def release(self) -> None:
        """Frees what decoding and encoding keep on the device."""
        ...
