"""Latents of a bidirectional network, batch by batch.

A batch has one size for the whole run; what is missing is filled up. So a video's numbers come from one program and
from its own noise, text and image, whatever it is batched with. The steps of a small network are one program; those of
a large one a loop of the host, so that weights can change on the way and a bar can move.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from rcm_jax.chunks import ChunkPattern
from rcm_jax.errors import ArgumentError
from rcm_jax.flow import guided
from rcm_jax.parallel import batch_sharding
from rcm_jax.pipelines.memory import Job, check_memory, device_limit, network_bytes
from rcm_jax.pipelines.networks import Experts
from rcm_jax.pipelines.opening import Opened
from rcm_jax.pipelines.request import Features, Request, batch_rows
from rcm_jax.pipelines.watch import Watch
from rcm_jax.progress import Progress
from rcm_jax.sampling.noise import draw_noise, noise_by_chunks
from rcm_jax.sampling.sampler import SamplerConfig, run_sampler
from rcm_jax.tensor_stream import on_host
from rcm_jax.types import Latents, Params, Text, Velocity
from rcm_jax.wan.dit import DiT, begin_with, velocity


class Conditions(NamedTuple):
    """What a network reads beside noise and time: a row a video, or one that serves all. null_text: under guidance
    alone. condition and image: of image-to-video networks. first: the first latent frame, where it
    is an image."""

    text: Float[Array, "V L D"]
    null_text: Float[Array, "v L D"] | None = None
    condition: Float[Array, "1 T H W C"] | None = None
    image: Float[Array, "1 K D"] | None = None
    first: Float[Array, "1 1 H W C"] | None = None


@functools.partial(jax.jit, static_argnames="dit")
def one_pass(
    dit: DiT, params: Params, text: Text, x: Latents, t: Array, condition: Latents | None, image: Array | None,
    first: Latents | None = None,
) -> Latents:  # fmt: skip
    return velocity(dit, params, text, condition=condition, image=image, first=first)(x, t)


def _bound(call: Callable[[Text], Velocity], given: Conditions, sampler: SamplerConfig) -> Velocity:
    """The velocity of a batch, guided where there is an unconditional text. call: text -> velocity."""
    if given.null_text is None:
        return call(given.text)
    return guided(call(given.text), call(given.null_text), sampler.guidance)


@functools.partial(jax.jit, static_argnames=("dit", "sampler"))
def all_steps(dit: DiT, sampler: SamplerConfig, params: Params, given: Conditions, noise: Array) -> Latents:
    def call(text: Text) -> Velocity:
        return velocity(dit, params, text, condition=given.condition, image=given.image, first=given.first)

    return begin_with(given.first, run_sampler(sampler, _bound(call, given, sampler), noise))


def host_loop(advance: Callable[[Latents], object]) -> Callable:
    """`jax.lax.scan` as a loop of the host; after every step `advance` is called on the state: the carry, or its first
    part."""

    def loop(step: Callable, carry: Any, inputs: Any) -> tuple[Any, None]:
        for i in range(len(jax.tree.leaves(inputs)[0])):
            carry, _ = step(carry, jax.tree.map(lambda x, i=i: x[i], inputs))
            advance(jax.block_until_ready(jax.tree.leaves(carry)[0]))
        return carry, None

    return loop


def _step_by_step(
    experts: Experts, sampler: SamplerConfig, given: Conditions, noise: Array, advance: Callable[[Latents], object]
) -> Latents:  # fmt: skip
    def call(text: Text) -> Velocity:  # for numbers t, not for inside jit
        return lambda x, t: one_pass(
            experts.dit, experts.params(float(t[0])), text, x, t, given.condition, given.image, given.first
        )  # fmt: skip

    loop = host_loop(lambda latents: advance(begin_with(given.first, latents)))
    return begin_with(given.first, run_sampler(sampler, _bound(call, given, sampler), noise, loop))


def sample_batches(
    experts: Experts,
    given: Conditions,
    indices: Sequence[int],
    *,
    latent_shape: tuple[int, int, int],
    sampler: SamplerConfig,
    seed: int,
    noise_pattern: ChunkPattern | None,
    batch_size: int,
    small: bool,
    watch: Watch,
) -> Iterator[Float[np.ndarray, "b T H W C"]]:
    """Latents of as many videos as there are texts, in order; the noise of video v comes from (seed, indices[v]) alone.

    noise_pattern: to draw it as a causal network of these chunks does. small: whether all steps are one program; they
    are not where every step is watched.
    """
    count, sharding, whole = len(given.text), batch_sharding(experts.mesh), small and watch.on_step is None
    shape = (sampler.noises, *latent_shape, experts.dit.config.out_channels)
    draw = draw_noise if noise_pattern is None else functools.partial(noise_by_chunks, pattern=noise_pattern)
    batches = batch_rows(count, batch_size)
    total, unit, delay = (len(batches), "batch", 0) if whole else (len(batches) * sampler.num_steps, "step", 2)
    with Progress(watch.progress, total, unit, limit=watch.time_limit, delay=delay) as progress:
        for rows in batches:

            def put(x: np.ndarray | None, rows=rows) -> Array | None:
                if x is None:
                    return None
                return jax.device_put(x[rows] if len(x) == count else np.repeat(x, batch_size, axis=0), sharding)

            def advance(latents: Latents, real=count - rows[0]) -> None:
                progress.update()
                watch.step(latents[:real], progress.done, total)

            batch = Conditions(*map(put, given))
            noise = jax.device_put(draw(seed, np.asarray(indices)[rows], shape), sharding)
            if whole:
                latents = on_host(all_steps(experts.dit, sampler, experts.params(), batch, noise))
                progress.update()
            else:
                latents = on_host(_step_by_step(experts, sampler, batch, noise, advance))
            yield latents[: count - rows[0]]


def read_conditions(
    opened: Opened, request: Request, sampler: SamplerConfig, features: Features | None = None
) -> Conditions:  # fmt: skip
    """Text and image of a request, each network in memory alone. features: those of its prompts where they are known.
    Raises ArgumentError for what does not fit the device before anything is computed."""
    world = opened.world
    opened.experts.keep_all = both_fit(opened, request)
    text, null_text = features or request.features(world, guided=sampler.guided)
    condition, image, first = None, None, None
    if request.image is not None and opened.info.model.image_first:
        first = world.first_latent(request.image, request.size)
        world.release()
    elif request.image is not None:
        condition, image = world.condition(request.image, request.size, request.num_frames)
    return Conditions(text, null_text, condition, image, first)


def sample_request(
    opened: Opened, request: Request, sampler: SamplerConfig, given: Conditions, watch: Watch
) -> Iterator[Float[np.ndarray, "b T H W C"]]:  # fmt: skip
    """`sample_batches` of a request whose conditions are read."""
    with jax.set_mesh(opened.experts.mesh):
        yield from sample_batches(
            opened.experts, given, request.indices, latent_shape=request.latent_shape, sampler=sampler,
            seed=request.seed, noise_pattern=request.noise_pattern, batch_size=request.batch_size,
            small=opened.world.small, watch=watch,
        )  # fmt: skip


def both_fit(opened: Opened, request: Request) -> bool:
    """Whether Wan2.2's two experts may stay in memory. Raises ArgumentError where the request does not fit at all, or
    its batches cannot be shared by the devices."""
    options, limit, batch_size = opened.options, device_limit(), request.batch_size
    if batch_size % options.fsdp:
        raise ArgumentError("{batch_size} must be a multiple of {fsdp}", batch_size=batch_size, fsdp=options.fsdp)
    if opened.world.small:
        return True
    job = Job(
        opened.files, request.size, request.num_frames, opened.experts.dtype, batch_size=batch_size, fsdp=options.fsdp,
        sequence=options.sequence, tiled=options.vae_tiling, decoder_dtype=opened.world.painter.config.dtype,
    )  # fmt: skip
    check_memory(job, limit)
    return limit is not None and network_bytes(job, loaded=2) <= limit
