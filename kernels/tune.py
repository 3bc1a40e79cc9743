"""Finds the fastest tiles on the GPU that is here: python -m rcm_jax.kernels.tune [--widths 64 128] [--out FILE]

For every kernel, operand size and head width: times each candidate on a long and dense problem, throws away what does
not compile, is wrong or spills into slowness, prints the times, and writes the fastest into the table under this GPU's
name. The table that ships is `kernels/tile_table.json`; entries under a GPU's name come before those of its
architecture.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import jax
import numpy as np

from rcm_jax.cli import command_parser, one_line_errors
from rcm_jax.kernels import pallas_triton
from rcm_jax.kernels.bench import device_milliseconds
from rcm_jax.kernels.bench_shapes import Shape, operands
from rcm_jax.kernels.tiles import KINDS, TABLE, WIDTHS, Tiles, this_gpu
from rcm_jax.outputs import check_output, unfinished

BLOCKS = ((128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (32, 128), (64, 32), (32, 64), (32, 32), (16, 16))


def candidates() -> list[Tiles]:
    """Everything that is tried, largest tiles first."""
    return [Tiles(q, k, w, s) for (q, k), w, s in itertools.product(BLOCKS, (4, 8), (1, 2, 3))]


def milliseconds(kind: str, shape: Shape, x: dict, tiles: Tiles, repeats: int) -> tuple[float, list]:
    """Median time of one kernel, and its results."""
    scale, residuals = shape.width**-0.5, (x["q"], x["k"], x["v"], x["o"], x["lse"])
    arrays = {n: x[n] for n in ("q", "k", "v", "do", "lse", "delta")}
    calls = {
        "forward": lambda: pallas_triton.forward(*residuals[:3], None, scale, tiles=tiles),
        "tangent": lambda: pallas_triton.tangent(*residuals, x["tq"], x["tk"], x["tv"], None, scale, tiles=tiles),
        "fused": lambda: pallas_triton.fused(*residuals[:3], x["tq"], x["tk"], x["tv"], None, scale, tiles=tiles),
        "dq": lambda: pallas_triton.DQ(arrays, None, scale, tiles),
        "dkv": lambda: pallas_triton.DKV(arrays, None, scale, tiles),
    }
    run = jax.jit(calls[kind])
    times = device_milliseconds(run, (), repeats)
    return statistics.median(times), jax.tree.leaves(run())


def tune(kind: str, dtype: str, width: int, tokens: int, repeats: int) -> Tiles | None:
    """The fastest candidate that gives the same numbers as the smallest tiles; None where nothing runs."""
    shape = Shape("tune", tokens, tokens, 8, width)
    x = operands(shape, dtype)
    x["o"], x["lse"] = pallas_triton.forward(x["q"], x["k"], x["v"], None, width**-0.5, tiles=Tiles(16, 16))
    x["delta"] = (x["do"].astype("float32") * x["o"].astype("float32")).sum(-1).swapaxes(1, 2)
    _, want = milliseconds(kind, shape, x, Tiles(16, 16), 1)
    best = None
    for tiles in candidates():
        try:
            ms, got = milliseconds(kind, shape, x, tiles, repeats)
        except Exception as error:  # too much shared memory, a compiler's refusal: not a candidate on this GPU
            print(f"  {tiles}: {type(error).__name__}")
            continue
        pairs = zip(got, want, strict=True)
        wrong = any(not np.allclose(np.asarray(a, "f4"), np.asarray(b, "f4"), atol=0.05, rtol=0.05) for a, b in pairs)
        print(f"  {tiles}: {ms:.3f} ms{'  WRONG' if wrong else ''}", flush=True)
        if not wrong and (best is None or ms < best[0]):
            best = ms, tiles
    return best and best[1]


def run(args: argparse.Namespace) -> None:
    if jax.devices()[0].platform != "gpu" and not args.anyway:
        raise RuntimeError("tune needs an NVIDIA GPU; there is none here (--anyway runs it on the interpreter)")
    check_output(args.out, "out")
    table = json.loads(args.out.read_text()) if args.out.exists() else {}
    name = this_gpu()[0]
    for kind, dtype, width in itertools.product(args.kinds, args.dtypes, args.widths):
        print(f"{name}: {kind}, {dtype}, width {width}")
        tiles = tune(kind, dtype, width, args.tokens, args.repeats)
        if tiles is None:
            continue
        entry = [tiles.block_q, tiles.block_k, tiles.num_warps, tiles.num_stages]
        size = f"{np.dtype('float32' if dtype == 'float32' else 'float16').itemsize} bytes"
        table.setdefault(name, {}).setdefault(kind, {}).setdefault(size, {})[str(width)] = entry
        with unfinished(args.out) as new:  # after each, so that stopping loses nothing
            new.write_text(json.dumps(table, indent=1))
        print(f"  -> {entry}")


def main(argv: list[str] | None = None) -> None:
    p = command_parser("kernels.tune", __doc__)
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    p.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    p.add_argument("--widths", nargs="+", type=int, choices=WIDTHS, default=list(WIDTHS))
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--out", type=Path, default=TABLE, help="the table to add to (default: the one in use)")
    p.add_argument("--anyway", action="store_true", help="run without a GPU, on the interpreter: to try this command")
    args = p.parse_args(argv)
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
