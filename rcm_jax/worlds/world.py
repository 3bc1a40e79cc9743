"""A world turns prompts into text features and latents into video: what surrounds the network when sampling."""

from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Float

from rcm_jax.types import Latents
from rcm_jax.worlds import toy


class World(Protocol):
    fps: int
    null_text: Float[np.ndarray, "L D"]

    def encode_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "B L D"]: ...

    def decode(self, latents: Latents) -> Float[np.ndarray, "B F H W 3"]:
        """Video in [-1, 1]."""
        ...


class ToyWorld:
    """The built-in world's codec and word vectors."""

    fps = 8

    def __init__(self):
        self._decode = jax.jit(toy.ToyCodec.load().decode)
        self.null_text = toy.encode_text([""])[0]

    def encode_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "B L D"]:
        return toy.encode_text(prompts)

    def decode(self, latents: Latents) -> Float[np.ndarray, "B F H W 3"]:
        return np.asarray(self._decode(latents))


def open_world(name: str) -> World:
    if name != "toy":
        raise ValueError(f"world {name!r} is unknown; this version has 'toy'")
    return ToyWorld()
