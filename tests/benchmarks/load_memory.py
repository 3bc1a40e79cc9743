"""Host memory of a run's start: 1.3B networks from a file, sharded over eight devices, which here are the host's too.

    python -m tests.benchmarks.load_memory --layers 30 --losses consistency
    python -m tests.benchmarks.load_memory --layers 6

The file is of the published layout, in bfloat16 with random bits, written to --folder and removed again. What is
printed beside the state's own bytes is what loading took on the way: on eight GPUs that alone would be the host's.
"""

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import ml_dtypes
import numpy as np

from rcm_jax.convert.networks import MODELS
from rcm_jax.convert.table import lazy_to_theirs
from rcm_jax.convert.tensors import Tensor
from rcm_jax.data.config import DataConfig
from rcm_jax.objectives.config import MethodConfig
from rcm_jax.parallel import make_mesh
from rcm_jax.tensor_stream import write_safetensors
from rcm_jax.training.config import RunConfig
from rcm_jax.training.runs import WeightFiles
from rcm_jax.training.state import first_state
from rcm_jax.wan.config import WAN_1_3B, DiTConfig

LOSSES = {"both": {}, "consistency": {"dmd_scale": 0.0}, "distribution": {"consistency": "", "tangent_warmup": 0}}


def kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))


def write_random(path: Path, config: DiTConfig) -> None:
    """A file in Wan2.1's names, a tensor in memory at a time."""
    network, rng = MODELS["t2v-1.3B"][0], np.random.default_rng(0)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    flat = {name: Tensor(shape, bfloat16, None) for name, shape in network.shapes(config).items()}
    wan = lazy_to_theirs(network.table.rows(config), flat, config.num_layers, network.table.layouts(config))

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) / 32).astype(bfloat16)

    tensors = {name: Tensor(t.shape, bfloat16, lambda t=t: draw(t.shape)) for name, t in wan.items()}
    write_safetensors(path, tensors, {}, lambda _: None)


def size(tree) -> float:
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e9


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=6, help="of the network's 30")
    p.add_argument("--losses", choices=LOSSES, default="both")
    p.add_argument("--folder", help="where the file goes")
    args = p.parse_args()
    model = dataclasses.replace(WAN_1_3B, num_layers=args.layers)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = Path(folder) / "wan.safetensors"
        write_random(file, model)
        config = RunConfig(
            model=model, teacher=str(file), method=MethodConfig(**LOSSES[args.losses]),
            data=DataConfig("shards", batch_size=8, latent_shape=(20, 60, 104)),
        )  # fmt: skip
        mesh = make_mesh(1, 8, 1)
        before = kilobytes("VmRSS:")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        with jax.set_mesh(mesh):
            weights = WeightFiles(config)
            state = jax.block_until_ready(first_state(config, weights, mesh))
            started = kilobytes("VmHWM:") - before
            networks = jax.block_until_ready(weights.networks(config, mesh))
        peak = (kilobytes("VmHWM:") - before) * 1024 / 1e9
        own = size(state) + size(networks)
        print(
            f"{args.layers} layers, {args.losses}: state {size(state):.2f} GB, teacher {size(networks):.2f} GB; "
            f"peak {peak:.2f} GB ({started * 1024 / 1e9:.2f} with the state), {peak - own:.2f} GB beyond what stays"
        )


if __name__ == "__main__":
    main()
