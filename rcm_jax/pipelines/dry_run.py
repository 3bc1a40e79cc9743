"""What sampling takes of GPUs that are not here: the programs of a call, compiled for them, nothing read but headers.

    pipe = load("Wan2.1-T2V-1.3B/rcm.safetensors", devices=absent("h100", 1))
    for report in dry_run(pipe, "h100", num_frames=77): print(report.text())

Texts go through the text encoder layer by layer, and image encoders come and go before the network does: what is
reported is the network and the decoder. Of a bidirectional network one is in memory at a time; a stream holds both.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from rcm_jax.aot.compile import absent, compile_for, no_gpus
from rcm_jax.aot.gpus import Gpu, find_gpu
from rcm_jax.aot.report import Report, gib, report
from rcm_jax.causal.blobs import cache_places
from rcm_jax.chunks import ChunkPattern
from rcm_jax.convert.checkpoint import Checkpoint
from rcm_jax.convert.networks import with_dtype
from rcm_jax.errors import ArgumentError
from rcm_jax.parallel import batch_sharding, make_mesh, state_shardings
from rcm_jax.pipelines.bidirectional import Conditions, all_steps, one_pass
from rcm_jax.pipelines.causal import causal_network
from rcm_jax.pipelines.memory import TILE
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.pipelines.pipeline import Pipeline, load
from rcm_jax.pipelines.request import Prompts, Request, read_request
from rcm_jax.pipelines.settings import sampler_from, schedule_from
from rcm_jax.sampling.stream import open_caches, sample_step
from rcm_jax.types import Params
from rcm_jax.worlds.painted import paint
from rcm_jax.worlds.wan.world import WanWorld, decode_step


def dry_run(pipe: Pipeline, gpu: str | Gpu, prompt: Prompts = None, **options: Any) -> list[Report]:
    """Of the programs that a call with these options would run, on the pipeline's devices: absent ones, see `load`.

    Arguments and errors as of a call; RuntimeError without the compiler's plugin.
    """
    gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    asked = SamplingOptions(**options)
    if asked.stream_batch:
        raise ArgumentError("{dry_run} knows no {stream_batch}: leave that out", dry_run=None, stream_batch=None)
    request = read_request(pipe.opened, prompt, asked)
    network = _chunk if pipe.causal else _video
    reports = [network(pipe, request, asked, gpu)]
    if isinstance(pipe.world, WanWorld):
        reports.append(_decoder(pipe, request, gpu))
    return reports


def page(files: dict[str, Any], gpu: str, prompt: Prompts, options: dict[str, Any]) -> str:
    """What a command says under --dry_run. files: arguments of `load`; options: of a call."""
    no_gpus()
    found = find_gpu(gpu)
    pipe = load(**files, devices=absent(found, files.get("fsdp", 1) * files.get("sequence", 1)))
    return text(dry_run(pipe, found, prompt, **options), pipe.causal)


def text(reports: list[Report], causal: bool) -> str:
    """All reports, and what they come to."""
    whole = max(r.peak for r in reports)
    words = "one video, its network and its decoder one after the other"
    if causal and len(reports) > 1:
        network, decoder = reports
        whole = max(network.peak + decoder.arguments, decoder.peak + network.arguments)
        words = "one chunk of a stream, which holds network, cache and decoder"
    fits = "fits" if whole <= reports[0].room else f"DOES NOT FIT, {gib(reports[0].room)} may be used"
    return "\n\n".join([*(r.text() for r in reports), f"{words}: {gib(whole)} GiB a GPU: {fits}"])


WHOLE = P()


def _shape(mesh: Mesh, shape: tuple[int, ...], dtype: Any = jnp.float32, spec: P = WHOLE) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def abstract_weights(source: Checkpoint, mesh: Mesh, dtype: str) -> Params:
    """Shapes, dtypes and places of a file's weights as `load_params` would load them."""
    flat = with_dtype(source.ours(), dtype, source.network)
    params = unflatten_dict({k: jax.ShapeDtypeStruct(t.shape, t.dtype) for k, t in flat.items()}, sep="/")
    return jax.tree.map(lambda x, s: x.update(sharding=s), params, state_shardings(mesh, params))


def _text_shape(pipe: Pipeline) -> tuple[int, int]:
    return pipe.info.model.text_len, pipe.info.model.text_dim


