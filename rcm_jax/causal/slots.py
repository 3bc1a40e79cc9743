"""The cache of StreamDiffusionV2's stream batch: a few latent frames, in slots, one cache for each denoising step.

Row r of the batch is step r of some chunk, so it sees the chunks before as they were at step r. Every pass writes its
own keys and sees them among all that is filled; there is no pass at t = 0. Slots are written in order until they are
full, then again in the order of a queue, which the first ones, the sink, are not in. The adaptive sink puts a slot of
these in front of the queue where the new frame is unlike it. What is published counts slots by where they end.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rcm_jax.causal.cache import Geometry
from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.past import of_layer
from rcm_jax.wan.layers import KeyValues
from rcm_jax.wan.rope import apply_rope

OFF = -1.0  # of the adaptive sink: no cosine is below


class Slots(NamedTuple):
    """Of one row in one layer, or of all. queue: ends of slots, those that are next first, `queued` of them; filled:
    how many slots hold something, always the first ones."""

    queue: Int[Array, "... c"]
    queued: Int[Array, "..."]
    filled: Int[Array, "..."]

    def put_in_front(self, end: Int[Array, ""], where: Bool[Array, ""]) -> "Slots":
        queue = jnp.where(where, jnp.roll(self.queue, 1).at[0].set(end), self.queue)
        return self._replace(queue=queue, queued=self.queued + where)

    def put_behind(self, end: Int[Array, ""], where: Bool[Array, ""]) -> "Slots":
        queue = jnp.where(where, self.queue.at[self.queued].set(end), self.queue)
        return self._replace(queue=queue, queued=self.queued + where)

    def without_first(self, where: Bool[Array, ""]) -> "Slots":
        return self._replace(queue=jnp.where(where, jnp.roll(self.queue, -1), self.queue), queued=self.queued - where)


class SlotCache(NamedTuple):
    """Rows are ordered (step, video). keys: of all slots; slots: of every layer and row."""

    keys: KeyValues
    slots: Slots


class Written(NamedTuple):
    """What a pass leaves: its own keys, the token from which on they belong, and the slots after it."""

    own: KeyValues
    start: Int[Array, "... R"]
    slots: Slots


@dataclasses.dataclass(frozen=True)
class SlotRing:
    """Under the published names, all in latent frames: `num_kv_cache` slots, of which the first `num_sink_tokens` stay,
    or are replaced where a new frame's keys and values have a cosine below `adapt_sink_threshold` with theirs."""

    num_kv_cache: int = 6
    num_sink_tokens: int = 3
    adapt_sink_threshold: float = 0.2

    def check(self, pattern: ChunkPattern) -> None:
        """Raises ArgumentError where no slot is ever free for a chunk: all are the sink's or the first chunk's."""
        fits = self.num_sink_tokens + pattern.rest
        least = next(e for e in itertools.count(pattern.first + 2 * pattern.rest, pattern.rest) if e >= fits)
        least = min(least, 2 * pattern.first) if 2 * pattern.first >= fits else least
        if self.num_kv_cache < least:
            raise ArgumentError(
                f"{{num_kv_cache}} must be at least {least} with {{num_sink_tokens}} and chunks {pattern}: "
                "else nothing is left to write to",
                num_kv_cache=self.num_kv_cache, num_sink_tokens=self.num_sink_tokens,
            )  # fmt: skip

    def open(self, geometry: Geometry, batch: int, steps: int) -> SlotCache:
        """Empty, of one row a video; `copied` to `steps` later. A queue holds every end that may come to be in it: each
        slot's, and while slots fill, one of the sink for every pass."""
        rows = geometry.layers, batch
        queue = jnp.zeros((*rows, 2 * self.num_kv_cache + steps + 2), jnp.int32)
        counts = (jnp.zeros(rows, jnp.int32) for _ in range(2))  # each its own, since all are donated
        return SlotCache(geometry.empty(batch, self.num_kv_cache), Slots(queue, *counts))

    def copied(self, cache: SlotCache, steps: int) -> SlotCache:
        """The same past for every step."""
        return jax.tree.map(lambda x: jnp.tile(x, (1, steps, *(1,) * (x.ndim - 2))), cache)

    def append(self, cache: SlotCache, written: Written) -> SlotCache:
        """The cache after a pass: each row's own keys go to their slots, and nothing else moves."""
        layers, rows = written.start.shape

        def write(i: Array, keys: KeyValues) -> KeyValues:
            layer, row = jnp.divmod(i, rows)
            at = tuple(jnp.asarray(n, jnp.int32) for n in (layer, row, written.start[layer, row], 0, 0))
            pairs = zip(keys, written.own, strict=True)
            return KeyValues(
                *(jax.lax.dynamic_update_slice(x, y[layer, row][None, None].astype(x.dtype), at) for x, y in pairs)
            )

        return SlotCache(jax.lax.fori_loop(0, layers * rows, write, cache.keys), written.slots)


