"""Prompts to videos with the published networks: text, image, latents, frames, one network after the other."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from rcm_jax.media.images import open_image, pixels
from rcm_jax.media.pictures import grid
from rcm_jax.media.sizes import adapted_size
from rcm_jax.parallel import sampling_mesh
from rcm_jax.sampling.generate import SamplerConfig
from rcm_jax.sampling.memory import Job, check_memory, device_limit, network_bytes
from rcm_jax.sampling.wan_latents import Experts, sample_wan
from rcm_jax.wan.config import WAN22_BOUNDARY, DiTConfig
from rcm_jax.worlds.wan.files import takes_image
from rcm_jax.worlds.wan.world import WanWorld


@dataclasses.dataclass(frozen=True)
class Request:
    """What to make of the files of `job`.

    model: the DiT's config as it is computed, its dtype and rounding of times. image: (the picture as CLIP sees it, the
    first frame), in [-1, 1], or None. boundary: of Wan2.2's experts, None for the published one.
    """

    job: Job
    model: DiTConfig
    sampler: SamplerConfig
    prompts: Sequence[str]
    num_samples: int = 1
    seed: int = 0
    negative_prompt: str = ""
    image: tuple[np.ndarray, np.ndarray] | None = None
    boundary: float | None = None

    def __post_init__(self):
        wanted = takes_image(self.model)
        if wanted != (self.image is not None):
            says = "it makes videos from an image: give --image_path" if wanted else "it takes no image: --image_path"
            raise ValueError(f"{self.job.files.dit[0].path} has {self.model.in_channels} input channels; {says}")


def first_frame(
    path: str | Path, size: tuple[int, int], *, adaptive: bool, step: int
) -> tuple[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """The size of the video and the `Request.image` of an image file; `adaptive` keeps its proportions."""
    image = open_image(path)
    size = adapted_size(image.size, size[0] * size[1], step) if adaptive else size
    return size, (pixels(image), pixels(image, size))


def make_videos(request: Request) -> Iterator[UInt8[np.ndarray, "F H w 3"]]:
    """One video for each prompt, its samples side by side. Sample i depends on its prompt, the seed and i alone.

    Raises ValueError for what is not possible here before anything is computed.
    """
    job, guided = request.job, request.sampler.name != "few_step" and request.sampler.guidance > 1
    mesh = sampling_mesh(job.fsdp, job.sequence, request.model.num_heads)
    limit = device_limit()
    check_memory(job, limit)
    return _videos(request, mesh, guided, keep_all=limit is not None and network_bytes(job, loaded=2) <= limit)


def _videos(request: Request, mesh: Mesh, guided: bool, keep_all: bool) -> Iterator[np.ndarray]:
    job = request.job
    world = WanWorld(job.files, negative_prompt=request.negative_prompt, dtype=job.dtype, tiled=job.tiled)
    world.encode_text([*request.prompts, *([request.negative_prompt] if guided else [])])  # the file is read once
    condition, tokens = world.encode_image(*request.image, job.num_frames) if request.image else (None, None)
    boundary = WAN22_BOUNDARY["i2v" if request.image else "t2v"] if request.boundary is None else request.boundary
    experts = Experts(
        job.files.dit, request.model, mesh, dtype=job.dtype, boundary=boundary, keep_all=keep_all
    )  # fmt: skip
    with jax.set_mesh(mesh):
        latents = sample_wan(
            experts,
            world.encode_text([prompt for prompt in request.prompts for _ in range(request.num_samples)]),
            world.null_text if guided else None,
            list(range(request.num_samples)) * len(request.prompts),
            latent_shape=job.latent_shape, sampler=request.sampler, seed=request.seed, condition=condition,
            image=tokens, batch_size=job.batch_size,
        )  # fmt: skip
    del experts
    for samples in latents.reshape(len(request.prompts), request.num_samples, *latents.shape[1:]):
        yield grid(np.stack([world.decode_uint8(sample) for sample in samples])[None], gap=0)
