"""Video that plays before it is finished: frames chunk by chunk, as soon as each chunk is decoded.

    frames = stream(network, params, text, noises, schedule, decode)
    for part in frames: …                # [B, frames of a chunk, H, W, 3]
    frames.send(another_text)            # instead of next(): the prompt of all chunks not yet begun

The same chunk step as `rollout`, compiled once for each kind of chunk, and the same numbers. The next chunk is on its
way when a chunk's frames are fetched. With a window a stream has no end. Closing it (or a reader that goes away) frees
the cache at once.
"""

import functools
import time
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from rcm_jax.sampling.rollout import (
    Branch,
    Branches,
    Noises,
    RolloutSchedule,
    condition_on_image,
    open_branches,
    sample_chunk,
)
from rcm_jax.types import Latents, Params, Video
from rcm_jax.wan.causal import CausalDiT
from rcm_jax.wan.dit import KeyValues

Frames = Float[np.ndarray, "B F H W 3"]
Decode = Callable[[Latents, PyTree | None], tuple[Video, PyTree]]  # (a chunk, state; None at first) -> frames, state


@functools.partial(jax.jit, static_argnames=("network", "schedule", "kind"), donate_argnames="caches")
def _sample(
    network: CausalDiT, schedule: RolloutSchedule, kind: int, params: Params, prompts: tuple[KeyValues, ...],
    caches: tuple[KeyValues, ...], chunk: Array, noises: Array,
) -> tuple[Latents, tuple[KeyValues, ...]]:  # fmt: skip
    """One chunk with the times of chunk `kind`, and the caches with its keys: in place, where the device can."""
    times, noisy = schedule.chunk(kind)
    branches = tuple(Branch(*of) for of in zip(prompts, caches, strict=True))
    x, branches = sample_chunk(
        network, params, branches, chunk, noises, times, noisy_context=noisy, ode=schedule.ode,
        guidance=schedule.guidance,
    )  # fmt: skip
    return x, tuple(b.cache for b in branches)


_open = jax.jit(open_branches, static_argnames=("network", "schedule"))
_condition = jax.jit(condition_on_image, static_argnames=("network", "schedule"))
_prompt = jax.jit(lambda network, params, text: network.prompt(params, text), static_argnames="network")


def stream(
    network: CausalDiT,
    params: Params,
    text: Float[Array, "B L D"],
    noises: Noises,
    schedule: RolloutSchedule,
    decode: Decode,
    *,
    chunks: int | None = None,
    null_text: Float[Array, "L D"] | None = None,
    image: Latents | None = None,
) -> Generator[Frames, Float[Array, "B L D"] | None, None]:
    """Yields frames in [-1, 1], a chunk at a time. `send` a text in place of `next` to change the prompt.

    chunks: how many; None fills the cache, or never ends with a window. `image` [B, 1, H, W, C] is chunk 0.
    Raises ValueError, before anything is sampled, for more chunks than a cache without a window holds.
    """
    room = len(network.pattern.spans(network.frames))
    if network.window is None and chunks is not None and chunks > room:
        raise ValueError(
            f"{chunks=} do not fit a cache of {network.frames} latent frames ({room} chunks); give a window"
        )
    last = room if network.window is None and chunks is None else chunks
    if last is not None:
        schedule.check_chunks(last)
    return _stream(network, params, text, noises, schedule, decode, last, null_text, image)


def _stream(network, params, text, noises, schedule, decode, last, null_text, image):
    draw = jax.jit(noises, static_argnums=1)
    branches: Branches = _open(network, params, text, null_text, schedule)
    prompts, caches = [b.prompt for b in branches], tuple(b.cache for b in branches)
    state = None

    def begin(index: int) -> Video:
        """Dispatches a chunk and its decoding; nothing is waited for."""
        nonlocal caches, state
        if index == 0 and image is not None:
            filled = _condition(network, params, branches, image, draw(0, 1)[0], schedule)
            x, caches = image, tuple(b.cache for b in filled)
        else:
            chunk, frames = jnp.int32(index), network.pattern.rest if index else network.pattern.first
            kind = min(index, _settled(schedule))
            x, caches = _sample(network, schedule, kind, params, tuple(prompts), caches, chunk, draw(chunk, frames))
        frames, state = decode(x, state)
        return frames

    try:
        coming, index = begin(0), 0
        while coming is not None:
            ready, index = coming, index + 1
            coming = begin(index) if last is None or index < last else None
            new_text = yield np.asarray(ready)
            while new_text is not None:
                prompts[0] = _prompt(network, params, new_text)
                new_text = yield np.empty((0,))  # what `send` itself returns
    finally:
        for leaf in jax.tree.leaves((caches, prompts, state)):
            leaf.delete()


def _settled(schedule: RolloutSchedule) -> int:
    """The first chunk from which on all are sampled alike."""
    return max(len(schedule.times) - 1, schedule.noisy_context_from or 0, 1)


# --- how fast -------------------------------------------------------------------------------------------------------


class Profile(NamedTuple):
    """Seconds from the start to each chunk's frames on the host, and how many frames a video they were."""

    seconds: tuple[float, ...]
    frames: tuple[int, ...]

    @property
    def first(self) -> float:
        """Seconds to the first decoded frame."""
        return self.seconds[0]

    @property
    def chunk(self) -> float:
        """Median seconds between chunks."""
        return float(np.median(np.diff(self.seconds))) if len(self.seconds) > 1 else float("nan")

    @property
    def rate(self) -> float:
        """Frames a second after the first chunk."""
        if len(self.seconds) < 2:
            return float("nan")
        return sum(self.frames[1:]) / (self.seconds[-1] - self.seconds[0])


def profile(parts: Iterable[Frames]) -> tuple[list[Frames], Profile]:
    """Runs a stream to its end: its parts, and when each came."""
    start, out, seconds = time.perf_counter(), [], []
    for part in parts:
        out.append(part)
        seconds.append(time.perf_counter() - start)
    return out, Profile(tuple(seconds), tuple(part.shape[1] for part in out))
