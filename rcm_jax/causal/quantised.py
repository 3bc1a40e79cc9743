"""Policies whose past lies in few bytes, as `rcm_jax.quant` stores it (`blobs`)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from rcm_jax.causal.blobs import Kept, Restoring, Slots, open_slots, warmed, written
from rcm_jax.causal.cache import CachePolicy, Geometry, Ring
from rcm_jax.causal.quantised_sinks import QuantisedInfinity, QuantisedRolling
from rcm_jax.causal.sinks import InfinityRope, RollingSink
from rcm_jax.chunks import ChunkIndex
from rcm_jax.errors import ArgumentError
from rcm_jax.quant import CacheQuant


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
        return open_slots(geometry, self.quant, batch, self._first_apart(geometry), self._slots(geometry))

    def seen(self, geometry: Geometry, cache: Slots, chunk: ChunkIndex, appends: bool) -> Restoring:
        pattern, first = geometry.pattern, geometry.pattern.first * self._first_apart(geometry)
        slot = jnp.arange(self._slots(geometry))
        at = pattern.start(self._held(geometry, slot, chunk))[:, None] + jnp.arange(pattern.rest)[None]
        at = jnp.concatenate([jnp.arange(first), at.ravel()])
        chunks = self._filled(geometry, chunk)
        frames, order = chunks * pattern.rest, None
        if first:
            gone = self._leaves(geometry) & (jnp.asarray(chunk) >= (self.ring.window or 0))
            frames = jnp.where(chunks > 0, frames - pattern.rest + jnp.where(gone, 0, first), 0)
            if self._leaves(geometry):
                order = (jnp.arange(at.size) + jnp.where(gone, first, 0)) % at.size
                at = at[order]
        rope = geometry.rope(at) if self.quant.unrotated else None
        return Restoring(cache, frames * geometry.frame_tokens, order, rope, geometry, self.quant, appends)

    def append(self, geometry: Geometry, cache: Slots, kept: Kept, chunk: ChunkIndex) -> Slots:
        cache = cache._replace(warm=warmed(cache.warm, kept.warm))
        size = kept.blobs.k.shape[1] // geometry.frame_tokens
        if size != geometry.pattern.rest:
            return cache if cache.first is None else cache._replace(first=written(cache.first, kept.blobs, 0, True))
        if cache.rest is None:
            return cache
        stays = True if self._turning(geometry) else jnp.asarray(chunk) < self._front(geometry)
        return cache._replace(rest=written(cache.rest, kept.blobs, self.slot(geometry, chunk), stays))

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

    def slot(self, geometry: Geometry, chunk: ChunkIndex) -> Int[Array, ""]:
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


# --- which policies -------------------------------------------------------------------------------------------------


def quantised(policy: CachePolicy, quant: CacheQuant) -> CachePolicy:
    """The policy with what it keeps in few bytes; itself where nothing is changed. Raises ArgumentError for a policy
    that does not keep chunks whole, as they came."""
    if quant.exact:
        return policy
    for kind, packed in KINDS.items():
        if isinstance(policy, kind):
            return packed(policy, quant)
    raise ArgumentError(
        "{cache_policy} does not keep chunks as they came: a quantised cache needs none, sliding_window, "
        "rolling_sink or infinity_rope", cache_policy=type(policy).__name__,
    )  # fmt: skip


KINDS = {Ring: QuantisedRing, RollingSink: QuantisedRolling, InfinityRope: QuantisedInfinity}


def holds_all(policy: CachePolicy) -> bool:
    """Whether the policy keeps the whole past, for which the network's latent frames must be enough."""
    return (policy.ring if isinstance(policy, QuantisedRing) else policy) == Ring()
