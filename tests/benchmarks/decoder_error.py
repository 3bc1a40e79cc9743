"""What decoding in bfloat16 costs in exactness, and in time on this machine: published sizes, random weights.

    python -m tests.benchmarks.decoder_error --size 15 26 --frames 3

The last layer is scaled so that frames have a standard deviation of about 0.5, as videos in [-1, 1]. Errors are of the
frames as floats (relative), and in levels of 255 of those in a file; the full decoder's convolutions are in the form
for GPUs there. Seconds are of the form for CPUs, medians of --rounds in turn.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rcm_jax.media.pictures import to_uint8
from rcm_jax.wan import tiny_vae, vae, vae_layers
from rcm_jax.wan.config import TAEW2_1, WAN_VAE
from rcm_jax.wan.tiny_vae import TinyVAE
from rcm_jax.wan.vae import VAE
from tests.benchmarks import machine, ratio, relative, spread, time_in_turn
from tests.benchmarks.tiny_decoder import random_weights

SPREAD = 0.5


def rounded(params: PyTree, dtype: str) -> PyTree:
    """As files are loaded: scales of norms stay float32."""

    def one(path: tuple, x: jax.Array) -> jax.Array:
        return x if any("norm" in str(key) for key in path) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def in_range(kind: type, config: object, params: PyTree, latents: jax.Array) -> PyTree:
    """The same with a last layer that spreads the frames over [-1, 1], before the tiny decoder clips them."""
    scale, middle = (SPREAD, 0.0) if kind is VAE else (SPREAD / 2, 0.5)  # the tiny one's frames are in [0, 1]
    module = (vae.Decoder(config, first=False) if kind is VAE else tiny_vae.Decoder(config)).apply
    raw = jax.jit(lambda p, x: module({"params": p}, x, mutable=["cache"])[0])(params["decoder"], latents[:, :1])
    last = params["decoder"]["conv_out"]
    kernel, bias = (last.get("conv") or last)["kernel"], (last.get("conv") or last)["bias"]
    by = scale / raw.std()
    new = {"kernel": kernel * by, "bias": (bias - raw.mean()) * by + middle}
    return {"decoder": params["decoder"] | {"conv_out": {"conv": new} if "conv" in last else new}}


def calls(kind: type, config: object, latents: jax.Array) -> dict[str, Callable[[], np.ndarray]]:
    """`decode` in each dtype."""
    params = in_range(kind, config, random_weights(config), latents)

    def decode(dtype: str) -> np.ndarray:
        return np.asarray(kind(type(config)(dtype=dtype)).decode(weights[dtype], latents))

    weights = {dtype: rounded(params, dtype) for dtype in ("float32", "bfloat16")}
    return {dtype: lambda dtype=dtype: decode(dtype) for dtype in weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(15, 26), help="latent rows and columns")
    parser.add_argument("--frames", type=int, default=3, help="latent frames")
    parser.add_argument("--rounds", type=int, default=3, help="0: errors alone")
    args = parser.parse_args()
    latents = jnp.asarray(np.random.default_rng(1).standard_normal((1, args.frames, *args.size, 16), np.float32))
    for name, kind, config in (("full", VAE, WAN_VAE), ("tiny", TinyVAE, TAEW2_1)):
        decode = calls(kind, config, latents)
        exact, form = decode["float32"](), vae_layers.convolve
        vae_layers.convolve = vae_layers.solid
        jax.clear_caches()
        half = decode["bfloat16"]()
        vae_layers.convolve = form
        jax.clear_caches()
        off = np.abs(to_uint8(half).astype(int) - to_uint8(exact))
        by_frame = [relative(a, b) for a, b in zip(half[0], exact[0], strict=True)]
        inside = np.mean(np.abs(exact) < 1)
        print(
            f"{name}: relative {relative(half, exact):.2e} (first frame {by_frame[0]:.2e}, last {by_frame[-1]:.2e}); "
            f"levels: mean {off.mean():.3f}, over 1 in {np.mean(off > 1):.2%}, over 3 in {np.mean(off > 3):.3%}, "
            f"largest {off.max()}; {inside:.0%} inside [-1, 1], spread {exact.std():.2f}",
            flush=True,
        )
        if args.rounds:
            seconds = time_in_turn(decode, args.rounds, 1)
            both = ", ".join(f"{dtype} {np.median(times):.2f} s" for dtype, times in seconds.items())
            slower = spread(ratio(seconds["bfloat16"], seconds["float32"]))
            print(f"{name}: {both}; bfloat16/float32 {slower}", flush=True)
    print(machine("jax", "jaxlib"))


if __name__ == "__main__":
    main()
