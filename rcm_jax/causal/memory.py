"""MemRoPE: what leaves the latest frames lives on in two means of all that was, a slow and a fast one."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import repeat
from jaxtyping import Array, Bool, Float, Int

from rcm_jax.causal.cache import Geometry, edit_layers
from rcm_jax.causal.held import Held, UnturnedPolicy, slots
from rcm_jax.chunks import ChunkIndex
from rcm_jax.errors import ArgumentError
from rcm_jax.wan.layers import KeyValues


class Means(NamedTuple):
    """Of keys and values before RoPE, of every layer. begun: whether anything is in them."""

    long: KeyValues
    short: KeyValues
    begun: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class MemRope(UnturnedPolicy):
    """The first `sink_frames`, the latest `local_frames`, and between them two frames all of whose tokens are one
    vector a head: means, in time, of what was between, that follow it at `alpha_long` and `alpha_short`.

    Positions are counted through what is kept, so they never grow. As in the published code, what is averaged contains
    the last means.
    """

    sink_frames: int = 3
    local_frames: int = 4
    alpha_long: float = 0.01
    alpha_short: float = 0.1

    def __post_init__(self) -> None:
        self.at_least(sink_frames=0, local_frames=1)
        for name in ("alpha_long", "alpha_short"):
            if not 0 < getattr(self, name) <= 1:
                raise ArgumentError(f"{{{name}}} must be above 0 and at most 1", **{name: getattr(self, name)})

    @property
    def frames(self) -> int:
        return self.sink_frames + 2 + self.local_frames

    def open(self, geometry: Geometry, batch: int) -> Held:
        room, one = self.room(geometry, self.frames), (geometry.layers, batch, geometry.heads, geometry.width)
        nothing = KeyValues(jnp.zeros(one, geometry.dtype), jnp.zeros(one, geometry.dtype))
        return Held(geometry.empty(batch, room), jnp.int32(0), Means(nothing, nothing, jnp.array(False)))

    def positions(self, geometry: Geometry, cache: Held, chunk: ChunkIndex, frames: int) -> Int[Array, " T"]:
        return cache.frames + jnp.arange(frames)

    def cached_positions(self, geometry: Geometry, cache: Held, chunk: ChunkIndex) -> Int[Array, " F"]:
        return jnp.arange(slots(geometry, cache.keys))

    def append(self, geometry: Geometry, cache: Held, kept: KeyValues, chunk: ChunkIndex) -> Held:
        cache = cache.with_chunk(geometry, kept)
        compacts = cache.frames > self.frames
        means = self._means(geometry, cache, compacts)
        P, A, L = geometry.frame_tokens, self.sink_frames, self.local_frames

        def compact(i: Array, one: KeyValues) -> KeyValues:
            def new(x: Array, long: Array, short: Array) -> Array:
                latest = jax.lax.dynamic_slice_in_dim(x, (cache.frames - L) * P, L * P, axis=1)
                between = (repeat(y[i].astype(x.dtype), "b n d -> b p n d", p=P) for y in (long, short))
                return jnp.concatenate([x[:, : A * P], *between, latest], axis=1)

            return KeyValues(*map(new, one, means.long, means.short))

        keys = edit_layers(cache.keys, compact, compacts)
        return Held(keys, jnp.where(compacts, self.frames, cache.frames), means)

    def _means(self, geometry: Geometry, cache: Held, compacts: Bool[Array, ""]) -> Means:
        """The means with what is between the sink and the latest frames in them, if the cache `compacts`."""
        P, old = geometry.frame_tokens, cache.more
        token = jnp.arange(cache.keys.k.shape[2])
        last = (cache.frames - self.local_frames) * P
        weight = ((token >= self.sink_frames * P) & (token < last)).astype(jnp.float32)
        weight = weight / jnp.maximum(weight.sum(), 1)

        def mean(x: Float[Array, "B K N d"]) -> Float[Array, "B N d"]:
            return jnp.einsum("bknd,k->bnd", x.astype(jnp.float32), weight)

        # a layer at a time: all of them in float32 would be twice the cache
        event = jax.lax.map(lambda one: KeyValues(*map(mean, one)), cache.keys)

        def follow(mean: KeyValues, alpha: float) -> KeyValues:
            def one(m: Array, e: Array) -> Array:
                later = (1 - alpha) * m.astype(jnp.float32) + alpha * e
                return jnp.where(compacts, jnp.where(old.begun, later, e).astype(m.dtype), m)

            return KeyValues(*map(one, mean, event))

        return Means(follow(old.long, self.alpha_long), follow(old.short, self.alpha_short), old.begun | compacts)
