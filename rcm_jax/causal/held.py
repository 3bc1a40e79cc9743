"""What policies beyond a window have in common: frames in the order they came, and moves of all layers in place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from rcm_jax.causal.cache import Geometry, Turned, Unturned, edit_layers
from rcm_jax.chunks import ChunkIndex
from rcm_jax.errors import ArgumentError
from rcm_jax.wan.layers import KeyValues


@dataclasses.dataclass(frozen=True)
class Held:
    """Keys and values whose first `frames` latent frames are filled, oldest first; `more` is what a policy remembers
    besides."""

    keys: KeyValues
    frames: Int[Array, ""]
    more: Any = None

    def changed(self, **what: Any) -> "Held":
        return dataclasses.replace(self, **what)

    def with_chunk(self, geometry: Geometry, own: KeyValues) -> "Held":
        """With a chunk behind what is filled."""
        P = geometry.frame_tokens
        return self.changed(
            keys=self.keys.with_chunk(own, self.frames * P), frames=self.frames + own.k.shape[-3] // P
        )  # fmt: skip


jax.tree_util.register_dataclass(Held, ("keys", "frames", "more"), ())


@dataclasses.dataclass(frozen=True)
class HeldPolicy:
    """A `CachePolicy` whose cache is a `Held`. Chunks are at their place in the video, or where a policy says."""

    def check(self, geometry: Geometry) -> None:
        """It fits every video."""

    def positions(self, geometry: Geometry, cache: Held, chunk: ChunkIndex, frames: int) -> Int[Array, " T"]:
        del cache
        return geometry.pattern.start(chunk) + jnp.arange(frames)

    def room(self, geometry: Geometry, kept: int) -> int:
        """Frames of a buffer that holds so many, and a chunk behind them."""
        return kept + max(geometry.pattern.first, geometry.pattern.rest)

    def at_least(self, **lowest: int) -> None:
        """Raises ArgumentError unless the fields of these names are at least that."""
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ArgumentError(f"{{{name}}} must be at least {low}", **{name: getattr(self, name)})


class UnturnedPolicy(HeldPolicy):
    """Keys are stored before RoPE: `cached_positions` says where the held frames are while a chunk is made."""

    def cached_positions(self, geometry: Geometry, cache: Held, chunk: ChunkIndex) -> Int[Array, " F"]:
        raise NotImplementedError

    def seen(self, geometry: Geometry, cache: Held, chunk: ChunkIndex, appends: bool) -> Unturned:
        rope = geometry.rope(self.cached_positions(geometry, cache, chunk))
        return Unturned(cache.keys, cache.frames * geometry.frame_tokens, rope)


class TurnedPolicy(HeldPolicy):
    """Keys are stored turned by RoPE, and turned on in time where they move."""

    def seen(self, geometry: Geometry, cache: Held, chunk: ChunkIndex, appends: bool) -> Turned:
        return Turned(cache.keys, cache.frames * geometry.frame_tokens)


def slots(geometry: Geometry, keys: KeyValues) -> int:
    """Frames that the buffers have room for."""
    return keys.k.shape[2] // geometry.frame_tokens


def by_frame(x: Float[Array, "... K N d"], geometry: Geometry) -> Float[Array, "... F P N d"]:
    return rearrange(x, "... (f p) n d -> ... f p n d", p=geometry.frame_tokens)


def keep_frames(
    geometry: Geometry, keys: KeyValues, kept: Bool[Array, " F"], where: Bool[Array, ""]
) -> tuple[KeyValues, Int[Array, " F"]]:
    """The frames that are `kept` moved to the front in their order, and which slot came to which."""
    order = jnp.argsort(~kept, stable=True)

    def move(_: Array, one: KeyValues) -> KeyValues:
        return KeyValues(*(take_frames(geometry, x, order) for x in one))

    return edit_layers(keys, move, where), jnp.where(where, order, jnp.arange(order.size))


def take_frames(geometry: Geometry, x: Float[Array, "B K N d"], order: Int[Array, " F"]) -> Float[Array, "B K2 N d"]:
    """The frames of those numbers, one behind the other."""
    return rearrange(by_frame(x, geometry)[:, order], "b f p n d -> b (f p) n d")


def take_tokens(x: Float[Array, "B K N d"], which: Int[Array, "B K2"]) -> Float[Array, "B K2 N d"]:
    """The tokens of those numbers, other ones for every sample."""
    return jnp.take_along_axis(x, which[:, :, None, None], axis=1)
