"""Chunks in few bytes: how they lie in a cache's slots, and what a pass sees of them.

A chunk is stored once, whole, in the pass that appends it; that pass and all later ones see what comes back. It lies
token by token where it can, for kernels, which read it as it lies (but see `kernels.choice.not_read`); else a layer of
it is restored inside the layer.
The past never lies in memory, as a whole, as the numbers that attention reads.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from rcm_jax.causal.cache import Geometry
from rcm_jax.causal.held import take_frames
from rcm_jax.errors import ArgumentError
from rcm_jax.kernels.attention import Past
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.past import of_layer
from rcm_jax.parallel import SEQUENCE_AXIS, cache_spec, ours
from rcm_jax.quant import CacheQuant, QuantConfig, Stored, laid_by_token, restore, store
from rcm_jax.quant.stored import Warm
from rcm_jax.wan.layers import KeyValues
from rcm_jax.wan.rope import apply_rope

HEADS = "heads"  # the mapped axis over which a chunk's heads are stored apart
Heads = Float[Array, "B S N D"]


class Blobs(NamedTuple):
    """Keys and values of chunks of one size. Their arrays begin with [layers, slots, parts of the batch, parts of the
    heads]: a mesh cuts batch and heads, so each part is stored by itself and lies on one device."""

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


def _place(mesh: Mesh | AbstractMesh, x: Array, before: int) -> P:
    """Where `cut_by_heads` has what these are parts of; `before`: axes in front of the parts."""
    batch, heads = x.shape[before : before + 2]
    samples, _, heads, _ = (*cache_spec(mesh, (batch, 1, heads, 1)), None)
    return P(*(None,) * before, samples, heads)


def _cut(tree: PyTree, before: int = 0) -> PyTree:
    if (mesh := ours()) is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _place(mesh, x, before)), tree)


def cache_places(mesh: Mesh | AbstractMesh, cache: PyTree) -> PyTree:
    """Where the arrays of a policy's cache lie on a mesh, if only their shapes are known."""

    def slots(tree: PyTree, before: int) -> PyTree:
        return jax.tree.map(lambda x: _place(mesh, x, before), tree)

    def place(part: PyTree) -> PyTree:
        match part:
            case Slots(first, rest, warm):
                return Slots(slots(first, 2), slots(rest, 2), slots(warm, 1))
            case KeyValues(k, v) if k.ndim == 5:
                return KeyValues(cache_spec(mesh, k.shape), cache_spec(mesh, v.shape))
        return jax.tree.map(lambda _: P(), part)

    return jax.tree.map(place, cache, is_leaf=lambda x: isinstance(x, (Slots, KeyValues)))


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
        stored, warm = store(x, config, warm, HEADS)
        return laid_by_token(stored), warm

    return _cut(jax.vmap(jax.vmap(part, axis_name=HEADS))(_in_parts(x), warm))


def _got(stored: Stored, dtype: jnp.dtype) -> Heads:
    """All slots of a layer, one behind the other."""
    x = jax.vmap(jax.vmap(jax.vmap(restore)))(stored)
    return rearrange(_cut(x, 1), "c i j b s n d -> (i b) (c s) (j n) d").astype(dtype)


def _kept(own: KeyValues, quant: CacheQuant, warm: Warms) -> Kept:
    stored, warm = zip(*map(_put, own, (quant.keys, quant.values), warm), strict=True)
    return Kept(Blobs(*stored), tuple(warm))


def _back(blobs: Blobs, dtype: jnp.dtype) -> KeyValues:
    return KeyValues(*(_got(x, dtype) for x in blobs))


def restored(blobs: Blobs, layer: Int[Array, ""] | int, dtype: jnp.dtype) -> KeyValues:
    """The keys and values of all slots of a layer, [B, tokens, N, D], as they were stored."""
    return _back(of_layer(blobs, layer), dtype)


