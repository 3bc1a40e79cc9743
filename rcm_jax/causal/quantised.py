"""The past in few bytes: a `Ring` whose chunks are kept as `rcm_jax.quant` stores them.

A chunk is stored once, whole, in the pass that appends it, and what that pass and all later ones see of it is what comes
back. One layer at a time is restored, inside the layer: the past never lies in memory as numbers that attention reads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from rcm_jax.causal.cache import CachePolicy, Geometry, Ring
from rcm_jax.chunks import ChunkIndex
from rcm_jax.errors import ArgumentError
from rcm_jax.kernels.attention import Past
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.parallel import SEQUENCE_AXIS, cache_spec, ours
from rcm_jax.quant import CacheQuant, QuantConfig, Stored, restore, store
from rcm_jax.quant.stored import Warm
from rcm_jax.wan.layers import KeyValues
from rcm_jax.wan.rope import apply_rope

HEADS = "heads"  # the mapped axis over which a chunk's heads are stored apart
Heads = Float[Array, "B S N D"]


class Blobs(NamedTuple):
    """Keys and values of chunks of one size. Their arrays begin with [layers, slots, parts of the batch, parts of the
    heads]: a mesh cuts a video's heads and a batch's videos, so each part is stored by itself, and lies on one device."""

    k: Stored
    v: Stored


Warms = tuple[Warm, Warm]  # where the clusters of the next chunk's keys, and of its values, start


class Kept(NamedTuple):
    """What is kept of a chunk."""

    blobs: Blobs
    warm: Warms


class Slots(NamedTuple):
    """The cache. first: the first chunk, where it has a size of its own; None where it is not kept, or is like others.
    rest: the others, in the ring's order."""

    first: Blobs | None
    rest: Blobs | None
    warm: Warms


# --- parts ----------------------------------------------------------------------------------------------------------


def _cut(tree: PyTree, before: int = 0) -> PyTree:
    """Parts where `cut_by_heads` has what they are parts of; `before`: axes in front of them."""
    if (mesh := ours()) is None:
        return tree

    def place(x: Array) -> Array:
        batch, heads = x.shape[before : before + 2]
        samples, _, heads, _ = (*cache_spec(mesh, (batch, 1, heads, 1)), None)
        return jax.lax.with_sharding_constraint(x, P(*(None,) * before, samples, heads))

    return jax.tree.map(place, tree)


def _in_parts(x: Heads) -> Float[Array, "i j b S n D"]:
    """As many as the mesh cuts batch and heads into."""
    i = j = 1
    if (mesh := ours()) is not None:
        samples, _, heads, _ = (*cache_spec(mesh, x.shape), None)
        i = math.prod(mesh.shape[name] for name in samples or ())
        j = 1 if heads is None else mesh.shape[SEQUENCE_AXIS]
    return _cut(rearrange(x, "(i b) s (j n) d -> i j b s n d", i=i, j=j))


def _put(x: Heads, config: QuantConfig, warm: Warm) -> tuple[Stored, Warm]:
    def part(x: Heads, warm: Warm) -> tuple[Stored, Warm]:
        return store(x, config, warm, HEADS)

    return _cut(jax.vmap(jax.vmap(part, axis_name=HEADS))(_in_parts(x), warm))


def _got(stored: Stored, dtype: jnp.dtype) -> Heads:
    """All slots of a layer, one behind the other."""
    x = jax.vmap(jax.vmap(jax.vmap(restore)))(stored)
    return rearrange(_cut(x, 1), "c i j b s n d -> (i b) (c s) (j n) d").astype(dtype)


def _of_layer(tree: PyTree, layer: Int[Array, ""]) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), tree)


def restored(blobs: Blobs, layer: Int[Array, ""] | int, dtype: jnp.dtype) -> KeyValues:
    """The keys and values of all slots of a layer, [B, tokens, N, D], as they were stored."""
    return KeyValues(*(_got(x, dtype) for x in _of_layer(blobs, layer)))


