"""Toy videos from quantised caches: python -m tests.benchmarks.quant_toy [--per_caption 8] [--seeds 0 1 2] [--json OUT]

The built-in causal student, whose cache is stored as each scheme says. A row has the bytes of a token, a layer, one of
keys or values; how far the videos are from those of the exact cache with the same noise, root mean square in [-1, 1];
and the share whose colour, shape and direction are all as asked: the mean over sampling seeds, with the least and the
greatest. The toy's chunks are small: clusters are few, lest each token have its own.
"""

import argparse
from pathlib import Path

import numpy as np

from rcm_jax.chunks import ChunkPattern
from rcm_jax.pipelines.options import SamplingOptions
from rcm_jax.pipelines.pipeline import load
from rcm_jax.quant import bytes_a_token
from rcm_jax.worlds.toy.scores import evaluation_prompts, score
from tests import benchmarks

CLUSTERS = 8


def scheme(dtype: str, smoothing: str = "none", **more: str | int) -> dict[str, str | int]:
    """The flags that store keys and values alike."""
    flags = {
        f"kv_{name}_{side}": value for name, value in (("dtype", dtype), ("smoothing", smoothing)) for side in "kv"
    }
    return flags | {"kv_qvg_clusters": CLUSTERS} | more


BEFORE = {"kv_scale_rounding": "before"}
SCHEMES = {
    "int8": scheme("int8"),
    "int8, scale first": scheme("int8", **BEFORE),
    "fp8": scheme("fp8"),
    "fp8, scale first": scheme("fp8", **BEFORE),
    "int4": scheme("int4"),
    "int4, keys by token": scheme("int4", kv_granularity_k="token"),
    "int4, balance, keys by token": scheme("int4", "balance", kv_granularity_k="token"),
    "int4, hadamard, keys by token": scheme("int4", "hadamard", kv_granularity_k="token"),
    "fp4": scheme("fp4"),
    "int4, qvg": scheme("int4", "qvg"),
    "int2": scheme("int2"),
    "int2, qvg": scheme("int2", "qvg"),
    "int2, qvg, keys by token": scheme("int2", "qvg", kv_granularity_k="token"),
}


def token_bytes(pipe, flags: dict) -> tuple[float, float]:
    """Of a key and of a value."""
    model, quant = pipe.info.model, SamplingOptions(**flags).cache_quant
    rows, columns = model.grid((1, *pipe.info.latent_shape[1:]))[1:]
    tokens = ChunkPattern.parse(pipe.info.causal["pattern"]).rest * rows * columns
    return tuple(bytes_a_token(c, tokens, model.num_heads, model.head_dim) for c in (quant.keys, quant.values))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="toy_causal", help="a causal network's file")
    p.add_argument("--per_caption", type=int, default=8, help="videos for each of 48 captions")
    p.add_argument("--captions", type=int, default=48, help="only so many of them")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of sampling")
    p.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES), metavar="NAME")
    p.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    args = p.parse_args()
    pipe, prompts = load(args.model), evaluation_prompts(args.per_caption)[: args.captions * args.per_caption]
    asked = {"indices": range(len(prompts))}
    exact, results = [], {}
    print("| stored as | bytes of a key, value | bf16 / both | away from exact | all as asked |\n|---|---|---|---|---|")
    for name, flags in {"bf16": {}, **{name: SCHEMES[name] for name in args.schemes}}.items():
        videos = [pipe.arrays(prompts, seed=seed, progress=name, **asked, **flags) for seed in args.seeds]
        exact = exact or videos
        away = [float(np.sqrt(np.mean((x - y) ** 2))) for x, y in zip(videos, exact, strict=True)]
        scores = [score(x, prompts, resamples=1)["all"]["value"] for x in videos]
        key, value = token_bytes(pipe, flags)
        plain = sum(token_bytes(pipe, {}))
        results[name] = {"bytes": [key, value], "away": away, "all": scores}
        print(
            f"| {name} | {key:.0f}, {value:.0f} | {plain / (key + value):.1f} | {np.mean(away):.3f} | "
            f"{np.mean(scores):.3f} [{min(scores):.3f}, {max(scores):.3f}] |",
            flush=True,
        )
    told = {"machine": benchmarks.machine("jax", "jaxlib"), "videos": len(prompts), "results": results}
    benchmarks.write_json(args.json, told)


if __name__ == "__main__":
    main()