def _video(pipe: Pipeline, request: Request, asked: SamplingOptions, gpu: Gpu) -> Report:
    """One pass of a large network, as many videos as go together; of a small one all steps."""
    experts, model, sampler = pipe.opened.experts, pipe.info.model, sampler_from(asked, pipe.info)
    mesh, B = experts.mesh, request.batch_size
    shaped = functools.partial(_shape, mesh, spec=batch_sharding(mesh).spec)
    params = abstract_weights(experts.sources[0], mesh, experts.dtype)
    condition = image = first = None
    if model.image_first and request.image is not None:
        first = shaped((B, 1, *request.latent_shape[1:], model.out_channels))
    if model.takes_image:
        condition = shaped((B, *request.latent_shape, model.in_channels - model.out_channels))
        image = None if model.image_dim is None else shaped((B, pipe.opened.files.clip.config.tokens, model.image_dim))
    given = shaped((B, *_text_shape(pipe)))
    with jax.set_mesh(mesh):
        if pipe.world.small:
            noise = shaped((B, sampler.noises, *request.latent_shape, model.out_channels))
            conditions = Conditions(given, given if sampler.guided else None, condition, image, first)
            program = compile_for(all_steps, experts.dit, sampler, params, conditions, noise)
        else:
            x = shaped((B, *request.latent_shape, model.out_channels))
            program = compile_for(one_pass, experts.dit, params, given, x, shaped((B,)), condition, image, first)
    return report("network", program, mesh, gpu)


def _chunk(pipe: Pipeline, request: Request, asked: SamplingOptions, gpu: Gpu) -> Report:
    """A chunk after the first, on its caches."""
    experts, schedule = pipe.opened.experts, schedule_from(asked, pipe.info)
    network, mesh = causal_network(pipe.opened, request, asked, schedule), experts.mesh
    params, B = abstract_weights(experts.sources[0], mesh, experts.dtype), len(request.prompts)
    last = len(network.pattern.spans(request.latent_shape[0])) - 1
    times, noisy = schedule.chunk(last)
    frames = network.pattern.rest if last else network.pattern.first
    noises = _shape(mesh, (len(times), B, frames, *request.latent_shape[1:], pipe.info.model.out_channels))
    given = _shape(mesh, (B, *_text_shape(pipe)))
    null_text = given if schedule.guidance > 1 else None

    with jax.set_mesh(mesh):
        prompts, caches = jax.eval_shape(lambda *x: open_caches(network, *x, schedule), params, given, null_text)
        prompts = jax.tree.map(lambda x: _shape(mesh, x.shape, x.dtype), prompts)
        places = cache_places(mesh, caches)
        caches = jax.tree.map(lambda x, at: _shape(mesh, x.shape, x.dtype, at), caches, places)
        program = compile_for(
            sample_step, network, params, prompts, caches, _shape(mesh, (), jnp.int32), noises, times=times,
            noisy_context=noisy, ode=schedule.ode, guidance=schedule.guidance,
        )  # fmt: skip
    return report("network, a chunk", program, mesh, gpu)


def _decoder(pipe: Pipeline, request: Request, gpu: Gpu) -> Report:
    """A step of the decoder after the first, on one GPU: a latent frame of a video, or a whole chunk."""
    world, mesh = pipe.world, make_mesh(devices=absent(gpu, 1))
    _, H, W = request.latent_shape
    height, width = (min(TILE, H), min(TILE, W)) if world.tiled else (H, W)
    videos, frames = (len(request.prompts), _chunk_frames(pipe)) if pipe.causal else (1, 1)
    files = pipe.opened.files
    with jax.set_mesh(mesh):
        painter = world.painter  # in its dtype for that GPU
    params = {"decoder": abstract_weights(files.tiny or files.vae, mesh, painter.config.dtype)["decoder"]}
    with jax.set_mesh(mesh):
        latents = _shape(mesh, (videos, frames, height, width, painter.config.z_dim))
        state: PyTree = jax.eval_shape(painter.decode_chunk, params, latents)[1]
        state = jax.tree.map(lambda x: _shape(mesh, x.shape, x.dtype), state)
        program = compile_for(decode_step, painter, params, latents, state, finish=paint)
        return report("decoder", program, mesh, gpu)


def _chunk_frames(pipe: Pipeline) -> int:
    return ChunkPattern.parse(pipe.info.causal["pattern"]).rest