# --- what a chunk sees ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Restoring:
    """A `ChunkPast` of stored chunks: the first `filled` tokens are seen.

    moved: by how many tokens the others move up, over a first chunk that is no longer seen. rope: RoPE's table for
    them all, where keys are stored before RoPE.
    """

    slots: Slots
    filled: Int[Array, ""]
    moved: Int[Array, ""] | None
    rope: tuple[Float[Array, "K h"], Float[Array, "K h"]] | None
    quant: CacheQuant
    appends: bool

    def attend(
        self, attend: Callable, q: Float[Array, "B S N d"], own: KeyValues, rope: tuple[Array, Array],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B S N d"], Kept | None]:  # fmt: skip
        own, kept = own if self.quant.unrotated else own.turned(rope), None
        if self.appends:
            own, kept = self._stored(own, layer)
        own = own.turned(rope) if self.quant.unrotated else own
        q = apply_rope(q, rope)
        if self.slots.first is None and self.slots.rest is None:
            return attend(q, *own), kept
        return attend(q, *own, past=Past(*self._past(layer, q.dtype), KeyRuns(kv_len=self.filled))), kept

    def _stored(self, own: KeyValues, layer: Int[Array, ""]) -> tuple[KeyValues, Kept]:
        """What comes back of the chunk's own keys, and what is kept of them."""
        configs, warm = (self.quant.keys, self.quant.values), _of_layer(self.slots.warm, layer)
        stored, warm = zip(*map(_put, own, configs, warm), strict=True)
        back = (_got(jax.tree.map(lambda leaf: leaf[None], x), own.k.dtype) for x in stored)
        return KeyValues(*back), Kept(Blobs(*stored), tuple(warm))

    def _past(self, layer: Int[Array, ""], dtype: jnp.dtype) -> KeyValues:
        parts = [restored(blobs, layer, dtype) for blobs in self.slots[:2] if blobs is not None]
        past = KeyValues(*(jnp.concatenate(x, axis=1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True)))
        past = past if self.rope is None else past.turned(self.rope)
        if self.moved is None:
            return past
        return KeyValues(*(jnp.roll(x, -self.moved, axis=1) for x in past))


jax.tree_util.register_dataclass(Restoring, ("slots", "filled", "moved", "rope"), ("quant", "appends"))


# --- the policy -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class QuantisedRing:
    """The chunks that a ring keeps, stored as `quant` says, in slots of their own: one is written, or overwritten,
    whole. Keys are at their absolute frames, stored before RoPE where `quant.unrotated`, else turned.

    The published code restores all that it has, and stores again what stays, whenever a window drops a chunk: what
    stays is rounded anew every time, in groups of other neighbours, and loses more the longer it stays, a sink most.
    Here a chunk is rounded once for as long as it is kept.
    """

    ring: Ring
    quant: CacheQuant

    def check(self, geometry: Geometry) -> None:
        self.quant.check_width(geometry.width)
        self.ring.check(geometry)

    def positions(self, geometry: Geometry, cache: Slots, chunk: ChunkIndex, frames: int) -> Int[Array, " T"]:
        return geometry.pattern.start(chunk) + jnp.arange(frames)

    def open(self, geometry: Geometry, batch: int) -> Slots:
        self._check_mesh(geometry)
        pattern, layers = geometry.pattern, geometry.layers
        blobs, warm = self._empty(geometry, batch, pattern.rest)

        def room(blobs: Blobs, slots: int) -> Blobs:
            return _cut(jax.tree.map(lambda x: jnp.zeros((layers, slots, *x.shape), x.dtype), blobs), 2)

        first = room(self._empty(geometry, batch, pattern.first).blobs, 1) if self._first_apart(geometry) else None
        slots = self._slots(geometry)
        warm = _cut(jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), warm), 1)
        return Slots(first, room(blobs, slots) if slots else None, warm)

    def seen(self, geometry: Geometry, cache: Slots, chunk: ChunkIndex, appends: bool) -> Restoring:
        pattern, first = geometry.pattern, geometry.pattern.first * self._first_apart(geometry)
        slot = jnp.arange(self._slots(geometry))
        at = pattern.start(self._held(geometry, slot, chunk))[:, None] + jnp.arange(pattern.rest)
        rope = geometry.rope(jnp.concatenate([jnp.arange(first), at.ravel()])) if self.quant.unrotated else None
        gone, chunks = self._first_gone(geometry, chunk), self._filled(geometry, chunk)
        apart = jnp.minimum(chunks, int(first > 0))
        frames = (chunks - apart) * pattern.rest + jnp.where(gone, 0, apart * first)
        moved = jnp.where(gone, first, 0) * geometry.frame_tokens if self._leaves(geometry) else None
        return Restoring(cache, frames * geometry.frame_tokens, moved, rope, self.quant, appends)

    def append(self, geometry: Geometry, cache: Slots, kept: Kept, chunk: ChunkIndex) -> Slots:
        cache = cache._replace(warm=_warmed(cache.warm, kept.warm))
        size = kept.blobs.k.shape[1] // geometry.frame_tokens
        if size != geometry.pattern.rest:
            return cache if cache.first is None else cache._replace(first=_written(cache.first, kept.blobs, 0, True))
        if cache.rest is None:
            return cache
        stays = True if self._turning(geometry) else jnp.asarray(chunk) < self._front(geometry)
        return cache._replace(rest=_written(cache.rest, kept.blobs, self._slot(geometry, chunk), stays))

    def _empty(self, geometry: Geometry, batch: int, frames: int) -> Kept:
        """The shapes of what is kept of a chunk in one layer."""
        shape = (batch, frames * geometry.frame_tokens, geometry.heads, geometry.width)

        def both(x: Heads) -> Kept:
            (k, warm_k), (v, warm_v) = (_put(x, config, ()) for config in (self.quant.keys, self.quant.values))
            return Kept(Blobs(k, v), (warm_k, warm_v))

        return jax.eval_shape(both, jax.ShapeDtypeStruct(shape, jnp.bfloat16))

    def _check_mesh(self, geometry: Geometry) -> None:
        mesh = ours()
        if mesh is not None and geometry.heads % mesh.shape[SEQUENCE_AXIS] == 0:
            check_parts(self.quant, mesh.shape[SEQUENCE_AXIS])

    # --- where a chunk is ---------------------------------------------------------------------------------------------

    def _first_apart(self, geometry: Geometry) -> bool:
        """Whether the first chunk is kept, and has a size of its own."""
        pattern, ring = geometry.pattern, self.ring
        return pattern.first != pattern.rest and (ring.window != 1 or ring.sink > 0)

    def _front(self, geometry: Geometry) -> int:
        """Chunks in front of those that are overwritten in turn."""
        return self.ring.sink or int(self._first_apart(geometry))

    def _turning(self, geometry: Geometry) -> int:
        """Slots that are overwritten in turn; without a window as many as there are chunks."""
        if self.ring.window is not None:
            return self.ring.window - 1
        return len(geometry.pattern.spans(geometry.frames)) - self._front(geometry)

    def _slots(self, geometry: Geometry) -> int:
        """Of chunks of the usual size."""
        return self._front(geometry) - self._first_apart(geometry) + self._turning(geometry)

    def _slot(self, geometry: Geometry, chunk: ChunkIndex) -> Int[Array, ""]:
        front = self._front(geometry)
        turn = (chunk - front) % max(self._turning(geometry), 1)
        return jnp.where(chunk < front, chunk, front + turn) - self._first_apart(geometry)

    def _held(self, geometry: Geometry, slot: Int[Array, " s"], chunk: ChunkIndex) -> Int[Array, " s"]:
        """The chunks that lie in these slots when this one is made: the latest before it that were put there."""
        front, last = self._front(geometry), chunk - 1
        number = slot + self._first_apart(geometry)
        latest = last - (last - number) % max(self._turning(geometry), 1)
        return jnp.where(number < front, number, latest)

    def _filled(self, geometry: Geometry, chunk: ChunkIndex) -> Int[Array, ""]:
        """Chunks that lie in the slots, the first included."""
        return jnp.minimum(chunk, self._front(geometry) + self._turning(geometry))

    def _leaves(self, geometry: Geometry) -> bool:
        """Whether the first chunk has a place of its own and yet leaves the window."""
        return self._first_apart(geometry) and self.ring.sink == 0 and self.ring.window is not None

    def _first_gone(self, geometry: Geometry, chunk: ChunkIndex) -> Bool[Array, ""]:
        return jnp.asarray(self._leaves(geometry) and chunk >= self.ring.window)


