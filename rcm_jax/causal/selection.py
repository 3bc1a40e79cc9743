"""Policies that choose by its keys what of the past is worth keeping: keys are stored turned, and move when chosen."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Bool, Float, Int

from rcm_jax.causal.cache import Geometry, Turned, edit_layers
from rcm_jax.causal.held import Held, TurnedPolicy, by_frame, slots, take_tokens
from rcm_jax.chunks import ChunkIndex
from rcm_jax.errors import ArgumentError
from rcm_jax.wan.layers import KeyValues
from rcm_jax.wan.rope import apply_rope, turn_in_time

Frame = Int[Array, ""]


class Moves(NamedTuple):
    """Where the sink and what was chosen lie: by how many frames the sink has moved, and where the first chosen frame
    is."""

    sink: Frame
    middle: Frame


@dataclasses.dataclass(frozen=True)
class Choosing(TurnedPolicy):
    """The first `sink_frames`, the latest `recent_frames` and between them what scores best, `budget_frames` in all.
    When something is dropped, sink and middle move up to the recent frames."""

    sink_frames: int = 10
    budget_frames: int = 16
    recent_frames: int = 4

    def __post_init__(self) -> None:
        self.at_least(sink_frames=0, recent_frames=1)
        if self.budget_frames < self.sink_frames + self.recent_frames:
            raise ArgumentError(
                "{budget_frames} must be at least {sink_frames} and {recent_frames} together",
                budget_frames=self.budget_frames, sink_frames=self.sink_frames, recent_frames=self.recent_frames,
            )  # fmt: skip

    @property
    def middle_frames(self) -> int:
        return self.budget_frames - self.sink_frames - self.recent_frames

    def remembered(self, geometry: Geometry, batch: int) -> Any:
        """What a policy needs for its scores."""
        del geometry, batch

    def open(self, geometry: Geometry, batch: int) -> Held:
        keys = geometry.empty(batch, self.room(geometry, self.budget_frames))
        moves = Moves(jnp.int32(0), jnp.int32(self.sink_frames))
        return Held(keys, jnp.int32(0), (moves, self.remembered(geometry, batch)))

    def compacted(
        self, geometry: Geometry, cache: Held, chunk: ChunkIndex, size: int, remembered: Any,
        choose: Callable[[Array, Array], tuple[Int[Array, "B M"], Int[Array, "B M"]]],
    ) -> Held:  # fmt: skip
        """The cache within its budget. choose(layer, its keys): which tokens of the middle are kept, in their order,
        and by how many frames each moves, given that the first of them comes to `middle_start`."""
        P, A, R, old = geometry.frame_tokens, self.sink_frames, self.recent_frames, cache.more[0]
        sink = self.middle_start(geometry, chunk, size) - A
        recent = (cache.frames - R) * P + jnp.arange(R * P)

        def compact(i: Array, one: KeyValues) -> KeyValues:
            B = one.k.shape[0]
            middle, by = choose(i, one.k)
            which = [jnp.arange(A * P)[None], middle, recent[None]]
            which = [jnp.broadcast_to(x, (B, x.shape[-1])) for x in which]
            by = [jnp.full((B, A * P), sink - old.sink), by, jnp.zeros((B, R * P), jnp.int32)]
            which, by = jnp.concatenate(which, axis=1), jnp.concatenate(by, axis=1)
            self.kept(i, which, chunk)
            return KeyValues(turn_in_time(take_tokens(one.k, which), by), take_tokens(one.v, which))

        drops = cache.frames > self.budget_frames
        keys = edit_layers(cache.keys, compact, drops)
        moves = Moves(jnp.where(drops, sink, old.sink), jnp.where(drops, sink + A, old.middle))
        return Held(keys, jnp.where(drops, self.budget_frames, cache.frames), (moves, remembered))

    def middle_start(self, geometry: Geometry, chunk: ChunkIndex, size: int) -> Frame:
        """The position of the middle's first frame, so that its last is directly before the recent ones."""
        return geometry.pattern.start(chunk) + size - self.recent_frames - self.middle_frames

    def kept(self, layer: Array, tokens: Int[Array, "B K"], chunk: ChunkIndex) -> None:
        """Called with what is kept of a layer: for those who want to see it."""


# --- Deep Forcing ---------------------------------------------------------------------------------------------------


class Watched(NamedTuple):
    """Sums of the queries of each of the last recent frames, in every layer; how many frames that is."""

    queries: Float[Array, "L B R N d"]
    frames: Frame


