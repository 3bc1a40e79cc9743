"""Video that plays before it is finished: frames chunk by chunk, as soon as each chunk is decoded.

    frames = stream(network, params, text, noises, schedule, decode)
    for part in frames:              # [B, frames of a chunk, H, W, 3]
        ...
        frames.send(another_text)    # the prompt of all chunks not yet begun; the next one has
        frames.send(Cut(text))       # the same, and the first of them begins a scene, for a cache policy with cuts

Prompts that are known before are a `prompts.Script` in place of the text; what is sent takes the place of its rest.

The same chunk step as `rollout`, compiled once for each kind of chunk, and the same numbers. The next chunk is on its
way when a chunk's frames are fetched. With a window a stream has no end. Closing it (or a reader that goes away) frees
the cache at once.
"""

import functools
import itertools
import time
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from rcm_jax.causal.network import CausalDiT
from rcm_jax.sampling.course import Caches, Course
from rcm_jax.sampling.noise_control import Begin
from rcm_jax.sampling.prompts import Cut, Script
from rcm_jax.sampling.recache import Recache
from rcm_jax.sampling.rollout import Branch, Noises, condition_on_image, open_branches, sample_chunk
from rcm_jax.sampling.schedules import RolloutSchedule, Times
from rcm_jax.types import Latents, Params, Text
from rcm_jax.wan.layers import KeyValues

Frames = Float[np.ndarray, "B F H W 3"]
# (a chunk, state; None at first) -> frames, state
Decode = Callable[[Latents, PyTree | None], tuple[PyTree, PyTree]]
# (chunk, noise of its start, the schedule's times) -> where it begins; None where the input has ended
Begins = Callable[[int, Latents, Times], Begin | None]


# The caches travel apart from the prompts' keys: they alone are donated, so that a device holds each of them once.


@functools.partial(jax.jit, static_argnames=("network", "schedule"))
def open_caches(
    network: CausalDiT, params: Params, text: Text, null_text: Array | None, schedule: RolloutSchedule
) -> tuple[tuple[KeyValues, ...], Caches]:
    branches = open_branches(network, params, text, null_text, schedule)
    return tuple(b.prompt for b in branches), tuple(b.cache for b in branches)


@functools.partial(jax.jit, static_argnames=("network", "schedule"), donate_argnames="caches")
def condition_caches(
    network: CausalDiT, schedule: RolloutSchedule, params: Params, prompts: tuple[KeyValues, ...], caches: Caches,
    image: Latents, noise: Latents,
) -> Caches:  # fmt: skip
    """With the image's latents as chunk 0 in them (`condition_on_image`)."""
    branches = tuple(map(Branch, prompts, caches))
    return tuple(b.cache for b in condition_on_image(network, params, branches, image, noise, schedule))


@functools.partial(
    jax.jit, static_argnames=("network", "times", "noisy_context", "ode", "guidance"), donate_argnames="caches"
)
def sample_step(
    network: CausalDiT, params: Params, prompts: tuple[KeyValues, ...], caches: Caches, chunk: Array, noises: Array,
    begin: Begin | None = None, *, times: Times, noisy_context: bool, ode: bool, guidance: float,
) -> tuple[Latents, Caches]:  # fmt: skip
    """One chunk, and the caches with its keys: in place, where the device can. begin: instead of pure noise, and with
    its own times, as many as `times`."""
    start, times = (None, times) if begin is None else begin
    x, branches = sample_chunk(
        network, params, tuple(map(Branch, prompts, caches)), chunk, noises, times, start=start,
        noisy_context=noisy_context, ode=ode, guidance=guidance,
    )  # fmt: skip
    return x, tuple(b.cache for b in branches)


@functools.partial(jax.jit, static_argnames="network")
def prompt_keys(network: CausalDiT, params: Params, text: Text) -> KeyValues:
    return network.prompt(params, text)


