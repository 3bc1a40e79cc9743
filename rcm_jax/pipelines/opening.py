"""What a file is: its network, its world, how it is sampled, what surrounds it. Decided here, for all commands."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax

from rcm_jax.chunks import ChunkPattern
from rcm_jax.convert.checkpoint import Checkpoint, info_of, open_checkpoint
from rcm_jax.convert.merge import add_loras, given_lora
from rcm_jax.errors import ArgumentError
from rcm_jax.hub import Published, find
from rcm_jax.model_file import ModelInfo
from rcm_jax.options import refuse
from rcm_jax.parallel import sampling_mesh
from rcm_jax.pipelines.kinds import BIDIRECTIONAL, WAN
from rcm_jax.pipelines.memory import check_weights, device_limit
from rcm_jax.pipelines.networks import Experts
from rcm_jax.pipelines.options import FileOptions
from rcm_jax.wan.config import WAN22_BOUNDARY
from rcm_jax.worlds.builtin import find_model
from rcm_jax.worlds.toy.world import ToyWorld
from rcm_jax.worlds.wan.files import WanFiles, open_files
from rcm_jax.worlds.wan.world import WanWorld
from rcm_jax.worlds.world import World

# published, for files that do not say they are causal: 81 frames of 832 x 480
PUBLISHED_CAUSAL = {"sigma_max": 1600.0, "guidance": 3.0, "latent_shape": (21, 60, 104)}


class Opened(NamedTuple):
    """A network and what is beside it, read but for the weights. files: of Wan's worlds."""

    options: FileOptions
    info: ModelInfo
    world: World
    experts: Experts
    files: WanFiles | None = None


class Surroundings(NamedTuple):
    """What is around a network that is in memory. files: of Wan's worlds."""

    world: World
    files: WanFiles | None = None


def open_pipeline(options: FileOptions, devices: Sequence[jax.Device] | None = None) -> Opened:
    """Raises FileNotFoundError, ArgumentError for options that do not apply, and ValueError for files that are not what
    they should be or do not go together."""
    path = find_model(options.dit_path, "dit_path")
    if not path.exists():
        raise FileNotFoundError(f"no model file at {path}")
    network = _with_loras(open_checkpoint(path, num_heads=options.num_heads), options, "lora")
    return (_open_toy if network.info and network.info.world == "toy" else _open_wan)(options, network, devices)


def _with_loras(network: Checkpoint, options: FileOptions, argument: str) -> Checkpoint:
    """With the LoRA files of that argument in it, once it is read; nothing is written."""
    given = [given_lora(text, argument) for text in getattr(options, argument) or ()]
    return add_loras(network, given, skip=options.lora_skip)


def _open_toy(options: FileOptions, network: Checkpoint, devices: Sequence[jax.Device] | None) -> Opened:
    refuse(options, WAN, f"{network.path} is of the built-in world")
    network.ours()  # its errors
    info = _with_chunks(info_of(network, options), options)
    return Opened(options, info, ToyWorld(), _experts([network], info, options, "float32", devices, boundary=0.0))


def _open_wan(options: FileOptions, network: Checkpoint, devices: Sequence[jax.Device] | None) -> Opened:
    if options.boundary is not None and options.second_dit_path is None:
        raise ArgumentError(
            "{boundary} is where Wan2.2's two networks change: give {second_dit_path} too", boundary=options.boundary,
            second_dit_path=None,
        )  # fmt: skip
    second = []
    if options.second_dit_path is not None:
        second = open_checkpoint(find(options.second_dit_path, "second_dit_path"))
        second = [_with_loras(second, options, "second_lora")]
    dtype = options.dtype or "bfloat16"
    if any(isinstance(one.path, Published) for one in (network, *second)):
        check_weights(network.config, device_limit(), dtype=dtype, fsdp=options.fsdp, sequence=options.sequence)
    files = open_files(
        [network, *second], vae=options.vae_path, text=options.text_encoder_path, tokenizer=options.tokenizer_path,
        clip=options.image_encoder_path, tiny=options.tiny_vae_path, decoder=options.decoder,
        model_size=options.model_size,
    )  # fmt: skip
    info = _with_chunks(info_of(network, options), options)
    if info.causal:
        refuse(options, BIDIRECTIONAL, f"{network.path} is sampled as a causal network")
        if info.model.takes_image:
            raise ValueError(
                f"{network.path} takes an image in its channels; a causal network takes it as its first chunk"
            )
    boundary = _boundary(options, files.dit)
    info = dataclasses.replace(info, model=dataclasses.replace(info.model, dtype=dtype))
    world = WanWorld(files, dtype=dtype, vae_dtype=options.vae_dtype, tiled=options.vae_tiling)
    return Opened(options, info, world, _experts(files.dit, info, options, dtype, devices, boundary), files)


