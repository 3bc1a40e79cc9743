"""Bytes of quantised keys and values, and what attention makes of them: the table of docs/causal.md.

    python -m tests.benchmarks.quant_error [--json OUT]

Bytes are of a token, a layer, and one of keys or values: 12 heads of 128, groups of 64, a chunk of 4680 tokens (three
latent frames at 480p). Errors are ‖o - o'‖ / ‖o‖ of attention's output against that of float32 keys and values, with
keys alone, values alone, and both stored so: random numbers in a few clusters of tokens, keys with channels of unlike
size and mean, as those of trained networks have, and values with a tenth of that. Fewer tokens and heads than in the
bytes, and clusters in proportion; RoPE, which moves no error, is left out. Numbers compare schemes on this one kind of
input: they say nothing about the quality of a network's videos.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.quant import CacheQuant, QuantConfig, bytes_a_token, restore, store
from tests import benchmarks

HEADS, WIDTH, CHUNK = 12, 128, 4680
TOKENS, FEW_HEADS, CLUSTERS = 1170, 2, 64

SCHEMES = [
    QuantConfig("bf16"),
    QuantConfig("int8"),
    QuantConfig("int8", scale_rounding="before"),
    QuantConfig("fp8"),
    QuantConfig("fp8", scale_rounding="before"),
    QuantConfig("fp8", smoothing="clip"),
    QuantConfig("int4"),
    QuantConfig("int4", scale_rounding="before"),
    QuantConfig("fp4"),
    QuantConfig("int4", granularity="token"),
    QuantConfig("int4", granularity="token", smoothing="balance"),
    QuantConfig("int4", granularity="token", smoothing="hadamard"),
    QuantConfig("int4", granularity="token", smoothing="reorder"),
    QuantConfig("int4", granularity="head", group_size=0),
    QuantConfig("int4", smoothing="qvg"),
    QuantConfig("int2"),
    QuantConfig("int2", granularity="token", smoothing="hadamard"),
    QuantConfig("int2", smoothing="qvg"),
    QuantConfig("int2", smoothing="qvg", scale_rounding="before"),
    QuantConfig("int2", granularity="token", smoothing="qvg"),
    QuantConfig("int2", smoothing="qvg", qvg_share_assignments=False),
    QuantConfig("int2", smoothing="qvg", qvg_stages=2),
]


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values [1, S, N, D]."""
    rng = np.random.default_rng(seed)
    shape = (1, TOKENS, FEW_HEADS, WIDTH)
    which = rng.integers(8, size=TOKENS)

    def tokens(spread: float) -> np.ndarray:
        size = np.exp(spread * rng.normal(size=shape[2:]))
        clusters = rng.normal(size=(8, *shape[2:]))[which]
        return size * (rng.normal(size=shape) + clusters + spread * rng.normal(size=shape[2:]))

    q, k, v = rng.normal(size=shape), tokens(1.0), tokens(0.1)
    k /= np.sqrt(np.mean(k**2))  # after RMSNorm
    return tuple(x.astype(np.float32) for x in (2 * q, k, v))


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k, precision="highest") * WIDTH**-0.5
    return jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(scores, axis=-1), v, precision="highest")


def errors(quant: CacheQuant, seeds: int) -> list[float]:
    """Of keys alone, values alone, both: the mean over seeds."""

    def restored(x: jax.Array, config: QuantConfig) -> jax.Array:
        small = dataclasses.replace(config, qvg_clusters=CLUSTERS)
        return restore(store(x, small)[0]).astype(jnp.float32)

    @jax.jit
    def outputs(q, k, v):
        near_k, near_v = restored(k, quant.keys), restored(v, quant.values)
        return attention(q, k, v), [attention(q, *kv) for kv in ((near_k, v), (k, near_v), (near_k, near_v))]

    rows = []
    for seed in range(seeds):
        true, near = outputs(*problem(seed))
        rows.append([benchmarks.relative(o, true) for o in near])
    return np.mean(rows, axis=0).tolist()


def title(config: QuantConfig) -> str:
    words = [config.dtype] + [config.smoothing] * (config.smoothing != "none")
    words += [f"{config.qvg_stages} stages"] * (config.qvg_stages > 1)
    words += ["scale first"] * (config.scale_rounding == "before")
    return ", ".join(words + ["per head"] * (not config.qvg_share_assignments))


def groups(config: QuantConfig, settled: str) -> str:
    if config.dtype == "bf16":
        return ""
    return f"{settled}, {config.group_size if config.group_size > 0 else 'all'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="random inputs that errors are the mean of")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    args = parser.parse_args()
    print("| stored as | groups: keys; values | bytes of a key, value | bf16 / both | error by keys | values | both |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for config in SCHEMES:
        quant = CacheQuant(config, config)
        sizes = [bytes_a_token(c, CHUNK, HEADS, WIDTH) for c in (quant.keys, quant.values)]
        error = errors(quant, args.seeds)
        axes = {groups(config, c.granularity): None for c in (quant.keys, quant.values)}
        print(
            f"| {title(config)} | {'; '.join(axes)} | {', '.join(f'{s:.0f}' for s in sizes)} | "
            f"{4 * HEADS * WIDTH / sum(sizes):.1f} | {' | '.join(f'{e:.1e}' for e in error)} |",
            flush=True,
        )
        results.append({"config": dataclasses.asdict(config), "bytes": sizes, "errors": error})
    benchmarks.write_json(args.json, {"machine": benchmarks.machine("jax", "jaxlib"), "results": results})


if __name__ == "__main__":
    main()