@dataclasses.dataclass(frozen=True)
class Watching(Turned):
    """`Turned`, which also keeps the sum of the queries of every frame of the chunk."""

    frame_tokens: int = 1

    def attend(
        self, attend: Callable, q: Float[Array, "B S N d"], own: KeyValues, rope: tuple[Array, Array],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B S N d"], tuple[KeyValues, Float[Array, "B T N d"]]]:  # fmt: skip
        o, own = super().attend(attend, q, own, rope, layer)
        turned = apply_rope(q, rope).astype(jnp.float32)
        return o, (own, reduce(turned, "b (t p) n d -> b t n d", "sum", p=self.frame_tokens))


jax.tree_util.register_dataclass(Watching, ("keys", "filled"), ("frame_tokens",))


@dataclasses.dataclass(frozen=True)
class DeepForcing(Choosing):
    """Keeps the tokens that the recent frames' queries look at most, of every layer and video its own.

    A token's score is the sum of q·k/√d over the heads and the queries of the last `recent_frames` latent frames, as
    the appending pass has them. Only the last `observation_layers` (0: all) choose so; the others keep their latest
    tokens. As in the published code, tokens that have just come score 0, and all that is chosen moves alike: holes in
    it are not closed.
    """

    observation_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(observation_layers=0)

    def check(self, geometry: Geometry) -> None:
        if self.observation_layers > geometry.layers:
            raise ArgumentError(
                f"{{observation_layers}} must be at most the network's {geometry.layers} layers",
                observation_layers=self.observation_layers,
            )

    def remembered(self, geometry: Geometry, batch: int) -> Watched:
        shape = (geometry.layers, batch, self.recent_frames, geometry.heads, geometry.width)
        return Watched(jnp.zeros(shape, jnp.float32), jnp.int32(0))

    def seen(self, geometry: Geometry, cache: Held, chunk: ChunkIndex, appends: bool) -> Turned:
        if not appends:
            return super().seen(geometry, cache, chunk, appends)
        return Watching(cache.keys, cache.frames * geometry.frame_tokens, geometry.frame_tokens)

    def append(self, geometry: Geometry, cache: Held, kept: tuple[KeyValues, Array], chunk: ChunkIndex) -> Held:
        own, queries = kept
        size, before, P = queries.shape[2], cache.frames, geometry.frame_tokens
        looked, watched = self._watch(cache.more[1], queries, before > 0)
        cache = cache.with_chunk(geometry, own)
        A, R, C = self.sink_frames, self.recent_frames, self.middle_frames * P
        token = jnp.arange(cache.keys.k.shape[2])[None]
        candidate = (token >= A * P) & (token < (cache.frames - R) * P)
        observed = geometry.layers - (self.observation_layers or geometry.layers)
        by = self.middle_start(geometry, chunk, size) - cache.more[0].middle

        def choose(i: Array, keys: Float[Array, "B K N d"]) -> tuple[Array, Array]:
            score = jnp.einsum("bnd,bknd->bk", looked[i], keys.astype(jnp.float32)) / geometry.width**0.5
            score = jnp.where(token < before * P, score, 0)
            score = jnp.where(i < observed, token.astype(jnp.float32), score)
            _, best = jax.lax.top_k(jnp.where(candidate, score, -jnp.inf), C)
            return jnp.sort(best, axis=-1), jnp.full(best.shape, by)

        return self.compacted(geometry, cache, chunk, size, watched, choose)

    def _watch(
        self, watched: Watched, queries: Float[Array, "L B T N d"], observes: Bool[Array, ""]
    ) -> tuple[Float[Array, "L B N d"], Watched]:
        """The sum over the queries that look now, and what is remembered of them."""
        R, size = self.recent_frames, queries.shape[2]
        frames = jnp.concatenate([watched.queries, queries], axis=2)[:, :, -R:]  # not yet remembered ones are zeros
        first = watched.frames == 0
        looked = jnp.where(first, queries.sum(axis=2), frames.sum(axis=2))
        count = jnp.where(observes, jnp.minimum(watched.frames + size, R), watched.frames)
        return looked, Watched(jnp.where(observes, frames, watched.queries), count)


# --- Relax Forcing --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RelaxForcing(Choosing):
    """Keeps whole frames, which the keys of the first layer choose for all layers, of every video its own: those that
    are like the recent ones (`alignment_weight`) and unlike the others that could be kept (the rest of the weight)."""

    sink_frames: int = 4
    alignment_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alignment_weight <= 1:
            raise ArgumentError("{alignment_weight} must be from 0 to 1", alignment_weight=self.alignment_weight)

    def append(self, geometry: Geometry, cache: Held, kept: KeyValues, chunk: ChunkIndex) -> Held:
        size, P, A = kept.k.shape[-3] // geometry.frame_tokens, geometry.frame_tokens, self.sink_frames
        cache = cache.with_chunk(geometry, kept)
        frames = self._best(geometry, cache)
        start, rank = self.middle_start(geometry, chunk, size), jnp.arange(self.middle_frames)
        by = (start + rank)[None] - (cache.more[0].middle + frames - A)
        tokens = rearrange(frames[..., None] * P + jnp.arange(P)[None, None], "b m p -> b (m p)")
        by = jnp.repeat(by, P, axis=1)
        return self.compacted(geometry, cache, chunk, size, None, lambda *_: (tokens, by))

    def _best(self, geometry: Geometry, cache: Held) -> Int[Array, "B M"]:
        """The frames of the cache that make the middle, in their order."""
        means = by_frame(cache.keys.k[0], geometry).astype(jnp.float32).mean(axis=2)
        means = rearrange(means, "b f n d -> b f (n d)")
        slot = jnp.arange(slots(geometry, cache.keys))
        recent = (slot >= cache.frames - self.recent_frames) & (slot < cache.frames)
        candidate = (slot >= self.sink_frames) & (slot < cache.frames - self.recent_frames)
        tail = _unit((means * recent[None, :, None]).sum(axis=1) / self.recent_frames)
        means = _unit(means)
        alike = jnp.einsum("bfc,bgc->bfg", means, means)
        count = candidate.sum()
        likeness = ((alike * candidate[None, None]).sum(axis=2) - 1) / jnp.maximum(count - 1, 1)
        weight = self.alignment_weight
        score = weight * jnp.einsum("bfc,bc->bf", means, tail) + (1 - weight) * (1 - likeness)
        _, best = jax.lax.top_k(jnp.where(candidate[None], score, -jnp.inf), self.middle_frames)
        return jnp.sort(best, axis=-1)


def _unit(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
