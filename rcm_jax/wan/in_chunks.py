"""What autoencoders that stream have in common: whole videos as loops of the host over their chunks."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rcm_jax.types import Latents, Params, Video

State = PyTree  # {"past": frames} of every layer that keeps some; None before the first chunk


class InChunks:
    """For frozen dataclasses that have `encode_chunk` and `decode_chunk` of (params, frames, state), and give latents
    one frame at a time with `stream_latents`. A chunk is one compiled program, which is given the state away."""

    def encode(self, params: Params, video: Video) -> Latents:
        """The latents of a whole video, float32. Not for inside jit: see `encode_chunk`."""
        return jnp.concatenate(list(self.stream_latents(params, video)), axis=1)

    def decode(self, params: Params, latents: Latents) -> Video:
        """The whole video, float32. Not for inside jit: see `decode_chunk`."""
        return jnp.concatenate(list(self.stream(params, latents)), axis=1)

    def stream(self, params: Params, latents: Latents) -> Iterator[Video]:
        """`decode`, frames as they come: 1, then 4 for each latent frame."""
        state = None
        for i in range(max(1, latents.shape[1])):
            frames, state = decode_compiled(self, params, latents[:, i : i + 1], state)
            yield frames


def _encode(coder: InChunks, params: Params, video: Video, state: State | None) -> tuple[Latents, State]:
    return coder.encode_chunk(params, video, state)


def _decode(coder: InChunks, params: Params, latents: Latents, state: State | None) -> tuple[Video, State]:
    return coder.decode_chunk(params, latents, state)


encode_compiled = jax.jit(_encode, static_argnums=0, donate_argnums=3)
decode_compiled = jax.jit(_decode, static_argnums=0, donate_argnums=3)
