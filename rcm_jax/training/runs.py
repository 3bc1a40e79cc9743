"""Whole runs from a config: opens data and teacher, trains, leaves the weights; or plans one without allocating."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from rcm_jax.data.source import make_source
from rcm_jax.kernels.attention import attention
from rcm_jax.media.pictures import enlarge, grid, to_uint8
from rcm_jax.media.video import write_video
from rcm_jax.model_file import ModelInfo, load_model, save_model
from rcm_jax.objectives.config import CausalConfig
from rcm_jax.parallel import abstract_mesh, bytes_per_device
from rcm_jax.sampling.generate import SamplerConfig, generate
from rcm_jax.sampling.generate_causal import generate_causal
from rcm_jax.sampling.schedules import MIDDLE, RolloutSchedule, few_step_schedule, ode_schedule
from rcm_jax.training.config import RunConfig
from rcm_jax.training.loop import train
from rcm_jax.training.state import TrainState, Weights, abstract_state
from rcm_jax.wan.causal import CausalDiT
from rcm_jax.wan.dit import DiT
from rcm_jax.worlds.builtin import find_model
from rcm_jax.worlds.world import open_world

PREVIEW_PROMPTS = ("a red circle moving left", "a blue square moving up", "a green diamond moving right")
CAUSAL_FIELDS = ("pattern", "window", "sink", "steps_per_chunk", "middle", "noisy_context_from")


def model_info(config: RunConfig, note: str = "") -> ModelInfo:
    """What the run's weights need to be sampled from."""
    kind = "teacher" if config.method.name == "diffusion" else "student"
    causal = {name: getattr(config.causal, name) for name in CAUSAL_FIELDS} if config.causal.pattern else {}
    return ModelInfo(
        model=config.model, kind=kind, world=config.data.name, latent_shape=config.data.latent_shape,
        sigma_max=config.sigma_max, guidance=config.method.guidance, note=note,
        causal=json.loads(json.dumps(causal)),  # as it will be read
    )  # fmt: skip


def sampler_for(info: ModelInfo) -> SamplerConfig:
    """How a model file's network is sampled unless the user says otherwise. Raises ValueError for a causal one."""
    if info.causal:
        raise ValueError(f"the network is causal ({info.causal['pattern']}): use python -m rcm_jax.sample_causal")
    if info.kind == "student":
        return SamplerConfig("few_step", 4, sigma_max=info.sigma_max)
    return SamplerConfig("unipc", 50, guidance=info.guidance)


def causal_network(info: ModelInfo, attend: Callable = attention) -> CausalDiT:
    """The network of a causal model file; `attend` as in `DiT`."""
    return CausalConfig(**info.causal).network(DiT(info.model, attend), info.latent_shape)


def causal_schedule(
    info: ModelInfo, num_steps: int | None = None, middle: Sequence[float] | None = None
) -> RolloutSchedule:
    """How a causal model file's network is sampled: a teacher in 50 Euler steps with guidance, a student as it was
    trained. Another `num_steps` is for all chunks alike, between `middle`, a student's published times unless given."""
    causal = CausalConfig(**info.causal)
    if info.kind != "student":
        return ode_schedule(num_steps or 50, guidance=info.guidance, sigma_max=info.sigma_max)
    own, own_steps = causal.schedule(info.sigma_max), causal.steps_per_chunk[-1]
    if middle is None and num_steps in (None, own_steps):
        return own
    steps, middle = own_steps if num_steps is None else num_steps, MIDDLE if middle is None else middle
    return dataclasses.replace(own, times=few_step_schedule([steps], middle=middle, sigma_max=info.sigma_max).times)


def train_recipe(config: RunConfig, workdir: str | Path, *, progress: str = "train") -> Path:
    """Trains to the end and writes the averaged weights to `workdir`; returns their path.

    Raises ValueError for a teacher whose shapes do not fit the config (listing what differs), and what `train` raises.
    """
    files = {"teacher": config.teacher, "init": config.init, "score_teacher": config.score_teacher}
    weights = Weights(
        **{name: load_model(find_model(file), expect=config.model)[0] for name, file in files.items() if file}
    )
    source = make_source(config.data, config.seed)
    info = model_info(config)
    world = open_world(info.world)
    workdir = Path(workdir)

    def preview(step: int, state: TrainState) -> None:
        if info.causal:
            videos = generate_causal(
                state.ema, causal_network(info), world, PREVIEW_PROMPTS, schedule=causal_schedule(info),
                seed=config.seed,
            )  # fmt: skip
        else:
            videos = generate(
                state.ema, config.model, world, PREVIEW_PROMPTS, latent_shape=config.data.latent_shape,
                sampler=sampler_for(info), seed=config.seed,
            )  # fmt: skip
        frames = to_uint8(enlarge(grid(videos[None]), 8))
        write_video(workdir / "samples" / f"{step:07d}.mp4", frames, world.fps)

    state = train(config, source, workdir, weights=weights, on_samples=preview, progress=progress)
    return save_model(workdir / f"{info.kind}.safetensors", jax.device_get(state.ema), info)


def plan(config: RunConfig, devices: int = 0) -> str:
    """Parameters, state and bytes per device of a run on `devices` devices (0: those here), nothing allocated."""
    devices = devices or jax.device_count()
    mesh = abstract_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence, devices)
    state = abstract_state(config)
    parts = {
        "student": state.student, "ema": state.ema, "student optimiser": state.student_opt,
        "fake score": state.fake_score, "fake optimiser": state.fake_opt,
        "teacher": state.student if config.teacher else None,
        "score teacher": state.student if config.score_teacher else None,
    }  # fmt: skip
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.student))
    tokens = int(np.prod(config.model.grid(config.data.latent_shape)))
    lines = [
        f"parameters of one network  {count:,}",
        f"tokens of one video        {tokens:,} from latents {config.data.latent_shape}",
        f"mesh                       {' x '.join(f'{k} {n}' for k, n in mesh.shape.items())} = {devices} devices",
        f"batch                      {config.data.batch_size} videos, {config.microbatches} cuts",
        "bytes per device:",
    ]
    sizes = {name: bytes_per_device(mesh, tree) for name, tree in parts.items() if tree is not None}
    lines += [f"  {name:24s} {size / 2**30:9.3f} GiB" for name, size in (sizes | {"all": sum(sizes.values())}).items()]
    return "\n".join(lines)
