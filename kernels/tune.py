"""Finds the fastest tiles on the GPU that is here: python -m rcm_jax.kernels.tune [--widths 64 128] [--out FILE]

For every kernel, operand size and head width: compiles the candidates, largest tiles first, drops those that spill
registers or compute anything twice, times the first few that remain on a long and dense problem, and writes the fastest
that is right into the table under this GPU's name; what the table has under that name is not tuned again. The table
that ships is `kernels/tile_table.json`; entries under a GPU's name come before those of its architecture.

    python -m rcm_jax.kernels.tune --gpu h100       # a GPU that is not here: what remains, compiled and not run

Needs pip install 'rcm_jax[aot]'.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rcm_jax.aot.compile import absent, compile_for, no_gpus
from rcm_jax.aot.gpus import gpus
from rcm_jax.cli import command_parser, one_line_errors
from rcm_jax.kernels import pallas_triton
from rcm_jax.kernels.bench_clock import Ready, median, on_gpu
from rcm_jax.kernels.bench_shapes import Shape, operands
from rcm_jax.kernels.tiles import KINDS, TABLE, WIDTHS, Tiles, this_gpu
from rcm_jax.kernels.tune_prune import prune
from rcm_jax.outputs import check_output, unfinished

BLOCKS = (
    (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (32, 128), (128, 16), (16, 128), (64, 32), (32, 64),
    (32, 32), (16, 16),
)  # fmt: skip
MOST = 6  # candidates that are timed
SMALLEST = Tiles(16, 16)


def candidates() -> list[Tiles]:
    """Everything that is tried, largest tiles first."""
    return [Tiles(q, k, w, s) for (q, k), w, s in itertools.product(BLOCKS, (4, 8), (2, 3))]


def call(kind: str, shape: Shape, tiles: Tiles | None) -> Callable[[dict], tuple]:
    """One kernel as a function of the operands."""
    scale = shape.scale

    def run(x: dict) -> tuple:
        reverse = {n: x[n] for n in ("q", "k", "v", "do", "lse", "delta")}
        qkv, t = (x["q"], x["k"], x["v"]), (x["tq"], x["tk"], x["tv"])
        return {
            "forward": lambda: pallas_triton.forward(*qkv, None, scale, tiles=tiles),
            "tangent": lambda: pallas_triton.tangent(*qkv, x["o"], x["lse"], *t, None, scale, tiles=tiles),
            "fused": lambda: pallas_triton.fused(*qkv, *t, None, scale, tiles=tiles),
            "dq": lambda: pallas_triton.DQ(reverse, None, scale, tiles),
            "dkv": lambda: pallas_triton.DKV(reverse, None, scale, tiles),
        }[kind]()

    return run


def inputs(shape: Shape, dtype: str) -> dict[str, jax.Array]:
    """The operands, and what the backward kernels read beside them."""
    x = operands(shape, dtype)
    x["o"], x["lse"] = pallas_triton.forward(x["q"], x["k"], x["v"], None, shape.scale, tiles=SMALLEST)
    x["delta"] = (x["do"].astype("float32") * x["o"].astype("float32")).sum(-1).swapaxes(1, 2)
    return x


def remaining(kind: str, shape: Shape, dtype: str, gpu: str | None) -> list[Tiles]:
    """The candidates worth a run, compiled for the GPU of that name or for this one; the first few where there is
    none."""
    if gpu is None and not on_gpu():
        return candidates()[:MOST]
    x = jax.eval_shape(functools.partial(inputs, shape, dtype))

    def compile_one(tiles: Tiles):
        return compile_for(call(kind, shape, tiles), x)

    def rows(tiles: Tiles) -> int:
        return tiles.block_k if kind == "dkv" else tiles.block_q

    return list(prune(candidates(), compile_one, rows, MOST))


def tune(kind: str, shape: Shape, dtype: str, repeats: int) -> Tiles | None:
    """The fastest of what remains that gives the same numbers as the smallest tiles; None where nothing runs."""
    chosen, x, best = remaining(kind, shape, dtype, None), jax.jit(lambda: inputs(shape, dtype))(), None
    want = jax.tree.leaves(jax.jit(call(kind, shape, SMALLEST))(x))
    for tiles in chosen:
        try:
            run = jax.jit(call(kind, shape, tiles)).lower(x).compile()
            pairs = zip(jax.tree.leaves(run(x)), want, strict=True)
            right = all(np.allclose(np.asarray(a, "f4"), np.asarray(b, "f4"), atol=0.05, rtol=0.05) for a, b in pairs)
            ms = median(Ready(functools.partial(run, x)), repeats)
        except Exception as error:  # what compiles may still not fit when it runs
            print(f"  {tiles}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:90]}")
            continue
        print(f"  {tiles}: {ms:.3f} ms{'' if right else '  WRONG'}", flush=True)
        if right and (best is None or ms < best[0]):
            best = ms, tiles
    return best and best[1]


def run(args: argparse.Namespace) -> None:
    problems = itertools.product(args.kinds, args.dtypes, args.widths)
    if args.gpu:
        _list_remaining(args, problems)
        return
    if not on_gpu() and not args.anyway:
        raise RuntimeError(
            "tune needs an NVIDIA GPU; there is none here (--anyway runs it on the interpreter, --gpu compiles only)"
        )
    check_output(args.out, "out")
    table = json.loads(args.out.read_text()) if args.out.exists() else {}
    name = this_gpu()[0]
    for kind, dtype, width in problems:
        entries = table.setdefault(name, {}).setdefault(kind, {}).setdefault(operand_size(dtype), {})
        if str(width) in entries:
            print(f"{name}: {kind}, {dtype}, width {width}: {entries[str(width)]} is in {args.out}")
            continue
        print(f"{name}: {kind}, {dtype}, width {width}")
        tiles = tune(kind, Shape("tune", args.tokens, args.tokens, 8, width), dtype, args.repeats)
        if tiles is None:
            continue
        entries[str(width)] = [tiles.block_q, tiles.block_k, tiles.num_warps, tiles.num_stages]
        with unfinished(args.out) as new:  # after each, so that stopping loses nothing
            new.write_text(json.dumps(table, indent=1))
        print(f"  -> {entries[str(width)]}")


def _list_remaining(args: argparse.Namespace, problems: itertools.product) -> None:
    mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,), devices=absent(args.gpu, 1))
    with jax.set_mesh(mesh):
        for kind, dtype, width in problems:
            print(f"{args.gpu}: {kind}, {dtype}, width {width}, compiled and not run")
            tiles = remaining(kind, Shape("tune", args.tokens, args.tokens, 8, width), dtype, args.gpu)
            print(f"  remain: {', '.join(map(str, tiles)) or 'none'}")


def operand_size(dtype: str) -> str:
    """As the table has it."""
    return f"{np.dtype('float32' if dtype == 'float32' else 'float16').itemsize} bytes"


def main(argv: list[str] | None = None) -> None:
    p = command_parser("kernels.tune", __doc__)
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    p.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    p.add_argument("--widths", nargs="+", type=int, choices=WIDTHS, default=list(WIDTHS))
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--out", type=Path, default=TABLE, help="the table to add to (default: the one in use)")
    p.add_argument("--gpu", choices=gpus(), help="compile for this GPU, which is not here, and time nothing")
    p.add_argument("--anyway", action="store_true", help="run without a GPU, on the interpreter: to try this command")
    args = p.parse_args(argv)
    with one_line_errors():
        if args.gpu:
            no_gpus()
        run(args)


if __name__ == "__main__":
    main()
