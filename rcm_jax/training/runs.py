"""Whole runs from a config: opens data and networks, trains, leaves the weights; or plans one without allocating."""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from tqdm import tqdm

from rcm_jax.convert.checkpoint import Checkpoint, open_checkpoint
from rcm_jax.convert.load import load_params
from rcm_jax.convert.lora import of_parameters, write_lora
from rcm_jax.convert.networks import differences
from rcm_jax.convert.tensors import Tensor
from rcm_jax.data.source import make_source
from rcm_jax.model_file import ModelInfo, check_fit, save_model, written_by_first
from rcm_jax.objectives.networks import Networks
from rcm_jax.parallel import abstract_mesh, bytes_per_device
from rcm_jax.tensor_stream import on_host
from rcm_jax.training.abstract import abstract_networks
from rcm_jax.training.config import RunConfig
from rcm_jax.training.info import fake_info, model_info
from rcm_jax.training.loop import train
from rcm_jax.training.lora import with_base
from rcm_jax.training.state import TrainState, abstract_state, bases, standing, starts
from rcm_jax.types import Params
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.networks import abstract_network
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
        self.read = Networks()  # what `networks` gave last
        self.files = {name: _opened(file, f"config.{name}", models[name]) for name, file in named.items() if file}
        for name, found in self.files.items():
            _check_range(found, f"config.{name}", config.method.t_range)

    def networks(self, config: RunConfig, mesh: Mesh) -> Networks:
        """Those that stand still and that a loss reads or a LoRA is added to: in `config.teacher_dtype`, or in what
        each computes in."""
        own, teacher, score = config.models
        computed = {"teacher": teacher.dtype, "score_teacher": score.dtype, "init": own.dtype}
        names = standing(config, init="init" in self.files, score_teacher="score_teacher" in self.files)
        read = {name: self._read(name, mesh, config.teacher_dtype or computed[name]) for name in names}
        self.read = Networks(**read)
        return self.read

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


def _check_range(found: Checkpoint, setting: str, t_range: tuple[float, float]) -> None:
    """Raises ValueError for one of Wan2.2's experts where the other would be asked."""
    (low, high), (start, end) = found.info.t_range if found.info else (0.0, 1.0), t_range
    if not low <= start < end <= high:
        raise ValueError(
            f"{setting}: {found.path} was trained for times from {low:g} to {high:g}, which are not "
            f"method.t_range={t_range}"
        )


def train_recipe(
    config: RunConfig, workdir: str | Path, *, open_samples: Callable[[RunConfig], OnSamples] | None = None,
    resume: str | int = "auto", profile_steps: range | None = None, progress: str = "train",
) -> Path:  # fmt: skip
    """Trains to the end and writes the averaged weights to `workdir`; returns their path.

    open_samples: makes, when weights and data are open, what is called as (step, averaged weights, what they are,
    workdir) every `config.sample_every` steps. The weights lie as the run has them, and every process calls it.
    resume, profile_steps: as `train` has them.
    Raises as `WeightFiles`, before data are opened, and what `train` raises.
    """
    weights = WeightFiles(config)
    around = config.previews
    source = make_source(
        config.data, config.seed, config.model, text_encoder=around.text_encoder, tokenizer=around.tokenizer,
        vae=around.vae,
    )  # fmt: skip
    on_samples = open_samples(config) if open_samples else None
    info, fake, workdir = model_info(config), fake_info(config), Path(workdir)
    about = {"model": info.to_json()} | ({"fake_model": fake.to_json()} if fake else {})
    about |= {"lora": {"rank": config.lora.rank, "alpha": config.lora.strength}} if config.lora.rank else {}

    def sampled(step: int, state: TrainState) -> None:
        if on_samples is not None:
            on_samples(step, _whole(config, weights.read, state.ema), info, workdir)

    def left(step: int, state: TrainState) -> None:
        """A copy on the way is not worth a run: where it cannot be written, that is said."""
        try:
            _save(workdir / "weights" / f"{step:07d}", state.ema, info, config)
        except OSError as error:
            tqdm.write(f"{progress}: no weights of step {step}, and the run goes on: {error}", file=sys.stderr)

    state = train(
        config, source, workdir, weights=weights, on_samples=sampled, on_weights=left, resume=resume,
        profile_steps=profile_steps, about=about, progress=progress,
    )  # fmt: skip
    return _save(workdir, state.ema, info, config)


def _whole(config: RunConfig, networks: Networks, params: Params) -> Params:
    """A network of what the run learns of it. The base of a LoRA is not copied."""
    return with_base(bases(config, networks)[0], params, config.lora) if config.lora.rank else params


def _save(folder: Path, params: Params, info: ModelInfo, config: RunConfig) -> Path:
    """Our model file, or of a LoRA one as diffusers reads it, which every process holds whole."""
    if not config.lora.rank:
        return save_model(folder / f"{info.kind}.safetensors", params, info)
    path = folder / f"{info.kind}_lora.safetensors"
    flat = {name: Tensor.of(on_host(x)) for name, x in sorted(flatten_dict(params, sep="/").items())}
    lora = of_parameters(flat, config.model, alpha=config.lora.strength, info=info)
    return written_by_first(path, {}, lambda: write_lora(lora, path, overwrite=True))


def plan(config: RunConfig, devices: int = 0) -> str:
    """Parameters, state and bytes per device of a run on `devices` devices (0: those here), nothing allocated."""
    devices = devices or jax.device_count()
    mesh = abstract_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.sequence, devices)
    state, networks = abstract_state(config), abstract_networks(config)
    parts = {
        "student": state.student, "ema": state.ema, "student optimiser": state.student_opt,
        "fake score": state.fake_score, "fake optimiser": state.fake_opt,
        "teacher": networks.teacher, "score teacher": networks.score_teacher, "base": networks.init,
    }  # fmt: skip
    trees = (abstract_network(config.model), state.student)
    whole, learned = (sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree)) for tree in trees)
    tokens = int(np.prod(config.model.grid(config.data.latent_shape)))
    lines = [
        f"parameters of one network  {whole:,}" + f", of its LoRA {learned:,}" * bool(config.lora.rank),
        f"tokens of one video        {tokens:,} from latents {config.data.latent_shape}",
        f"mesh                       {' x '.join(f'{k} {n}' for k, n in mesh.shape.items())} = {devices} devices",
        f"batch                      {config.data.batch_size} videos, {config.microbatches} cuts",
        "bytes per device:",
    ]
    sizes = {name: bytes_per_device(mesh, tree) for name, tree in parts.items() if tree is not None}
    lines += [f"  {name:24s} {size / 2**30:9.3f} GiB" for name, size in (sizes | {"all": sum(sizes.values())}).items()]
    return "\n".join(lines)