def _experts(
    sources: Sequence[Checkpoint], info: ModelInfo, options: FileOptions, dtype: str,
    devices: Sequence[jax.Device] | None, boundary: float,
) -> Experts:  # fmt: skip
    mesh = sampling_mesh(options.fsdp, options.sequence, info.model.num_heads, devices)
    return Experts(sources, info.model, mesh, dtype=dtype, boundary=boundary)


def _boundary(options: FileOptions, networks: Sequence[Checkpoint]) -> float:
    """Where two experts change: as asked, as their files say, or as published. Raises ArgumentError for files that say
    they do not go together so, or not alone."""
    names = ("dit_path", "second_dit_path")
    own = {name: one.info for name, one in zip(names, networks, strict=False) if one.info is not None}
    if options.kind is None and len({info.kind for info in own.values()}) > 1:
        kinds = " and a ".join(info.kind for info in own.values())
        raise ArgumentError(
            f"{{dit_path}} and {{second_dit_path}} are a {kinds}, which are sampled in other ways",
            **{name: getattr(options, name) for name in names},
        )
    ranges = {name: info.t_range for name, info in own.items() if info.t_range != (0.0, 1.0)}
    for name, (low, high) in ranges.items():
        if len(networks) == 1 or (high < 1 if name == "dit_path" else low > 0):
            where = ", as {second_dit_path}" * (name == "dit_path")
            raise ArgumentError(
                f"{{{name}}} was trained for times from {low:g} to {high:g}: two experts are needed, that for the "
                f"noisier times first, the other second{where}",
                **dict.fromkeys(names) | {name: getattr(options, name)},
            )  # fmt: skip
    ends = {low if name == "dit_path" else high for name, (low, high) in ranges.items()}
    if options.boundary is not None:
        return options.boundary
    if len(ends) > 1:
        low, high = sorted(ends)
        raise ArgumentError(
            f"{{dit_path}} and {{second_dit_path}} were trained for times that end at {low:g} and {high:g}: "
            "{boundary} chooses", **dict.fromkeys((*names, "boundary")),
        )  # fmt: skip
    return next(iter(ends), WAN22_BOUNDARY["i2v" if networks[0].config.takes_image else "t2v"])


def unknown_chunks() -> ArgumentError:
    """Of a network that is asked for chunks and has none."""
    arguments = {"first_chunk_t": None, "chunk_t": None}
    return ArgumentError("the file does not say its chunk pattern: give {first_chunk_t} and {chunk_t}", **arguments)


def _with_chunks(info: ModelInfo, options: FileOptions) -> ModelInfo:
    """The chunk pattern that is asked for. A file that does not say it is causal becomes so, as it is published."""
    if options.first_chunk_t is None and options.chunk_t is None:
        return info
    if not info.causal:
        if None in (options.first_chunk_t, options.chunk_t):
            raise unknown_chunks()
        info = dataclasses.replace(info, **PUBLISHED_CAUSAL)
    own = ChunkPattern.parse(info.causal.get("pattern", "c1-1"))
    pattern = ChunkPattern(
        own.first if options.first_chunk_t is None else options.first_chunk_t,
        own.rest if options.chunk_t is None else options.chunk_t,
    )
    return dataclasses.replace(info, causal=info.causal | {"pattern": str(pattern)})