@dataclasses.dataclass(frozen=True)
class SlotPast:
    """A `ChunkPast` of the rows' slots. ends: one past the last latent frame of each step's chunk; adapts: whether the
    sink does; last: whether this is a chunk's last pass over a row, where the queue goes on. rest: frames of a chunk
    after the first one; frame_tokens: of a frame."""

    cache: SlotCache
    ends: Int[Array, " n"]
    adapts: Bool[Array, ""]
    last: Bool[Array, ""]
    ring: SlotRing
    rest: int
    frame_tokens: int

    def attend(
        self, attend: Callable, q: Float[Array, "R S N d"], own: KeyValues, rope: tuple[Array, Array],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "R S N d"], Written]:  # fmt: skip
        own, P, rows = own.turned(rope), self.frame_tokens, q.shape[0]
        frames = q.shape[1] // P
        stored, slots = of_layer(self.cache, layer)
        if self.rest == 1 and frames == 1 and self.ring.num_sink_tokens and self.ring.adapt_sink_threshold > OFF:
            place, unlike = jax.vmap(self._least_like)(stored, own)
            slots = jax.vmap(Slots.put_in_front)(slots, place + 1, unlike & self.adapts)
        ends = jnp.repeat(self.ends, rows // self.ends.size)
        end, seen, slots = jax.vmap(lambda slots, end: self._taken(slots, end, frames))(slots, ends)
        start = (end - frames) * P
        stored = jax.vmap(KeyValues.with_chunk)(stored, own, start)
        return self._over(attend, apply_rope(q, rope), stored, seen * P), Written(own, start, slots)

    def _least_like(self, stored: KeyValues, own: KeyValues) -> tuple[Int[Array, ""], Bool[Array, ""]]:
        """Which slot of one row's sink is least like the new frame, and whether that is too little."""
        sink, P = self.ring.num_sink_tokens, self.frame_tokens

        def cosines(stored: Float[Array, "K N d"], own: Float[Array, "P N d"]) -> Float[Array, " s"]:
            of_slots = stored[: sink * P].astype(jnp.float32).reshape(sink, P, -1).mean(1)
            of_frame = own.astype(jnp.float32).reshape(P, -1).mean(0)
            size = jnp.linalg.norm(of_slots, axis=-1) * jnp.linalg.norm(of_frame)
            return jnp.matmul(of_slots, of_frame, precision="highest") / jnp.maximum(size, 1e-8)  # an empty slot's is 0

        like = (cosines(stored.k, own.k) + cosines(stored.v, own.v)) / 2
        return like.argmin().astype(jnp.int32), like.min() < self.ring.adapt_sink_threshold

    def _taken(self, slots: Slots, end: Int[Array, ""], frames: int) -> tuple[Int[Array, ""], Int[Array, ""], Slots]:
        """Of one row: where the slots end that a chunk takes which ends at frame `end`, how many are filled then, and
        the slots after it."""
        ring = self.ring
        full = (end > ring.num_kv_cache) | (slots.filled >= ring.num_kv_cache)
        head, coming = slots.queue[0], end + frames  # published: a long first chunk leaves out the slots in between
        known = (slots.queued > 0) & (slots.queue[slots.queued - 1] == coming)
        fits = (ring.num_sink_tokens + self.rest <= coming) & (coming <= ring.num_kv_cache)
        slots = slots.put_behind(coming, ~full & fits & ~known)
        used = full & self.last
        slots = slots.without_first(used).put_behind(head, used & (head > ring.num_sink_tokens))
        end = jnp.where(full, head, end)
        seen = jnp.maximum(slots.filled, end)
        return end, seen, slots._replace(filled=jnp.where(self.last, seen, slots.filled))

    def _over(
        self, attend: Callable, q: Float[Array, "R S N d"], stored: KeyValues, seen: Int[Array, " R"]
    ) -> Float[Array, "R S N d"]:
        """Attention to what is filled. Rows fill at most a few ticks after one another: then each is a call of its own,
        and from then on all are one."""
        steps = self.ends.size

        def together() -> Array:
            return attend(q, *stored, mask=KeyRuns(kv_len=seen[0]))

        def apart() -> Array:
            parts = zip(*(jnp.split(x, steps) for x in (q, *stored, seen)), strict=True)
            return jnp.concatenate([attend(*part, mask=KeyRuns(kv_len=n[0])) for *part, n in parts])

        return together() if steps == 1 else jax.lax.cond((seen == seen[0]).all(), together, apart)


jax.tree_util.register_dataclass(SlotPast, ("cache", "ends", "adapts", "last"), ("ring", "rest", "frame_tokens"))