# --- what a chunk sees ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Restoring:
    """A `ChunkPast` of stored chunks: the first `filled` tokens are seen.

    order: the frames in the order in which they are seen, where it is not that of the slots. rope: RoPE's table for
    these, where keys are stored before RoPE.
    """

    slots: Slots
    filled: Int[Array, ""]
    order: Int[Array, " F"] | None
    rope: tuple[Float[Array, "K h"], Float[Array, "K h"]] | None
    geometry: Geometry
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
        return attend(q, *own, past=self._past(layer, q.dtype)), kept

    def _stored(self, own: KeyValues, layer: Int[Array, ""]) -> tuple[KeyValues, Kept]:
        """What comes back of the chunk's own keys, and what is kept of them."""
        kept = _kept(own, self.quant, of_layer(self.slots.warm, layer))
        return _back(jax.tree.map(lambda leaf: leaf[None], kept.blobs), own.k.dtype), kept

    def _past(self, layer: Int[Array, ""], dtype: jnp.dtype) -> Past:
        """As it is stored where it is in one piece, for a kernel that reads it so; else what is made of it."""
        blobs = [blobs for blobs in self.slots[:2] if blobs is not None]
        if len(blobs) > 1 or ours() is not None:
            return Past(*self._made(layer, dtype), KeyRuns(kv_len=self.filled))
        k, v = jax.tree.map(lambda x: x.reshape(*x.shape[:2], *x.shape[4:]), tuple(blobs[0]))
        return Past(k, v, KeyRuns(kv_len=self.filled), layer, self.rope, self._rows())

    def _rows(self) -> Int[Array, " K"] | None:
        if self.order is None:
            return None
        tokens = self.geometry.frame_tokens
        return (self.order[:, None] * tokens + jnp.arange(tokens)[None]).ravel()

    def _made(self, layer: Int[Array, ""], dtype: jnp.dtype) -> KeyValues:
        parts = [restored(blobs, layer, dtype) for blobs in self.slots[:2] if blobs is not None]
        past = KeyValues(*(jnp.concatenate(x, axis=1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True)))
        if self.order is not None:
            past = KeyValues(*(take_frames(self.geometry, x, self.order) for x in past))
        return past if self.rope is None else past.turned(self.rope)


jax.tree_util.register_dataclass(Restoring, ("slots", "filled", "order", "rope"), ("geometry", "quant", "appends"))


# --- slots ----------------------------------------------------------------------------------------------------------


def check_parts(quant: CacheQuant | QuantConfig, parts: int) -> None:
    """Raises ArgumentError for a scheme that cannot store heads apart, where they are cut into several parts."""
    if parts > 1 and quant.crosses_heads:
        raise ArgumentError(
            f"{{granularity}} is over all heads, which lie on {parts} devices; use head, token or channel",
            granularity="tensor",
        )  # fmt: skip


def open_slots(geometry: Geometry, quant: CacheQuant, batch: int, first: bool, rest: int) -> Slots:
    """Empty ones: whether for a first chunk of its own size, and for how many others. Raises ArgumentError for a scheme
    that does not fit the mesh."""
    if (mesh := ours()) is not None and geometry.heads % mesh.shape[SEQUENCE_AXIS] == 0:
        check_parts(quant, mesh.shape[SEQUENCE_AXIS])

    def room(tree: PyTree, *axes: int) -> PyTree:
        return _cut(jax.tree.map(lambda x: jnp.zeros((*axes, *x.shape), x.dtype), tree), len(axes))

    def shapes(frames: int) -> Kept:
        x = jax.ShapeDtypeStruct((batch, frames * geometry.frame_tokens, geometry.heads, geometry.width), jnp.bfloat16)
        return jax.eval_shape(lambda x: _kept(KeyValues(x, x), quant, ((), ())), x)

    blobs, warm = shapes(geometry.pattern.rest)
    apart = room(shapes(geometry.pattern.first).blobs, geometry.layers, 1) if first else None
    return Slots(apart, room(blobs, geometry.layers, rest) if rest else None, room(warm, geometry.layers))


def warmed(old: Warms, new: Warms) -> Warms:
    """The new centres, unless these are of a first chunk that has fewer clusters: then the next starts anew."""
    same = [x.shape for x in jax.tree.leaves(old)] == [x.shape for x in jax.tree.leaves(new)]
    return new if same else old


def written(buffers: Blobs, new: Blobs, slot: Int[Array, ""] | int, stays: Bool[Array, ""] | bool) -> Blobs:
    """The buffers with a chunk in a slot, if it `stays`."""

    def write(x: Array, y: Array) -> Array:
        y = y[:, None]
        if stays is not True:  # not a conditional, which would copy the buffers
            y = jnp.where(stays, y, jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(x, y, slot, axis=1)

    return _cut(jax.tree.map(write, buffers, new), 2)
