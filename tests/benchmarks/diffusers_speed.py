"""VAE decoding and the DiT forward against diffusers on the same cores: python -m tests.benchmarks.diffusers_speed

Needs `pip install -e '.[parity]'`. The VAE in its published size, the DiT in the 1.3B's width with fewer layers; random
weights, which go through the converter; float32. Both libraries in turn, after a comparison of what they compute.
The DiT has its turn once more with every layer's weights in arrays of their own and the blocks compiled in a row: XLA's
CPU compiler copies a layer's weights out of the stack before it multiplies by them.
Memory is by how much one call raises the process's resident memory at its highest.
"""

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import jax
import numpy as np
import torch

from rcm_jax.convert.checkpoint import open_checkpoint
from rcm_jax.convert.load import load_params
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.vae import VAE
from tests import benchmarks
from tests.benchmarks.cpu_profile import apart, together

LAYERS = 4
TOLERANCE = 1e-3  # sums in another order, through tens of layers


def torch_like(x: np.ndarray) -> torch.Tensor:
    """Channels to the front."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def converted(model: torch.nn.Module):
    """(parameters, config) of a diffusers network, through its own files."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        source = open_checkpoint(Path(folder))
        return jax.device_put(load_params(source)), source.config


def vae(latent: tuple[int, int, int]) -> dict[str, Callable]:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan().eval()
    params, config = converted(model)
    z = np.random.default_rng(0).normal(size=(1, *latent, config.z_dim)).astype(np.float32)
    raw, ours = torch_like(z * np.float32(config.std) + np.float32(config.mean)), VAE(config)

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return np.moveaxis(model.decode(raw).sample.numpy(), 1, -1)

    return {"diffusers": theirs, "rcm_jax": lambda: np.clip(np.asarray(ours.decode(params, z)), -1, 1)}


def dit(latent: tuple[int, int, int]) -> dict[str, Callable]:
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=LAYERS)
    model = diffusers.WanTransformer3DModel(**sizes).eval()
    params, config = converted(model)
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(1, *latent, 16)).astype(np.float32), np.array([40.5], np.float32)
    text = rng.normal(size=(1, 512, 4096)).astype(np.float32)
    config = dataclasses.replace(config, dtype="float32", remat="none")
    network, in_a_row = (DiT(dataclasses.replace(config, unroll=n)) for n in (1, LAYERS))
    layers_apart = apart(params)

    stacked = jax.jit(network.apply)

    @jax.jit
    def written_out(weights, *given):
        return in_a_row.apply({"params": together(*weights)}, *given)

    there = torch_like(x), torch.from_numpy(t), torch.from_numpy(text)

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return np.moveaxis(model(*there, return_dict=False)[0].numpy(), 1, -1)

    return {
        "diffusers": theirs, "rcm_jax": lambda: np.asarray(stacked({"params": params}, x, t, text)),
        "layers apart": lambda: np.asarray(written_out(layers_apart, x, t, text)),
    }  # fmt: skip


CASES = {
    "VAE decode, 9 frames of 128 x 128": (vae, (3, 16, 16)),
    f"DiT forward, {LAYERS} layers of the 1.3B, 5 x 16 x 16 latents": (dit, (5, 16, 16)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="times that each library has its turn")
    parser.add_argument("--calls", type=int, default=2, help="timed calls a turn, of which the median counts")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    args = parser.parse_args()
    where = benchmarks.machine("jax", "jaxlib", "torch", "diffusers")
    torch.set_num_threads(where["cores"])
    print(", ".join(f"{k} {v}" for k, v in where.items()) + ", float32")
    results = []
    for name, (case, latent) in CASES.items():
        functions = case(latent)
        wanted = functions["diffusers"]()
        errors = {side: benchmarks.relative(function(), wanted) for side, function in functions.items()}
        if not max(errors.values()) < TOLERANCE:
            raise AssertionError(f"{name}: they differ from diffusers by {errors}, more than {TOLERANCE}")
        seconds = benchmarks.time_in_turn(functions, args.rounds, args.calls)
        memory = {side: benchmarks.peak_memory(function) for side, function in functions.items()}
        print(f"\n{name}")
        for side, error in errors.items():
            ratio = benchmarks.ratio(seconds[side], seconds["diffusers"])
            print(f"  {side:13s} {1e3 * statistics.median(seconds[side]):8.0f} ms, ratio {benchmarks.spread(ratio)}  "
                  f"{memory[side] / 2**20:6.0f} MiB  differs by {error:.0e}", flush=True)  # fmt: skip
            results.append({"case": name, "side": side, "error": error, "seconds": seconds[side],
                            "memory": memory[side], "ratio": ratio})  # fmt: skip
    benchmarks.write_json(args.json, {"machine": where, "results": results})


if __name__ == "__main__":
    main()