def stream(
    network: CausalDiT,
    params: Params,
    text: Float[Array, "B L D"] | Script,
    noises: Noises,
    schedule: RolloutSchedule,
    decode: Decode,
    *,
    chunks: int | None = None,
    null_text: Float[Array, "L D"] | Text | None = None,
    image: Latents | None = None,
    begins: Begins | None = None,
    recache: str | None = None,
) -> Generator[Frames | None, Float[Array, "B L D"] | Cut | None, None]:
    """Yields frames, a chunk at a time: what `decode` makes of it, on the host. `send` a text to change the prompt, as
    a Cut (ArgumentError for a policy without cuts) to a new scene; this gives None, the loop goes on.

    chunks: how many; None fills the cache, or never ends with a window. `null_text` is one for all videos or one a
    video. `image` [B, 1, H, W, C] is chunk 0. `begins`: where a chunk begins instead of noise (input video); its None
    ends the stream. `recache`: one of `RECACHES`, what is made anew of the past where the prompt changes; None is
    nothing. `decode` should return before its frames are there, as what is under jit does, and may keep a state from
    chunk to chunk.
    Raises ValueError, before anything is sampled, for what `rollout` refuses, and a script that goes on longer.
    """
    script = text if isinstance(text, Script) else Script((text,))
    room = None if network.room is None else len(network.pattern.spans(network.room))
    if chunks is not None and chunks < 1:
        raise ValueError(f"{chunks=} must be at least 1")
    if room is not None and (chunks or 0) > room:
        raise ValueError(
            f"{chunks=} do not fit a cache of {network.frames} latent frames ({room} chunks); give a window"
        )
    last = room if chunks is None else chunks
    if last is not None:
        schedule.check_chunks(last)
        script.schedule.check_chunks(last)
    renew = None if recache is None else Recache(network, params, recache)
    prompts, caches = open_caches(network, params, script.at(0), null_text, schedule)
    if image is not None:
        caches = condition_caches(network, schedule, params, prompts, caches, image, noises(jnp.int32(0), 1)[0])

    def sample(index: int, prompts: tuple[KeyValues, ...], caches: Caches) -> tuple[Latents, Caches] | None:
        """Dispatches a chunk; nothing is waited for, but input. None: it has ended."""
        if index == 0 and image is not None:
            return image, caches
        chunk, frames = jnp.int32(index), network.pattern.rest if index else network.pattern.first
        (times, noisy), drawn, begin = schedule.chunk(index), noises(chunk, frames), None
        if begins is not None:
            begin = begins(index, drawn[0], times)
            if begin is None:
                return None
        return sample_step(
            network, params, prompts, caches, chunk, drawn, begin, times=times, noisy_context=noisy, ode=schedule.ode,
            guidance=schedule.guidance,
        )  # fmt: skip

    keys = functools.partial(prompt_keys, network, params)
    return chunk_by_chunk(sample, decode, Course(keys, script, prompts, caches, network.keeps, renew), last)


def chunk_by_chunk(sample, decode: Decode, course: Course, last: int | None):
    """The generator; with it the course ends. sample(a chunk's number, course's prompts, caches): (the chunk, caches),
    the chunk None where none is finished yet; None where none comes any more."""
    coming = state = None
    try:
        for index in itertools.chain(itertools.count() if last is None else range(last), (None,)):
            ready, coming, made = coming, None, None
            if index is not None:
                course.turn(index)
                made = sample(index, course.prompts, course.caches)
            if made is not None:
                course.put(*made)
                coming, state = (None, state) if made[0] is None else decode(made[0], state)
            if ready is not None:
                sent = yield jax.device_get(ready)
                while sent is not None:
                    course.say(None if index is None else index + 1, sent)
                    sent = yield None
            if made is None:
                return
    finally:
        course.free()


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
        """Median seconds between chunks; NaN for a single one."""
        return float(np.median(np.diff(self.seconds))) if len(self.seconds) > 1 else float("nan")

    @property
    def rate(self) -> float:
        """Frames a second after the first chunk; NaN for a single one."""
        if len(self.seconds) < 2:
            return float("nan")
        return sum(self.frames[1:]) / (self.seconds[-1] - self.seconds[0])


def profile(
    make: Callable[[], Iterable[Frames]], each: Callable[[Frames], object] = lambda part: None
) -> tuple[list[Frames], Profile]:
    """Makes a stream and runs it to its end, with `each` called on its parts: the parts, and when each came."""
    start, out, seconds = time.perf_counter(), [], []
    for part in make():
        seconds.append(time.perf_counter() - start)
        out.append(part)
        each(part)
    return out, Profile(tuple(seconds), tuple(part.shape[1] for part in out))
