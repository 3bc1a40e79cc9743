"""Keys and values of the chunks that a chunk of a video sees: what a policy of keeping them is, and the plain one.

A policy says what is kept of a video's past, and where; the network asks it before a chunk (`seen`) and gives it the
chunk's own keys after (`append`). Whatever it keeps is a pytree of fixed shapes, so one program serves all chunks of a
kind. The past stays where it is while a chunk is made: layers read it in place, and are given their number.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from rcm_jax.chunks import ChunkIndex, ChunkPattern, check_window
from rcm_jax.kernels.attention import Past
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.past import of_layer
from rcm_jax.parallel import cut_by_heads
from rcm_jax.wan.layers import ChunkPast, KeyValues
from rcm_jax.wan.rope import apply_rope, rope_table

Cache = PyTree


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A video in chunks, and its keys. frames: latent frames for which a cache that keeps all of them has room.
    grid: rows and columns of tokens in a frame."""

    pattern: ChunkPattern
    frames: int
    grid: tuple[int, int]
    layers: int
    heads: int
    width: int
    dtype: str

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def rope(self, frames: Int[Array, " F"]) -> tuple[Float[Array, "K h"], Float[Array, "K h"]]:
        """RoPE's table for the tokens of frames at these positions."""
        return rope_table((frames.size, *self.grid), self.width, frames)

    def empty(self, batch: int, frames: int) -> KeyValues:
        """Room for so many frames, [layers, batch, tokens, heads, width] twice. Under `jax.set_mesh` it lies cut by
        heads over the axis `sequence`."""
        shape = (self.layers, batch, frames * self.frame_tokens, self.heads, self.width)
        return cut_by_heads(KeyValues(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)))


def edit_layers(
    keys: KeyValues, change: Callable[[Int[Array, ""], KeyValues], KeyValues], where: Bool[Array, ""] | bool = True
) -> KeyValues:
    """change(number, keys of the layer) for all layers, `where` that is so: the buffers stay where they are. What is
    shorter than a buffer goes to its front."""

    def body(i: Array, keys: KeyValues) -> KeyValues:
        new = change(i, of_layer(keys, i))
        return KeyValues(
            *(
                jax.lax.dynamic_update_slice(x, y[None].astype(x.dtype), (i, 0, 0, 0, 0))
                for x, y in zip(keys, new, strict=True)
            )
        )

    # no rounds instead of a conditional, which would copy
    return jax.lax.fori_loop(0, jnp.where(where, keys.k.shape[0], 0), body, keys)


class CachePolicy(Protocol):
    """What is kept of a video's past. Hashable: it is static where the network is."""

    def check(self, geometry: Geometry) -> None:
        """Raises ValueError for a video that it does not fit."""

    def open(self, geometry: Geometry, batch: int) -> Cache:
        """The cache before the first chunk."""

    def positions(self, geometry: Geometry, cache: Cache, chunk: ChunkIndex, frames: int) -> Int[Array, " T"]:
        """Where the chunk's frames are, for RoPE."""

    def seen(self, geometry: Geometry, cache: Cache, chunk: ChunkIndex, appends: bool) -> ChunkPast:
        """What the chunk sees besides itself, in a pass that only reads the cache or in the one that `appends`."""

    def append(self, geometry: Geometry, cache: Cache, kept: PyTree, chunk: ChunkIndex) -> Cache:
        """The cache with what was `kept` of the chunk in it."""


