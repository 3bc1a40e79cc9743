"""Policies of `sinks` whose chunks lie in few bytes: blobs stay in their slots, and a layer's frames are put in order
once they are restored."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rcm_jax.causal.blobs import Kept, Restoring, open_slots, warmed, written
from rcm_jax.causal.cache import Geometry
from rcm_jax.causal.held import Held
from rcm_jax.causal.sinks import NEVER, InfinityRope, RollingSink
from rcm_jax.chunks import ChunkIndex
from rcm_jax.quant import CacheQuant
from rcm_jax.wan.layers import KeyValues

Order = Int[Array, " F"]  # which of the slots' frames are seen, the first of them filled


@dataclasses.dataclass(frozen=True)
class QuantisedSinks:
    """What a policy keeps, with keys before RoPE. The cache is a `Held` of `Slots`."""

    policy: InfinityRope | RollingSink
    quant: CacheQuant

    def __post_init__(self) -> None:
        object.__setattr__(self, "quant", dataclasses.replace(self.quant, unrotated=True))

    def check(self, geometry: Geometry) -> None:
        self.quant.check_width(geometry.width)
        self.policy.check(geometry)

    def positions(self, geometry: Geometry, cache: Held, chunk: ChunkIndex, frames: int) -> Int[Array, " T"]:
        return self.policy.positions(geometry, cache, chunk, frames)

    def rest_slots(self, geometry: Geometry) -> int:
        """For chunks that have the usual size."""
        raise NotImplementedError

    def order(self, geometry: Geometry, cache: Held, chunk: ChunkIndex) -> Order:
        raise NotImplementedError

    def apart(self, geometry: Geometry) -> int:
        """1 where the first chunk has a size, and a slot, of its own."""
        return int(geometry.pattern.first != geometry.pattern.rest)

    def open(self, geometry: Geometry, batch: int) -> Held:
        first, rest = self.apart(geometry), self.rest_slots(geometry)
        more = {"block": jnp.full(first + rest, NEVER), "cut": jnp.array(False)}
        return Held(open_slots(geometry, self.quant, batch, bool(first), rest), jnp.int32(0), more)

    def seen(self, geometry: Geometry, cache: Held, chunk: ChunkIndex, appends: bool) -> Restoring:
        order = self.order(geometry, cache, chunk)
        ordered = cache.changed(keys=_shapes(geometry, order.size))
        rope = geometry.rope(self.policy.cached_positions(geometry, ordered, chunk))
        filled = cache.frames * geometry.frame_tokens
        return Restoring(cache.keys, filled, order, rope, geometry, self.quant, appends)

    def put(
        self, geometry: Geometry, cache: Held, kept: Kept, slot: Int[Array, ""], stays: Bool[Array, ""] | bool = True
    ) -> Held:
        """With the chunk in a slot, the first of which may be that of the first chunk."""
        slots = cache.keys._replace(warm=warmed(cache.keys.warm, kept.warm))
        if kept.blobs.k.shape[1] != geometry.pattern.rest * geometry.frame_tokens:
            return cache.changed(keys=slots._replace(first=written(slots.first, kept.blobs, 0, True)))
        if slots.rest is None:
            return cache.changed(keys=slots)
        rest = written(slots.rest, kept.blobs, slot - self.apart(geometry), stays)
        return cache.changed(keys=slots._replace(rest=rest))

    def _sizes(self, geometry: Geometry) -> list[int]:
        """Frames of every slot."""
        pattern = geometry.pattern
        return [pattern.first] * self.apart(geometry) + [pattern.rest] * self.rest_slots(geometry)


class QuantisedInfinity(QuantisedSinks):
    """Of `InfinityRope`: a chunk that is dropped leaves its slot to the next."""

    def rest_slots(self, geometry: Geometry) -> int:
        stays = self.policy.sink_blocks > 0
        return self.policy.cache_blocks - int(self.apart(geometry) and stays)

    def order(self, geometry: Geometry, cache: Held, chunk: ChunkIndex) -> Order:
        block, sizes = cache.more["block"], self._sizes(geometry)
        age = jnp.where(block == NEVER, jnp.iinfo(block.dtype).max, block)
        return jnp.argsort(jnp.repeat(age, jnp.array(sizes), total_repeat_length=sum(sizes)), stable=True)

    def request_cut(self, cache: Held) -> Held:
        """The next chunk has a cut."""
        return self.policy.request_cut(cache)

    def append(self, geometry: Geometry, cache: Held, kept: Kept, chunk: ChunkIndex) -> Held:
        block = cache.more["block"]
        block = jnp.where(self.policy.staying(cache, block, chunk), block, NEVER)
        first = self.apart(geometry)
        slot = first + jnp.argmax(block[first:] == NEVER)
        slot = jnp.where((jnp.asarray(chunk) == 0) & (first > 0), 0, slot)
        block = block.at[slot].set(chunk)
        frames = jnp.sum(jnp.where(block == NEVER, 0, jnp.array(self._sizes(geometry))))
        cache = self.put(geometry, cache, kept, slot)
        return cache.changed(frames=frames.astype(jnp.int32), more={"block": block, "cut": jnp.array(False)})


class QuantisedRolling(QuantisedSinks):
    """Of `RollingSink`: the bank's slots are written once, and behind them the latest chunks take turns."""

    def rest_slots(self, geometry: Geometry) -> int:
        return self.policy.total_blocks - self.apart(geometry) + self.policy.recent_blocks

    def order(self, geometry: Geometry, cache: Held, chunk: ChunkIndex) -> Order:
        pattern, K, R = geometry.pattern, self.policy.total_blocks, self.policy.recent_blocks
        rest, banked = pattern.rest, pattern.start(K)
        which, _ = self._rolled(geometry, jnp.asarray(chunk) - 1)
        recent = chunk - R + (which - banked) // rest  # the chunks that what is behind the bank is of
        latest = jnp.where(recent < K, pattern.start(recent), banked + (recent - K) % max(R, 1) * rest)
        rolled = jnp.where(which < banked, which, latest + (which - banked) % rest)
        return jnp.where(chunk > K, rolled, jnp.arange(which.size))

    def append(self, geometry: Geometry, cache: Held, kept: Kept, chunk: ChunkIndex) -> Held:
        K, R = self.policy.total_blocks, self.policy.recent_blocks
        banks = jnp.asarray(chunk) < K
        slot = jnp.where(banks, chunk, K + (chunk - K) % max(R, 1))
        cache = self.put(geometry, cache, kept, slot, True if R else banks)
        _, rolled = self._rolled(geometry, jnp.asarray(chunk))
        frames = jnp.where(banks, geometry.pattern.start(chunk + 1), rolled)
        return cache.changed(frames=frames.astype(jnp.int32))

    def _rolled(self, geometry: Geometry, chunk: Int[Array, ""]) -> tuple[Order, Int[Array, ""]]:
        """Which frames of the bank, and behind it of the latest chunks, are kept after this one, and how many."""
        rest, K = geometry.pattern.rest, self.policy.total_blocks
        bank = geometry.pattern.start(K)
        latest = jnp.int32(self.policy.recent_blocks * rest)
        return self.policy.rolled(
            geometry, Held(_shapes(geometry, max(bank, K * rest)), latest, _shapes(geometry, bank)), chunk
        )


def _shapes(geometry: Geometry, frames: int) -> KeyValues:
    """Of keys of so many frames: to a policy that asks only how many there are."""
    shape = jax.ShapeDtypeStruct((1, 1, frames * geometry.frame_tokens, 1, 1), geometry.dtype)
    return KeyValues(shape, shape)