def _warmed(old: Warms, new: Warms) -> Warms:
    """The new centres, unless these are of a first chunk that has fewer clusters: then the next starts anew."""
    same = [x.shape for x in jax.tree.leaves(old)] == [x.shape for x in jax.tree.leaves(new)]
    return new if same else old


def _written(buffers: Blobs, new: Blobs, slot: Int[Array, ""] | int, stays: Bool[Array, ""] | bool) -> Blobs:
    """The buffers with a chunk in a slot, if it `stays`."""

    def write(x: Array, y: Array) -> Array:
        y = y[:, None]
        if stays is not True:  # not a conditional, which would copy the buffers
            y = jnp.where(stays, y, jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(x, y, slot, axis=1)

    return _cut(jax.tree.map(write, buffers, new), 2)


# --- which policies -------------------------------------------------------------------------------------------------


def check_parts(quant: CacheQuant | QuantConfig, parts: int) -> None:
    """Raises ArgumentError for a scheme that cannot store heads apart, where they are cut into several parts."""
    if parts > 1 and quant.crosses_heads:
        raise ArgumentError(
            f"{{granularity}} is over all heads, which lie on {parts} devices; use head, token or channel",
            granularity="tensor",
        )  # fmt: skip


def quantised(policy: CachePolicy, quant: CacheQuant) -> CachePolicy:
    """The policy with what it keeps in few bytes; itself where nothing is changed. Raises ArgumentError for a policy
    that does not keep chunks whole, as they came."""
    if quant.exact:
        return policy
    if not isinstance(policy, Ring):
        raise ArgumentError(
            "{cache_policy} does not keep chunks as they were stored: a quantised cache needs none or sliding_window",
            cache_policy=type(policy).__name__,
        )  # fmt: skip
    return QuantisedRing(policy, quant)


def holds_all(policy: CachePolicy) -> bool:
    """Whether the policy keeps the whole past, for which the network's latent frames must be enough."""
    return (policy.ring if isinstance(policy, QuantisedRing) else policy) == Ring()