@dataclasses.dataclass(frozen=True)
class Turned:
    """A `ChunkPast` of keys that are stored turned by RoPE: the first `filled` tokens of the buffers are seen."""

    keys: KeyValues
    filled: Int[Array, ""]

    def attend(
        self, attend: Callable, q: Float[Array, "B S N d"], own: KeyValues, rope: tuple[Array, Array],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B S N d"], KeyValues]:  # fmt: skip
        q, own = apply_rope(q, rope), own.turned(rope)
        if self.keys.k.shape[2] == 0:
            return attend(q, *own), own
        return attend(q, *own, past=Past(*self.keys, KeyRuns(kv_len=self.filled), layer)), own


jax.tree_util.register_dataclass(Turned, ("keys", "filled"), ())


@dataclasses.dataclass(frozen=True)
class Unturned:
    """A `ChunkPast` of keys that are stored before RoPE: attention turns them to where they are as it reads them."""

    keys: KeyValues
    filled: Int[Array, ""]
    rope: tuple[Float[Array, "K h"], Float[Array, "K h"]]

    def attend(
        self, attend: Callable, q: Float[Array, "B S N d"], own: KeyValues, rope: tuple[Array, Array],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B S N d"], KeyValues]:  # fmt: skip
        past = Past(*self.keys, KeyRuns(kv_len=self.filled), layer, self.rope)
        return attend(apply_rope(q, rope), *own.turned(rope), past=past), own


jax.tree_util.register_dataclass(Unturned, ("keys", "filled", "rope"), ())


@dataclasses.dataclass(frozen=True)
class Anew:
    """A `ChunkPast` of frames whose keys are made anew: all of them see one another, in both directions. With `sink`
    tokens of a buffer, these are seen in place of as many first ones of the frames."""

    keys: KeyValues
    sink: int

    def attend(
        self, attend: Callable, q: Float[Array, "B S N d"], own: KeyValues, rope: tuple[Array, Array],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B S N d"], KeyValues]:  # fmt: skip
        q, own = apply_rope(q, rope), own.turned(rope)
        if self.sink == 0:
            return attend(q, *own), own
        stored = (x[:, : self.sink] for x in of_layer(self.keys, layer))
        return attend(
            q, *(jnp.concatenate([x, y[:, self.sink :]], axis=1) for x, y in zip(stored, own, strict=True))
        ), own


jax.tree_util.register_dataclass(Anew, ("keys",), ("sink",))


@dataclasses.dataclass(frozen=True)
class Ring:
    """All of the past, or the last chunks of it: `window` chunks are seen, the current one included, and the first
    `sink` for good.

    In front of the buffer is the `head`, which is filled once; then the ring, whose oldest chunk the next one
    overwrites. Order does not matter to attention, so what is filled is always a prefix. Keys are stored turned.
    """

    window: int | None = None
    sink: int = 0

    def __post_init__(self) -> None:
        check_window(self.window, self.sink)

    def check(self, geometry: Geometry) -> None:
        """It fits every video."""

    def open(self, geometry: Geometry, batch: int) -> KeyValues:
        return geometry.empty(batch, self.capacity(geometry))

    def positions(self, geometry: Geometry, cache: KeyValues, chunk: ChunkIndex, frames: int) -> Int[Array, " T"]:
        del cache
        return geometry.pattern.start(chunk) + jnp.arange(frames)

    def seen(self, geometry: Geometry, cache: KeyValues, chunk: ChunkIndex, appends: bool) -> Turned:
        return Turned(cache, self._filled(geometry, chunk))

    def append(self, geometry: Geometry, cache: KeyValues, kept: KeyValues, chunk: ChunkIndex) -> KeyValues:
        if cache.k.shape[2] < kept.k.shape[2]:  # nothing is kept, or nothing but a shorter first chunk
            return cache
        slot = self.slot(geometry, chunk)
        if self._slots == 0:  # a window of one chunk: beyond the sink nothing is kept

            def write(i: Array, one: KeyValues) -> KeyValues:
                return one.with_chunk(KeyValues(*(x[i] for x in kept)), slot)

            return edit_layers(cache, write, chunk < self.sink)
        cache = cache.with_chunk(kept, slot)
        if not self._leaves_head(geometry):
            return cache
        moved = self.head_frames(geometry) * geometry.frame_tokens
        return edit_layers(
            cache, lambda _, one: jax.tree.map(lambda x: jnp.roll(x, -moved, axis=1), one), chunk == self.window - 1
        )  # fmt: skip

    # --- keys made anew -------------------------------------------------------------------------------------------

    def anew_frames(self, geometry: Geometry, chunk: int) -> int:
        """Of how many latent frames before a chunk the keys are made anew: of as many as it sees, itself counted, as
        in the published code; those of the oldest are then dropped."""
        start = geometry.pattern.start(chunk)
        if self._slots is None:
            return start
        return min(start, self.capacity(geometry) + geometry.pattern.rest)

    def renewed(
        self, geometry: Geometry, cache: KeyValues, kept: KeyValues, chunk: ChunkIndex, *, whole: bool
    ) -> KeyValues:
        """The cache that a chunk sees, with the keys of `anew_frames` frames before it in place of all others. whole:
        these are all frames before it, and the chunk is known; else what was the sink may be frames in between."""
        P = geometry.frame_tokens
        count = chunk if self._slots is None or whole else self._slots
        first = 0 if whole else geometry.pattern.start(chunk) - kept.k.shape[2] // P
        for earlier in (chunk - count + i for i in range(count)):
            if self._slots == 0 and earlier >= self.sink:
                break
            a = geometry.pattern.start(earlier)
            size = geometry.pattern.first if whole and earlier == 0 else geometry.pattern.rest
            own = KeyValues(*(jax.lax.dynamic_slice_in_dim(x, (a - first) * P, size * P, axis=2) for x in kept))
            cache = cache.with_chunk(own, self.slot(geometry, earlier, chunk))
        return cache

    def with_sink(self, geometry: Geometry, cache: KeyValues, kept: KeyValues) -> KeyValues:
        """With the first frames of those whose keys are anew where the sink was."""
        sink = self.sink_tokens(geometry)
        return cache.with_chunk(KeyValues(*(x[:, :, :sink] for x in kept)), 0) if sink else cache

    def sink_tokens(self, geometry: Geometry) -> int:
        return (self.head_frames(geometry) if self.sink else 0) * geometry.frame_tokens

    # --- where a chunk's keys are ---------------------------------------------------------------------------------

    @property
    def _slots(self) -> int | None:
        """Chunks that the ring has room for, the current one not among them; None: all."""
        return None if self.window is None else self.window - 1

    def head_frames(self, geometry: Geometry) -> int:
        """Latent frames in front of the ring: the sink, or a first chunk that the ring's slots would not fit."""
        pattern = geometry.pattern
        chunks = self.sink or int(pattern.first != pattern.rest and bool(self._slots))
        return pattern.first + (chunks - 1) * pattern.rest if chunks else 0

    def _leaves_head(self, geometry: Geometry) -> bool:
        """Whether the first chunk stands in front of the ring and yet leaves the window: the ring then moves up."""
        return self.sink == 0 and self.head_frames(geometry) > 0

    def capacity(self, geometry: Geometry) -> int:
        """Latent frames of the buffer."""
        if self._slots is None:
            return geometry.frames
        return self.head_frames(geometry) + self._slots * geometry.pattern.rest

    def slot(self, geometry: Geometry, chunk: ChunkIndex, by: ChunkIndex | None = None) -> Int[Array, ""]:
        """The token from which on a chunk's keys are written, or are when the chunk `by` sees them."""
        start, rest = geometry.pattern.start(chunk), geometry.pattern.rest
        if not self._slots:
            return start * geometry.frame_tokens
        head, in_ring = self._ring(geometry, chunk)
        base = self._base(geometry, chunk if by is None else by)
        return jnp.where(start < head, start, base + in_ring % self._slots * rest) * geometry.frame_tokens

    def _filled(self, geometry: Geometry, chunk: ChunkIndex) -> Int[Array, ""]:
        """How many tokens of the buffer a chunk sees."""
        start, rest = geometry.pattern.start(chunk), geometry.pattern.rest
        if self._slots is None:
            return jnp.asarray(start * geometry.frame_tokens)
        head, in_ring = self._ring(geometry, chunk)
        filled = self._base(geometry, chunk) + jnp.minimum(in_ring, self._slots) * rest
        return jnp.where(start <= head, start, filled) * geometry.frame_tokens

    def _ring(self, geometry: Geometry, chunk: ChunkIndex) -> tuple[int, Int[Array, ""]]:
        """Latent frames of the head, and how many chunks came behind it before this one."""
        head = self.head_frames(geometry)
        return head, (geometry.pattern.start(chunk) - head) // geometry.pattern.rest

    def _base(self, geometry: Geometry, chunk: ChunkIndex) -> Int[Array, ""] | int:
        """The frame of the buffer at which the ring begins when a chunk sees it."""
        head = self.head_frames(geometry)
        return jnp.where(chunk < self.window, head, 0) if self._leaves_head(geometry) else head
