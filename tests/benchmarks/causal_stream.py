"""Streaming at full size on random weights: python -m tests.benchmarks.causal_stream  (on a GPU)

Wan2.1's 1.3B as a causal network, bfloat16, batch 1, 81 frames of 832 x 480, under the published step presets. For each
pattern and preset, in a process of its own: the time to the first decoded frame, the steady rate with and without the
video decoder, and peak memory. Included: the prompt's keys, the network, the decoder, the copy of the frames to the
host. Not: loading, text encoder, compilation (a run before), the MP4.

Without a GPU, --num_layers 2 --size 96x64 --num_frames 9 shows that it runs; its numbers say nothing.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rcm_jax.sampling.generate_causal import video_noises

from rcm_jax.configs import wan_1_3b_causal_sf_dmd as recipe
from rcm_jax.configs.base import run_config
from rcm_jax.convert.networks import NETWORKS
from rcm_jax.media.sizes import latent_shape
from rcm_jax.parallel import leaf_path
from rcm_jax.sampling.stream import Profile, profile, stream
from rcm_jax.wan.config import WAN_VAE
from rcm_jax.wan.dit import DiT
from rcm_jax.wan.networks import abstract_network
from rcm_jax.wan.vae import VAE
from tests import benchmarks

ROW = "{:8s} {:16s} {:>12s} {:>12s} {:>14s} {:>14s} {:>10s}"


def random_weights(config, name: str):
    """Small enough for activations to stay finite; what a converted file keeps in float32 is float32."""
    exact = next(n.full_precision for n in NETWORKS if n.name == name)

    def leaf(path, x):
        path = leaf_path(path)
        dtype = "float32" if exact.search(path) else config.dtype
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(path.encode()))
        return (0.02 * jax.random.normal(key, x.shape) + path.endswith("scale")).astype(dtype)

    return jax.jit(lambda: jax.tree_util.tree_map_with_path(leaf, abstract_network(config)))()


def measure(args: argparse.Namespace, pattern: str, preset: str) -> dict:
    config = run_config(recipe.get_config(f"{pattern},{preset}"))
    model = dataclasses.replace(
        config.model, dtype="bfloat16", remat="none", num_layers=args.num_layers or config.model.num_layers
    )
    vae = VAE(dataclasses.replace(WAN_VAE, dtype=args.vae_dtype))
    size = tuple(map(int, args.size.split("x")))
    shape = latent_shape(size, args.num_frames, space=WAN_VAE.space, time=WAN_VAE.time, patch=model.patch_size[1])
    network, schedule = config.causal.network(DiT(model), shape), config.causal.schedule(config.sigma_max)
    params, vae_params = random_weights(model, "dit"), random_weights(vae.config, "vae")
    text = jax.random.normal(jax.random.key(1), (1, model.text_len, model.text_dim), jnp.bfloat16)
    noises = video_noises(network, schedule, 0, [0])
    decode_chunk = jax.jit(vae.decode_chunk, donate_argnums=2)
    decoders = {
        "video": lambda latents, state: decode_chunk(vae_params, latents, state),
        "latents": lambda latents, state: (latents, state),
    }
    runs: dict[str, list[Profile]] = {}
    for name, decode in decoders.items():

        def play(decode=decode):
            return stream(network, params, text, noises, schedule, decode)

        profile(play)
        runs[name] = []
        for _ in range(args.runs):
            parts, run = profile(play)
            if not all(np.isfinite(part).all() for part in parts):
                raise AssertionError("the random network's video is not finite")
            runs[name].append(run)

    def median(name: str, what: str) -> float:
        return statistics.median(getattr(run, what) for run in runs[name])

    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "pattern": pattern, "preset": preset, "first": median("video", "first"), "chunk": median("video", "chunk"),
        "rate": median("video", "rate"), "rate_without": WAN_VAE.time * median("latents", "rate"), "peak": peak,
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--patterns", nargs="+", default=["c1-1", "c3-3"])
    p.add_argument("--presets", nargs="+", default=["4step", "2step", "2step_noisy_ctx", "1step"])
    p.add_argument("--size", default="832x480")
    p.add_argument("--num_frames", type=int, default=81)
    p.add_argument("--num_layers", type=int, help="of the DiT (default: all 30)")
    p.add_argument("--vae_dtype", choices=("float32", "bfloat16"), default="bfloat16")
    p.add_argument("--runs", type=int, default=3, help="after one that compiles; medians are printed")
    p.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    p.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one case, in this process
    args = p.parse_args()
    if args.here:
        print(json.dumps(measure(args, args.patterns[0], args.presets[0])))
        return
    where = benchmarks.machine("jax", "jaxlib")
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    print(ROW.format("pattern", "preset", "first s", "chunk s", "frames/s", "without VAE", "peak GiB"))
    rows = []
    given = [f"--{k}={v}" for k in ("size", "num_frames", "num_layers", "vae_dtype", "runs") if (v := getattr(args, k))]
    for pattern in args.patterns:
        for preset in args.presets:
            case = ["--here", "--patterns", pattern, "--presets", preset, *given]
            out = subprocess.run([sys.executable, "-m", __spec__.name, *case], stdout=subprocess.PIPE, check=True)
            rows.append(row := json.loads(out.stdout.splitlines()[-1]))
            peak = "?" if row["peak"] is None else f"{row['peak'] / 2**30:.1f}"
            numbers = (f"{row[k]:.3f}" for k in ("first", "chunk", "rate", "rate_without"))
            print(ROW.format(pattern, preset, *numbers, peak), flush=True)
    print(f"on {rows[0]['device']}; {args.num_frames} frames of {args.size}, DiT bfloat16, VAE {args.vae_dtype}")
    benchmarks.write_json(args.json, {"machine": where, "results": rows})


if __name__ == "__main__":
    main()
