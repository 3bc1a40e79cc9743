"""Whole runs from a config: opens data and teacher, trains, leaves the weights; or plans one without allocating."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rcm_jax.data.source import make_source
from rcm_jax.model_file import ModelInfo, load_model, save_model
from rcm_jax.parallel import abstract_mesh, bytes_per_device
from rcm_jax.training.abstract import abstract_networks
from rcm_jax.training.config import RunConfig
from rcm_jax.training.loop import train
from rcm_jax.training.state import TrainState, Weights, abstract_state
from rcm_jax.types import Params
from rcm_jax.worlds.builtin import find_model

OnSamples = Callable[[int, Params, ModelInfo, Path], None]
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


def train_recipe(
    config: RunConfig, workdir: str | Path, *, on_samples: OnSamples | None = None, resume: str | int = "auto",
    progress: str = "train",
) -> Path:  # fmt: skip
    """Trains to the end and writes the averaged weights to `workdir`; returns their path.

    on_samples: called as (step, averaged weights, what they are, workdir) every `config.sample_every` steps.
    Raises ValueError for a teacher whose shapes do not fit the config (listing what differs), and what `train` raises.
    """
    files = {"teacher": config.teacher, "init": config.init, "score_teacher": config.score_teacher}
    found = {name: find_model(file, f"config.{name}") for name, file in files.items() if file}
    own, teacher, score = config.models
    models = {"teacher": teacher, "init": own, "score_teacher": score}
    weights = Weights(**{name: load_model(path, expect=models[name])[0] for name, path in found.items()})
    source = make_source(config.data, config.seed)
    info, workdir = model_info(config), Path(workdir)

    def sampled(step: int, state: TrainState) -> None:
        if on_samples is not None:
            on_samples(step, state.ema, info, workdir)

    state = train(
        config, source, workdir, weights=weights, on_samples=sampled, resume=resume,
        about={"model": info.to_json()}, progress=progress,
    )  # fmt: skip
    return save_model(workdir / f"{info.kind}.safetensors", jax.device_get(state.ema), info)


def plan(config: RunConfig, devices: int = 0) -> str:
    """Parameters, state and bytes per device of a run on `devices` devices (0: those here), nothing allocated."""
    devices = devices or jax.device_count()
    mesh = abstract_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence, devices)
    state, networks = abstract_state(config), abstract_networks(config)
    parts = {
        "student": state.student, "ema": state.ema, "student optimiser": state.student_opt,
        "fake score": state.fake_score, "fake optimiser": state.fake_opt,
        "teacher": networks.teacher, "score teacher": networks.score_teacher,
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
