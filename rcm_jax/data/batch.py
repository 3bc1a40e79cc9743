"""What a training step is given."""

import dataclasses

import jax
from jaxtyping import Array, Float

from rcm_jax.types import Latents, Text


@dataclasses.dataclass(frozen=True)
class Batch:
    """Clean videos and what they are conditioned on; a pytree, so that it shards and cuts as one.

    condition: of image-to-video networks, the channels behind the noise (mask and latents of the image).
    image: CLIP's tokens of the image, for the networks that take them.
    """

    latents: Latents
    text: Text
    condition: Float[Array, "B T H W Y"] | None = None
    image: Float[Array, "B K I"] | None = None


jax.tree_util.register_dataclass(Batch, ("latents", "text", "condition", "image"), ())
