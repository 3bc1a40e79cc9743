"""Video to video by StreamDiffusionV2's stream batch: the steps of neighbouring chunks in one pass of the network.

Batch row r is step r. At every tick the rows move down by one, row 0 takes the new chunk, one pass denoises all of them
at their own times, and the last row is a finished chunk: so a chunk costs one pass however many steps it takes, and
comes steps - 1 chunks late. Each row has a cache of its own (`causal.slots`). The first chunk's steps run one after
another; every row's cache begins as a copy of what they leave.

`in_turn` is the same without the batch: each chunk's steps one after another on one cache, without the delay.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from rcm_jax.causal.network import CausalDiT
from rcm_jax.causal.slots import SlotCache, SlotPast, SlotRing
from rcm_jax.chunks import ChunkPattern
from rcm_jax.flow import rf_noisy
from rcm_jax.sampling.course import Course
from rcm_jax.sampling.noise_control import Begin
from rcm_jax.sampling.prompts import Script
from rcm_jax.sampling.rollout import Noises
from rcm_jax.sampling.schedules import RolloutSchedule, Times
from rcm_jax.sampling.stream import Begins, Decode, Frames, chunk_by_chunk, prompt_keys
from rcm_jax.types import Latents, Params, Text
from rcm_jax.wan.dit import MODEL_TIME
from rcm_jax.wan.layers import KeyValues


class Coming(NamedTuple):
    """A chunk before its first step. times: what the network is told, noise first, the last 0; levels: how much noise
    there is, which published times are not quite."""

    start: Latents
    times: Float[Array, " n+1"]
    levels: Float[Array, " n+1"]


class Rows(NamedTuple):
    """All rows after a tick: what each chunk is noised again to, its times and levels, its first latent frame."""

    cache: SlotCache
    x: Float[Array, "n B t H W C"]
    times: Float[Array, "n n+1"]
    levels: Float[Array, "n n+1"]
    starts: Int[Array, " n"]


@dataclasses.dataclass(frozen=True)
class StreamBatch:
    """A causal network with the cache of its steps."""

    network: CausalDiT
    ring: SlotRing
    steps: int

    def __post_init__(self) -> None:
        self.ring.check(self.network.pattern)

    def open(self, batch: int) -> SlotCache:
        return self.ring.open(self.network.geometry, batch, self.steps)

    def forward(
        self, params: Params, prompt: KeyValues, cache: SlotCache, x: Float[Array, "n B t H W C"],
        t: Float[Array, " n"], starts: Int[Array, " n"], adapts: Bool[Array, ""] | bool, last: Bool[Array, ""] | bool,
    ) -> tuple[Float[Array, "n B t H W C"], SlotCache]:  # fmt: skip
        """Velocity of every row at its time, and the cache with the keys of this pass. adapts, last: see `SlotPast`."""
        (n, B, frames), geometry = x.shape[:3], self.network.geometry
        adapts, last = jnp.asarray(adapts), jnp.asarray(last)
        ends = starts + frames
        past = SlotPast(cache, ends, adapts, last, self.ring, geometry.pattern.rest, geometry.frame_tokens)
        at = starts[:, None] + jnp.arange(frames)[None]
        if prompt.k.shape[1] > 1:
            prompt = KeyValues(*(jnp.tile(keys, (1, n, 1, 1, 1)) for keys in prompt))
        v, written = self.network.dit.apply(
            {"params": params}, rearrange(x, "n b ... -> (n b) ..."), MODEL_TIME * jnp.repeat(t, B), prompt, past=past,
            frames=jnp.repeat(at, B, axis=0), method="chunk",
        )  # fmt: skip
        return v.reshape(x.shape).astype(x.dtype), self.ring.append(cache, written)


def _noised(x0: Float[Array, "n B t H W C"], eps: Float[Array, "m B t H W C"], levels: Float[Array, " n"]) -> Array:
    """To the level of the step that follows; the last is 0 and takes no noise."""
    eps = jnp.concatenate([eps, jnp.zeros_like(x0[-1:])]).astype(x0.dtype)
    return jax.vmap(rf_noisy)(x0, eps, levels).astype(x0.dtype)


@functools.partial(jax.jit, static_argnames="how", donate_argnames="cache")
def in_turn(
    how: StreamBatch, params: Params, prompt: KeyValues, cache: SlotCache, coming: Coming, start: Int[Array, ""],
    eps: Float[Array, "n-1 B t H W C"],
) -> tuple[Latents, SlotCache]:  # fmt: skip
    """A chunk that begins at latent frame `start`, its steps one after another on a cache of one row. They share their
    slots: the sink adapts at the first of them, and the queue goes on at the last. The first chunk begins the sink."""
    times, levels = coming.times, coming.levels
    x = coming.start.astype(levels.dtype)

    def step(carry: tuple[Latents, SlotCache], inputs: tuple) -> tuple[tuple[Latents, SlotCache], None]:
        (x, cache), (i, t, level, after, eps) = carry, inputs
        adapts, last = (i == 0) & (start > 0), i == how.steps - 1
        v, cache = how.forward(params, prompt, cache, x[None], t[None], start[None], adapts, last)
        return (rf_noisy(x - level * v[0], eps, after).astype(x.dtype), cache), None

    eps = jnp.concatenate([eps, jnp.zeros_like(x[None])]).astype(x.dtype)
    inputs = jnp.arange(how.steps), times[:-1], levels[:-1], levels[1:], eps
    return jax.lax.scan(step, (x, cache), inputs)[0]


@functools.partial(jax.jit, static_argnames="how")
def rows_after(how: StreamBatch, cache: SlotCache, coming: Coming) -> Rows:
    """The rows after the first chunk, which has left `cache`: zeros, where the second chunk will be, at the times that
    `coming` gives for each."""
    pattern, n = how.network.pattern, how.steps
    shape = (n, coming.start.shape[0], pattern.rest, *coming.start.shape[2:])
    times, levels = (jnp.tile(t[None], (n, 1)) for t in coming[1:])
    return Rows(
        how.ring.copied(cache, n), jnp.zeros(shape, levels.dtype), times, levels, jnp.full(n, pattern.first, jnp.int32)
    )


@functools.partial(jax.jit, static_argnames="how", donate_argnames="rows")
def tick(
    how: StreamBatch, params: Params, prompt: KeyValues, rows: Rows, coming: Coming, start: Int[Array, ""],
    eps: Float[Array, "n-1 B t H W C"],
) -> tuple[Latents, Rows]:  # fmt: skip
    """What the last row has finished, and the rows after one pass, in which a new chunk is row 0. eps: noise for all
    rows but the last."""

    def down(new: Array, old: Array) -> Array:
        return jnp.concatenate([new[None].astype(old.dtype), old[:-1]])

    x, times, levels, starts = (down(new, old) for new, old in zip((*coming, start), rows[1:], strict=True))
    t, level, after = jnp.diag(times), jnp.diag(levels), jnp.diag(levels, 1)
    v, cache = how.forward(params, prompt, rows.cache, x, t, starts, True, True)
    x0 = x - jnp.expand_dims(level, (1, 2, 3, 4, 5)) * v
    return x0[-1], Rows(cache, _noised(x0, eps, after), times, levels, starts)


# --- the stream -----------------------------------------------------------------------------------------------------


@jax.jit
def _row_noises(drawn: tuple[Float[Array, "m B t H W C"], ...], like: Latents) -> Float[Array, "n-1 B t H W C"]:
    """Of the chunk in row r, its noise r + 1."""
    return jnp.stack([noises[r + 1] for r, noises in enumerate(drawn)]) if drawn else like[None][:0]


class _Feed:
    """The chunks that come in, with their noise; after the end, the last of them."""

    def __init__(self, pattern: ChunkPattern, noises: Noises, begins: Begins, usual: Times, chunks: int | None):
        self.pattern, self.noises, self.begins, self.usual, self.end = pattern, noises, begins, usual, chunks
        self.begin: Begin | None = None
        self.drawn: dict[int, Array] = {}  # of the last chunks

    def next(self, index: int) -> bool:
        """Whether there is a chunk of that number; `end` is then known where there is none."""
        if self.end is not None and index >= self.end:
            return False
        drawn = self.noises(jnp.int32(index), self.pattern.rest if index else self.pattern.first)
        begin = self.begins(index, drawn[0], self.usual)
        if begin is None:
            self.end = index
            return False
        self.begin, self.drawn[index] = begin, drawn
        self.drawn.pop(index - len(self.usual), None)
        return True

    def row_noises(self, index: int, rows: int) -> Float[Array, "rows B t H W C"]:
        """For the rows of a tick. Those before the second chunk and past the last take what is at hand: no finished
        chunk comes of them."""
        last = max(self.drawn)
        return _row_noises(tuple(self.drawn[min(max(index - r, 1), last)] for r in range(rows)), self.begin.start)


@functools.partial(jax.jit, static_argnames="how")
def _open(how: StreamBatch, params: Params, text: Text) -> tuple[tuple[KeyValues, ...], SlotCache]:
    return (how.network.prompt(params, text),), how.open(text.shape[0])


def stream_batch(
    network: CausalDiT,
    ring: SlotRing,
    params: Params,
    text: Float[Array, "B L D"] | Script,
    noises: Noises,
    schedule: RolloutSchedule,
    decode: Decode,
    begins: Begins,
    *,
    chunks: int | None = None,
    one_by_one: bool = False,
    levels: Callable[[Array], Array] = lambda times: times,
) -> Generator[Frames | None, Float[Array, "B L D"] | None, None]:
    """As `stream`, of input video alone: `begins`, and `levels` of the times that it gives. When the input has ended,
    or after `chunks`, the chunks that are still under way are finished. A prompt that changes holds for all of these,
    too. one_by_one: `in_turn`.

    Raises ValueError for a ring that does not fit the network's chunks, and schedules that are no student's or differ
    from chunk to chunk.
    """
    script = text if isinstance(text, Script) else Script((text,))
    if schedule.ode or len(schedule.times) > 1:
        raise ValueError("a stream batch takes all chunks down the same few steps")
    if chunks is not None:
        script.schedule.check_chunks(chunks)
    times = schedule.times[0]
    how = StreamBatch(network, ring, len(times) - 1)
    prompts, cache = _open(how, params, script.at(0))
    feed = _Feed(network.pattern, noises, begins, times, chunks)
    late = 0 if one_by_one else how.steps - 1

    def sample(
        index: int, prompts: tuple[KeyValues], state: SlotCache | Rows
    ) -> tuple[Latents | None, SlotCache | Rows] | None:
        """Dispatches a chunk or a tick. None: the input has ended, and nothing is under way."""
        if not feed.next(index) and (feed.end < 2 or index >= feed.end + late):
            return None
        coming = Coming(*feed.begin, levels(feed.begin.times))
        start = jnp.int32(network.pattern.start(index))
        if index == 0 or one_by_one:
            x, state = in_turn(how, params, *prompts, state, coming, start, feed.drawn[index][1 : how.steps])
            if one_by_one:
                return x, state
            usual = jnp.asarray(times, coming.times.dtype)
            return x, rows_after(how, state, Coming(coming.start, usual, levels(usual)))
        x, state = tick(how, params, *prompts, state, coming, start, feed.row_noises(index, how.steps - 1))
        return x if index > late else None, state

    last = None if chunks is None else chunks + (late if chunks > 1 else 0)
    course = Course(functools.partial(prompt_keys, network, params), script, prompts, cache)
    return chunk_by_chunk(sample, decode, course, last)
