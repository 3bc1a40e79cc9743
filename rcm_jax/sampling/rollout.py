"""A causal video from its first chunk to its last (arXiv 2606.25473): each chunk sampled on the cache of those before.

One chunk, few-step:   x = t_0 eps;  x <- (1-t') (x - t v) + t' eps'  down the chunk's times;  then one pass at t = 0
                       on the result puts its keys into the cache
with noisy context:    the last denoising pass itself puts them there, and the extra pass is saved
as an ODE:             x <- x - (t - t') v  with guidance, on two caches

`rollout` makes the whole video in one compiled program: chunks of one size and schedule are one `lax.scan`.
`sample_chunk` is its body, for those who want the chunks one by one.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from rcm_jax.causal.cache import Cache
from rcm_jax.causal.network import CausalDiT
from rcm_jax.chunks import ChunkIndex, ChunkPattern, Spans
from rcm_jax.flow import guide, one_a_video, rf_noisy
from rcm_jax.kernels.target import target
from rcm_jax.sampling.few_step import MIDDLE, next_state
from rcm_jax.sampling.schedules import RolloutSchedule, Times
from rcm_jax.spread import gathered_once
from rcm_jax.types import Latents, Params, Text
from rcm_jax.wan.layers import KeyValues

Noises = Callable[[ChunkIndex, int], Float[Array, "n B t H W C"]]  # (chunk, its frames) -> its start, then one a step


# --- noise ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ChunkNoises:
    """`Noises` of videos with a key each. A pytree whose call is compiled once for all keys, as streams need it."""

    keys: Array
    count: int
    size: tuple[int, int, int]

    @functools.partial(jax.jit, static_argnums=2)
    def __call__(self, chunk: ChunkIndex, frames: int) -> Float[Array, "n B t H W C"]:
        def one(key: Array) -> Array:
            return jax.random.normal(jax.random.fold_in(key, chunk), (self.count, frames, *self.size))

        return jax.vmap(one, out_axes=1)(self.keys)


jax.tree_util.register_dataclass(ChunkNoises, ("keys",), ("count", "size"))


def chunk_noises(seed: int, indices: Array, count: int, size: tuple[int, int, int]) -> ChunkNoises:
    """`count` noises a chunk for the videos of those indices, of (H, W, C) = `size`, from (seed, index, chunk) alone:
    a video is the same in every batch, scanned or streamed."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(indices, jnp.uint32))
    return ChunkNoises(keys, count, size)


def given_noises(whole: Float[Array, "n B T H W C"], pattern: ChunkPattern) -> Noises:
    """The chunks' parts of noise that is there for the whole video."""

    def noises(chunk: ChunkIndex, frames: int) -> Float[Array, "n B t H W C"]:
        return jax.lax.dynamic_slice_in_dim(whole, pattern.start(chunk), frames, axis=2)

    return noises


def whole_noises(noises: Noises, spans: Spans) -> Float[Array, "n B T H W C"]:
    """All chunks' noises along the frames: what `given_noises` takes apart."""
    return jnp.concatenate([noises(chunk, end - start) for chunk, (start, end) in enumerate(spans)], axis=2)


# --- sampling -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Branch:
    """One conditioning of a rollout: its prompt's keys and its cache."""

    prompt: KeyValues
    cache: Cache


jax.tree_util.register_dataclass(Branch, ("prompt", "cache"), ())
Branches = tuple[Branch, ...]  # conditional, and under guidance unconditional


def _each(branches: Branches, x: Latents, t: Array, call: Callable) -> list:
    """call(x, t [B], prompt, cache) for every branch."""
    t = jnp.broadcast_to(t, x.shape[:1])
    return [call(x, t, b.prompt, b.cache) for b in branches]


def _guided(velocities: list[Latents], guidance: float, dtype) -> Latents:
    cond, *uncond = (v.astype(dtype) for v in velocities)
    return guide(cond, *uncond, guidance) if uncond else cond


def _with_caches(branches: Branches, caches: list[Cache]) -> Branches:
    return tuple(Branch(b.prompt, cache) for b, cache in zip(branches, caches, strict=True))


def sample_chunk(
    network: CausalDiT,
    params: Params,
    branches: Branches,
    chunk: ChunkIndex,
    noises: Float[Array, "n B t H W C"],
    times: Times | Float[Array, " n"],
    *,
    start: Latents | None = None,
    noisy_context: bool = False,
    ode: bool = False,
    guidance: float = 1.0,
) -> tuple[Latents, Branches]:
    """One chunk, and the branches with its keys in their caches. noises: the start, then one a step that has one.
    start: begins there instead, at the first time. times: may be traced. On a mesh the weights are gathered once for
    all steps, where there is room for them."""
    params = gathered_once(params, network.dit.config.dtype)
    t = jnp.asarray(times, jnp.promote_types(noises.dtype, jnp.result_type(float)))
    network_at, append, both = (
        lambda x, t, prompt, cache, f=f: f(params, x, t, prompt, cache, chunk)
        for f in (network.denoise, network.append, network.step)
    )

    def velocity(x: Latents, t: Array) -> Latents:
        return _guided(_each(branches, x, t, network_at), guidance, x.dtype)

    def denoise(x: Latents, t: Array) -> Latents:
        return x - t * velocity(x, t)

    def step(x: Latents, inputs: tuple[Array, Array, Array | None]) -> tuple[Latents, None]:
        t, t_next, eps = inputs
        return x - (t - t_next) * velocity(x, t) if ode else next_state(denoise, rf_noisy, x, t, t_next, eps), None

    x = (t[0] * noises[0] if start is None else start).astype(t.dtype)
    if len(times) > 2:  # all steps but the last, which goes to 0, where nothing is noised again
        inputs = t[:-2], t[1:-1], None if ode else noises[1 : len(times) - 1]
        x, _ = jax.lax.scan(step, x, inputs, unroll=_steps_written_out(network, len(times) - 2))
    if noisy_context:
        velocities, caches = zip(*_each(branches, x, t[-2], both), strict=True)
        return x - t[-2] * _guided(velocities, guidance, x.dtype), _with_caches(branches, caches)
    x = denoise(x, t[-2])
    return x, _with_caches(branches, _each(branches, x, t[-1], append))


