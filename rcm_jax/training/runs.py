"""Whole runs from a config: opens data and networks, trains, leaves the weights; or plans one without allocating."""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rcm_jax.convert.checkpoint import Checkpoint, differences, open_checkpoint
from rcm_jax.convert.load import load_params
from rcm_jax.data.source import make_source
from rcm_jax.model_file import ModelInfo, check_fit, save_model
from rcm_jax.objectives.networks import Networks
from rcm_jax.parallel import abstract_mesh, bytes_per_device
from rcm_jax.training.abstract import abstract_networks
from rcm_jax.training.config import RunConfig
from rcm_jax.training.info import fake_info, model_info
from rcm_jax.training.loop import train
from rcm_jax.training.state import TrainState, abstract_state, standing, starts
from rcm_jax.types import Params
from rcm_jax.wan.config import DiTConfig
from rcm_jax.worlds.builtin import find_model

OnSamples = Callable[[int, Params, ModelInfo, Path], None]
FILES = ("teacher", "init", "score_teacher")


class WeightFiles:
    """What a run starts from, in anybody's files, here or on the hub: opened and checked, no number read.

    Raises what opening raises, and ValueError that lists what does not fit the config, each with the setting's name.
    """

    def __init__(self, config: RunConfig):
        own, teacher, score = config.models
        models = {"teacher": teacher, "init": own, "score_teacher": score}
        named = {name: getattr(config, name) for name in FILES}
        self.files = {name: _opened(file, f"config.{name}", models[name]) for name, file in named.items() if file}

    def networks(self, config: RunConfig, mesh: Mesh) -> Networks:
        """Those that stand still and that a loss reads, in `config.teacher_dtype`, or in what each computes in."""
        _, teacher, score = config.models
        computed = {"teacher": teacher.dtype, "score_teacher": score.dtype}
        names = standing(config, score_teacher="score_teacher" in self.files)
        read = {name: self._read(name, mesh, config.teacher_dtype or computed[name]) for name in names}
        return Networks(**read)

    def start(self, config: RunConfig, mesh: Mesh) -> tuple[Params | None, Params | None]:
        """What student and fake score start from, float32."""
        names = starts(config, init="init" in self.files, score_teacher="score_teacher" in self.files)
        return tuple(self._read(name, mesh, "float32") if name in self.files else None for name in names)

    def _read(self, name: str, mesh: Mesh, dtype: str) -> Params:
        return load_params(self.files[name], mesh, dtype=dtype)


def _opened(file: str, setting: str, model: DiTConfig) -> Checkpoint:
    """The network in a file, if it is one of this size. Names, shapes and sizes are read."""
    path = find_model(file, setting)
    if not path.exists():
        raise FileNotFoundError(f"{setting}: no model file at {path}")
    try:
        found = open_checkpoint(path, num_heads=model.num_heads)
        if found.network.name != "dit":
            raise ValueError(f"{path} is a {found.network.title}, not a diffusion transformer")
        found.ours()  # its errors
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    # of a file that is not ours, the length of texts is not known
    differ = [line for line in differences(model, found.config) if found.info or not line.startswith("text_len")]
    if differ:
        sizes = f"{setting}: {path} has {', '.join(differ)}"
        try:
            check_fit(found.network.shapes(found.config), model, path)
        except ValueError as error:
            raise ValueError(f"{sizes}; {error}") from error
        raise ValueError(f"{sizes}: the weights do not fit the config")
    return found


def train_recipe(
    config: RunConfig, workdir: str | Path, *, on_samples: OnSamples | None = None, resume: str | int = "auto",
    profile_steps: range | None = None, progress: str = "train",
) -> Path:  # fmt: skip
    """Trains to the end and writes the averaged weights to `workdir`; returns their path.

    on_samples: called as (step, averaged weights, what they are, workdir) every `config.sample_every` steps; the
    weights lie as the run has them, and every process of the run calls it.
    resume, profile_steps: as `train` has them.
    Raises as `WeightFiles`, before data are opened, and what `train` raises.
    """
    weights = WeightFiles(config)
    around = config.previews
    source = make_source(
        config.data, config.seed, config.model, text_encoder=around.text_encoder, tokenizer=around.tokenizer,
        vae=around.vae,
    )  # fmt: skip
    info, fake, workdir = model_info(config), fake_info(config), Path(workdir)
    about = {"model": info.to_json()} | ({"fake_model": fake.to_json()} if fake else {})

    def sampled(step: int, state: TrainState) -> None:
        if on_samples is not None:
            on_samples(step, state.ema, info, workdir)

    def left(step: int, state: TrainState) -> None:
        """A copy on the way is not worth a run: where it cannot be written, that is said."""
        try:
            save_model(workdir / "weights" / f"{step:07d}" / f"{info.kind}.safetensors", state.ema, info)
        except OSError as error:
            tqdm.write(f"{progress}: no weights of step {step}, and the run goes on: {error}", file=sys.stderr)

    state = train(
        config, source, workdir, weights=weights, on_samples=sampled, on_weights=left, resume=resume,
        profile_steps=profile_steps, about=about, progress=progress,
    )  # fmt: skip
    return save_model(workdir / f"{info.kind}.safetensors", state.ema, info)


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
