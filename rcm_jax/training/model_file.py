"""One network in one file: safetensors, our parameter names, and in the metadata all that sampling needs.

The file opens with any safetensors reader; `convert` takes its weights to Wan2.1's names.
"""

import dataclasses
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rcm_jax.training.state import abstract_params
from rcm_jax.types import Params
from rcm_jax.wan.config import DiTConfig

FORMAT = "rcm_jax/1"
BUILTIN_TEACHER = Path(__file__).parents[1] / "data" / "toy_teacher.safetensors"


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a file holds. kind: a `teacher` is sampled as an ODE with guidance, a `student` in one to four steps."""

    model: DiTConfig
    kind: str
    world: str
    latent_shape: tuple[int, int, int]
    sigma_max: float = 80.0
    guidance: float = 5.0
    note: str = ""


def save_model(path: str | Path, params: Params, info: ModelInfo, *, dtype: str = "float32") -> Path:
    """Writes the file under a temporary name and renames it when it is whole. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {"/".join(k): np.asarray(v).astype(dtype) for k, v in flatten_dict(params).items()}
    unfinished = path.with_name(path.name + ".tmp")
    try:
        save_file(flat, unfinished, {"format": FORMAT, "info": json.dumps(dataclasses.asdict(info))})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def read_info(path: str | Path) -> ModelInfo:
    """The metadata alone. Raises FileNotFoundError, or ValueError for a file that is not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by rcm_jax (format {metadata.get('format')!r}, expected {FORMAT!r})")
    values = json.loads(metadata["info"])
    values["model"] = DiTConfig(**values["model"])
    values["latent_shape"] = tuple(values["latent_shape"])
    return ModelInfo(**values)


def load_model(path: str | Path, expect: DiTConfig | None = None) -> tuple[Params, ModelInfo]:
    """Parameters (float32) and info. With `expect`, raises ValueError listing every parameter that does not fit it."""
    info = read_info(path)
    with safe_open(path, "numpy") as file:
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    check_fit(flat, info.model if expect is None else expect, path)
    return unflatten_dict({tuple(k.split("/")): jnp.asarray(v, jnp.float32) for k, v in flat.items()}), info


def check_fit(flat: dict[str, np.ndarray], config: DiTConfig, source: str | Path) -> None:
    """Raises ValueError that lists each missing, extra and differently shaped parameter."""
    wanted = {"/".join(k): v.shape for k, v in flatten_dict(abstract_params(config)).items()}
    problems = [f"{k}: missing, the config has {wanted[k]}" for k in sorted(set(wanted) - set(flat))]
    problems += [f"{k}: {flat[k].shape} in the file, not in the config" for k in sorted(set(flat) - set(wanted))]
    problems += [
        f"{k}: {flat[k].shape} in the file, {wanted[k]} in the config"
        for k in sorted(set(flat) & set(wanted))
        if tuple(flat[k].shape) != tuple(wanted[k])
    ]
    if problems:
        raise ValueError(f"the weights in {source} do not fit the config:\n  " + "\n  ".join(problems))


def find_model(name: str | Path) -> Path:
    """`toy` is the built-in world's teacher, which comes with the package; anything else is a path."""
    return BUILTIN_TEACHER if str(name) == "toy" else Path(name)