def _steps_written_out(network: CausalDiT, steps: int) -> int:
    """How many of a chunk's steps stand one after the other in the program. On GPUs all of a student's, where its
    layers do too: in a loop XLA copies each layer's weights out of their stack before a product reads them."""
    config = network.dit.config
    return steps if steps <= len(MIDDLE) and config.unroll == config.num_layers and target().is_gpu else 1


def open_branches(
    network: CausalDiT,
    params: Params,
    text: Text,
    null_text: Float[Array, "L D"] | Text | None,
    schedule: RolloutSchedule,
) -> Branches:
    """Prompts' keys and empty caches. Raises ValueError where guidance is asked for and `null_text` (one for all
    videos, or one a video) is missing or of another batch."""
    texts = [text]
    if schedule.guidance > 1:
        if null_text is None:
            raise ValueError(f"guidance={schedule.guidance} needs the unconditional text: give null_text")
        texts.append(one_a_video(null_text, text))
    return tuple(Branch(network.prompt(params, which), network.init_cache(text.shape[0])) for which in texts)


def condition_on_image(
    network: CausalDiT, params: Params, branches: Branches, image: Latents, noise: Latents, schedule: RolloutSchedule
) -> Branches:
    """Image-to-video: the image's latents [B, 1, H, W, C] are chunk 0, put into the cache as they are (t = 0), or with
    noisy context from chunk 0 on, noised to the chunk's last time. Raises ValueError for another first chunk."""
    if network.pattern.first != 1 or image.shape[1] != 1:
        raise ValueError(
            f"an image is a first chunk of 1 latent frame, not {image.shape[1]} in pattern {network.pattern}"
        )
    times, noisy = schedule.chunk(0)
    t = jnp.asarray(times[-2] if noisy else 0.0, image.dtype)
    x = rf_noisy(image, noise, t)
    return _with_caches(branches, _each(branches, x, t, lambda *at: network.append(params, *at, 0)))


def equal_chunks(schedule: RolloutSchedule, spans: Spans, first: int) -> list[tuple[int, int]]:
    """Ranges of chunks, from `first` on, that one scan can make: equal size, times and context."""
    kinds = [(b - a, schedule.chunk(i)) for i, (a, b) in enumerate(spans)]
    cuts = [i for i in range(first, len(spans)) if i == first or kinds[i] != kinds[i - 1]]
    return list(zip(cuts, (*cuts[1:], len(spans)), strict=True))


def joined(groups: Sequence[Float[Array, "chunks B t H W C"]]) -> Latents:
    """The chunks of every group one after another along the frames, [B, T, H, W, C]."""
    return jnp.concatenate([rearrange(x, "chunk b t h w c -> b (chunk t) h w c") for x in groups], axis=1)


def rollout(
    network: CausalDiT,
    params: Params,
    text: Float[Array, "B L D"],
    noises: Noises,
    schedule: RolloutSchedule,
    *,
    frames: int,
    null_text: Float[Array, "L D"] | Text | None = None,
    image: Latents | None = None,
) -> Latents:
    """A batch of videos of `frames` latent frames, [B, T, H, W, C]. Made for jit.

    `null_text` is the unconditional (or negative) text, one for all videos or one a video.
    `image` [B, 1, H, W, C] is the first frame of image-to-video (`condition_on_image`).
    Raises ValueError for frames that the pattern or the cache do not fit and schedules that do not fit the chunks.
    """
    spans = network.pattern.spans(frames)
    schedule.check_chunks(len(spans))
    if network.room is not None and frames > network.room:
        raise ValueError(f"{frames=} do not fit a cache of {network.room} latent frames; give a window")
    branches, parts = open_branches(network, params, text, null_text, schedule), []
    if image is not None:
        branches = condition_on_image(network, params, branches, image, noises(0, 1)[0], schedule)
        parts.append(image)

    for start, end in equal_chunks(schedule, spans, 0 if image is None else 1):
        size = spans[start][1] - spans[start][0]
        times, noisy = schedule.chunk(start)

        def body(branches: Branches, chunk: Array, size=size, times=times, noisy=noisy) -> tuple[Branches, Latents]:
            x, branches = sample_chunk(
                network, params, branches, chunk, noises(chunk, size), times, noisy_context=noisy, ode=schedule.ode,
                guidance=schedule.guidance,
            )  # fmt: skip
            return branches, x

        if end == start + 1:
            branches, x = body(branches, start)
        else:
            branches, chunks = jax.lax.scan(body, branches, jnp.arange(start, end))
            x = joined([chunks])
        parts.append(x)
    return jnp.concatenate(parts, axis=1)
