"""Networks of a few hundred kilobytes in the forms that their files have."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from rcm_jax.convert.dit import to_wan
from rcm_jax.convert.tensors import Tensor
from rcm_jax.convert.torch_io import write_torch
from rcm_jax.wan.config import DiTConfig
from rcm_jax.wan.networks import abstract_params

T2V = DiTConfig(
    dim=48, ffn_dim=64, num_heads=4, num_layers=3, in_channels=4, out_channels=4, freq_dim=16, text_dim=20,
    dtype="bfloat16",
)  # fmt: skip
HEADS = ["--num_heads", "4"]


def random_params(config: DiTConfig, seed: int = 0) -> dict:
    """Parameters without a zero: an exchange of two tensors shows."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(config))


def wan_arrays(config: DiTConfig = T2V, seed: int = 0) -> dict[str, np.ndarray]:
    return to_wan(random_params(config, seed), config)


def save(path: Path, arrays: dict[str, np.ndarray], prefix: str = "", config: dict | None = None) -> Path:
    """A .safetensors or PyTorch file of the arrays, with a config.json beside it where one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {prefix + name: np.asarray(array, order="C") for name, array in arrays.items()}
    if path.suffix == ".safetensors":
        save_file(named, path)
    else:
        write_torch(path, {name: Tensor.of(array) for name, array in named.items()}, lambda _: None)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path
