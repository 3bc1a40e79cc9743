"""The tiny decoder beside the full one on a CPU, at published sizes with random weights: seconds and memory.

    python -m tests.benchmarks.tiny_decoder --size 15 26 --frames 3

A step is one latent frame after the first. Seconds are of `decode` of so many latent frames, in turn. Memory is the
compiler's, of a step: what it holds for a while, and beside it weights, state and frames.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rcm_jax.wan.config import TAEW2_1, WAN_VAE
from rcm_jax.wan.networks import abstract_network
from rcm_jax.wan.tiny_vae import TinyVAE
from rcm_jax.wan.vae import VAE
from tests.benchmarks import machine, ratio, spread, time_in_turn, write_json

MIB = 2**20


def random_weights(config: object) -> PyTree:
    """Of the decoder, as large as keeps activations about 1."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(numbers * max(1, np.prod(leaf.shape[:-1])) ** -0.5)

    return {"decoder": jax.tree.map(draw, abstract_network(config)["decoder"])}


def step_memory(network: VAE | TinyVAE, params: PyTree, latents: jax.Array) -> dict[str, float]:
    """MiB of the compiled step, its state donated."""
    first = latents[:, :1]
    state = jax.eval_shape(network.decode_chunk, params, first)[1]
    step = jax.jit(network.decode_chunk, donate_argnums=2).lower(params, first, state).compile()
    found = step.memory_analysis()
    whole = found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes
    whole -= found.alias_size_in_bytes
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    return {
        "temporary": found.temp_size_in_bytes / MIB, "weights": weights / MIB, "peak": whole / MIB,
        "gflop": step.cost_analysis()["flops"] / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(15, 26), help="latent rows and columns")
    parser.add_argument("--frames", type=int, default=3, help="latent frames")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()

    latents = jnp.asarray(np.random.default_rng(1).standard_normal((1, args.frames, *args.size, 16), np.float32))
    calls, memory = {}, {}
    for name, kind, config in (("full", VAE, WAN_VAE), ("tiny", TinyVAE, TAEW2_1)):
        network = kind(type(config)(dtype=args.dtype))
        params = jax.tree.map(lambda x: x.astype(args.dtype), random_weights(config))
        memory[name] = step_memory(network, params, latents)
        calls[name] = lambda network=network, params=params: jax.block_until_ready(network.decode(params, latents))
        start = time.perf_counter()
        calls[name]()
        print(f"{name}: first call, with compilation, {time.perf_counter() - start:.1f} s", flush=True)
    seconds = time_in_turn(calls, args.rounds, 1)

    print(
        f"{'decoder':8s} {'s':>8s} {'GFLOP a step':>13s} {'temporary MiB':>14s} {'weights MiB':>12s} {'peak MiB':>9s}"
    )
    for name, m in memory.items():
        row = f"{m['gflop']:13.1f} {m['temporary']:14.1f} {m['weights']:12.1f} {m['peak']:9.1f}"
        print(f"{name:8s} {np.median(seconds[name]):8.3f} {row}")
    faster = ratio(seconds["full"], seconds["tiny"])
    less = {k: memory["full"][k] / memory["tiny"][k] for k in memory["full"]}
    print(f"full/tiny: time {spread(faster)}, " + ", ".join(f"{k} {v:.1f}" for k, v in less.items()))
    about = {"size": args.size, "frames": args.frames, "dtype": args.dtype, "seconds": seconds, "memory": memory}
    write_json(args.json, machine("jax", "jaxlib") | about)
    print(machine("jax", "jaxlib"))


if __name__ == "__main__":
    main()
