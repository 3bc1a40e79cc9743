"""Policies that keep some early chunks and the latest ones, and say anew for every chunk where these are for RoPE."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rcm_jax.causal.cache import Geometry, edit_layers
from rcm_jax.causal.held import Held, UnturnedPolicy, keep_frames, slots, take_frames
from rcm_jax.chunks import ChunkIndex
from rcm_jax.errors import ArgumentError
from rcm_jax.wan.layers import KeyValues

NEVER = -1  # the block of a slot that holds none


@dataclasses.dataclass(frozen=True)
class RollingSink(UnturnedPolicy):
    """Sinks that change: of the first `total_blocks` chunks, which stay in a bank for good, `sink_blocks` neighbours
    at a time go before the `recent_blocks` latest ones, forwards through the bank and then backwards with their frames
    reversed, as if time went on swinging through it.

    The published code overwrites the bank where sink and recent blocks are fewer than all; here they must be all.
    """

    total_blocks: int = 6
    sink_blocks: int = 5
    recent_blocks: int = 1

    def __post_init__(self) -> None:
        self.at_least(total_blocks=1, sink_blocks=0, recent_blocks=0)
        if self.sink_blocks + self.recent_blocks != self.total_blocks:
            raise ArgumentError(
                "{total_blocks} must be {sink_blocks} and {recent_blocks} together",
                total_blocks=self.total_blocks, sink_blocks=self.sink_blocks, recent_blocks=self.recent_blocks,
            )  # fmt: skip

    def open(self, geometry: Geometry, batch: int) -> Held:
        first, rest = geometry.pattern.first, geometry.pattern.rest
        longest = self.room(geometry, self.total_blocks * max(first, rest))
        bank = geometry.empty(batch, geometry.pattern.start(self.total_blocks))
        return Held(geometry.empty(batch, longest), jnp.int32(0), bank)

    def cached_positions(self, geometry: Geometry, cache: Held, chunk: ChunkIndex) -> Int[Array, " F"]:
        """One behind the other, the last directly before the chunk."""
        return geometry.pattern.start(chunk) - cache.frames + jnp.arange(slots(geometry, cache.keys))

    def append(self, geometry: Geometry, cache: Held, kept: KeyValues, chunk: ChunkIndex) -> Held:
        cache = cache.with_chunk(geometry, kept)
        P, banked = geometry.frame_tokens, slots(geometry, cache.more)
        bank = edit_layers(
            cache.more, lambda i, _: KeyValues(*(x[i, :, : banked * P] for x in cache.keys)),
            jnp.asarray(chunk) == self.total_blocks - 1,
        )  # fmt: skip
        order, frames = self.rolled(geometry, cache, chunk)

        def roll(i: Array, one: KeyValues) -> KeyValues:
            both = (jnp.concatenate([b[i], x], axis=1) for b, x in zip(bank, one, strict=True))
            return KeyValues(*(take_frames(geometry, x, order) for x in both))

        rolls = jnp.asarray(chunk) >= self.total_blocks
        keys = edit_layers(cache.keys, roll, rolls)
        return Held(keys, jnp.where(rolls, frames, cache.frames), bank)

    def rolled(self, geometry: Geometry, cache: Held, chunk: ChunkIndex) -> tuple[Int[Array, " F"], Int[Array, ""]]:
        """Which frames of the bank, and behind it of the cache, come into the slots; and how many do."""
        pattern, K, banked = geometry.pattern, self.total_blocks, slots(geometry, cache.more)
        phase = (chunk - K + 1) % (2 * K)  # 1 for the first chunk that is rolled
        place, back, j = phase % K, phase >= K, jnp.arange(self.sink_blocks)
        blocks = jnp.where(back, (K - 1 - place - j) % K, (place + j) % K)
        sizes = jnp.where(blocks == 0, pattern.first, pattern.rest)
        ends = jnp.cumsum(sizes)
        sink = ends[-1] if self.sink_blocks else jnp.int32(0)
        slot = jnp.arange(slots(geometry, cache.keys))
        recent = self.recent_blocks * pattern.rest  # the first chunk, of another size, is none of these
        latest = banked + cache.frames - recent + (slot - sink)
        if not self.sink_blocks:
            return latest, jnp.int32(recent)
        which = jnp.minimum(jnp.searchsorted(ends, slot, side="right"), self.sink_blocks - 1)
        within = slot - (ends - sizes)[which]
        within = jnp.where(back, sizes[which] - 1 - within, within)
        return jnp.where(slot < sink, pattern.start(blocks)[which] + within, latest), sink + recent


@dataclasses.dataclass(frozen=True)
class InfinityRope(UnturnedPolicy):
    """Nothing depends on how long the video is: a chunk ends at position `f_limit`, what is cached is placed directly
    before it, and what would come before position 0 is at 0.

    The first `sink_blocks` and the latest chunks stay, `cache_blocks` in all. A flush keeps the sink and the last
    chunk: after every `flush_interval_blocks` (0: never) chunks, and after a cut. A chunk with a cut (of `cuts`, or
    `request_cut`) is `rope_cut_delta` frames away from all that is cached, where it has more than one frame or
    `rope_cut_single_frame`.
    """

    cache_blocks: int = 6
    sink_blocks: int = 1
    f_limit: int = 21
    flush_interval_blocks: int = 0
    rope_cut_delta: int = 21
    rope_cut_single_frame: bool = True
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.at_least(cache_blocks=1, sink_blocks=0, f_limit=1, flush_interval_blocks=0, rope_cut_delta=0)
        if self.sink_blocks >= self.cache_blocks:
            raise ArgumentError(
                "{sink_blocks} must be fewer than {cache_blocks}", sink_blocks=self.sink_blocks,
                cache_blocks=self.cache_blocks,
            )  # fmt: skip

    def check(self, geometry: Geometry) -> None:
        longest = max(geometry.pattern.first, geometry.pattern.rest)
        if self.f_limit < longest:
            raise ArgumentError(f"{{f_limit}} must be at least a chunk's {longest} latent frames", f_limit=self.f_limit)

    def open(self, geometry: Geometry, batch: int) -> Held:
        first, rest = geometry.pattern.first, geometry.pattern.rest
        room = self.room(geometry, max(first, rest) + (self.cache_blocks - 1) * rest)
        more = {"block": jnp.full(room, NEVER), "cut": jnp.array(False)}
        return Held(geometry.empty(batch, room), jnp.int32(0), more)

    def request_cut(self, cache: Held) -> Held:
        """The next chunk has a cut."""
        return cache.changed(more=cache.more | {"cut": cache.more["cut"] | True})  # it stays where it lies

    def has_cut(self, cache: Held, chunk: ChunkIndex) -> Bool[Array, ""]:
        return cache.more["cut"] | jnp.isin(jnp.asarray(chunk), jnp.asarray(self.cuts, jnp.int32))

    def positions(self, geometry: Geometry, cache: Held, chunk: ChunkIndex, frames: int) -> Int[Array, " T"]:
        away = self.rope_cut_delta if frames > 1 or self.rope_cut_single_frame else 0
        return self.f_limit - frames + jnp.arange(frames) + jnp.where(self.has_cut(cache, chunk), away, 0)

    def cached_positions(self, geometry: Geometry, cache: Held, chunk: ChunkIndex) -> Int[Array, " F"]:
        size = jnp.where(jnp.asarray(chunk) > 0, geometry.pattern.rest, geometry.pattern.first)
        at = self.f_limit - size - cache.frames + jnp.arange(slots(geometry, cache.keys))
        return jnp.maximum(at, 0)

    def staying(self, cache: Held, block: Int[Array, " s"], chunk: ChunkIndex) -> Bool[Array, " s"]:
        """Which blocks are cached behind a chunk: the sink's and the latest, after a flush but itself."""
        every, flush = self.flush_interval_blocks, self.has_cut(cache, chunk)
        flush = flush | ((chunk + 1) % every == 0) if every else flush
        latest = jnp.where(flush, 1, self.cache_blocks - self.sink_blocks)
        return (block < self.sink_blocks) | (block > chunk - latest)

    def append(self, geometry: Geometry, cache: Held, kept: KeyValues, chunk: ChunkIndex) -> Held:
        block, own = cache.more["block"], kept.k.shape[-3] // geometry.frame_tokens
        block = jax.lax.dynamic_update_slice(block, jnp.full(own, chunk, block.dtype), (cache.frames,))
        stays = (block != NEVER) & self.staying(cache, block, chunk)
        cache = cache.with_chunk(geometry, kept)
        frames = stays.sum()
        keys, order = keep_frames(geometry, cache.keys, stays, frames < cache.frames)
        block = jnp.where(jnp.arange(block.size) < frames, block[order], NEVER)
        return Held(keys, frames, {"block": block, "cut": jnp.array(False)})


def check_cuts(policy: Any) -> None:
    """Raises ArgumentError for a policy that has no `request_cut`."""
    if not hasattr(policy, "request_cut"):
        raise ArgumentError("{cache_policy} has no cuts; infinity_rope has", cache_policy=type(policy).__name__)
