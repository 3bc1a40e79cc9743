"""Times attention's kernels against their peers: python -m rcm_jax.kernels.bench --json OUT.jsonl --plot OUT.png

Prints, for each shape, pass and peer: milliseconds, TFLOP/s, share of this GPU's measured bfloat16 matrix rate,
temporary memory, and the relative error against float64 over all heads and rows (L2, and the worst row), beside the
error that the blockwise XLA backend has in the same precision. All in one run, on the same buffers, by one clock
(`bench_clock.py`): medians of the device time of the kernels, the L2 cache overwritten between runs. On a CPU kernels
are interpreted and times mean nothing. FLOPs count 2·B·N·D for each allowed (query, key) pair and matrix product, by
convention: forward 2 products, tangent 5, forward+tangent 6 (also for those that make 7), backward 5.

A row is written to --json as soon as it is measured; the same command goes on where it was stopped. Peers, each left
out with a reason where it is not installed or refuses: pallas_triton (one kernel after the other), pallas_fused (one
kernel for o and its tangent), xla (our blockwise backend), naive (jax.nn.dot_product_attention in XLA), cudnn, tokamax,
rcm (the published Triton kernel, from --rcm), jvp_flash_attention (that of PyPI), torch (its dot product), torch_flex
(FlexAttention, for masks). docs/gpu-day.md says what to install.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from rcm_jax.cli import command_parser, one_line_errors
from rcm_jax.kernels import bench_clock
from rcm_jax.kernels.bench_clock import Ready
from rcm_jax.kernels.bench_errors import exact, misses
from rcm_jax.kernels.bench_peers import PEERS, Operands, ours, peers
from rcm_jax.kernels.bench_records import HEADER, Records, line, plot
from rcm_jax.kernels.bench_shapes import DEFAULT_SHAPES, PRODUCTS, SHAPES, TINY, Shape, operands
from rcm_jax.outputs import PICTURES, check_output


class Problem:
    """A shape with its operands, its exact results and the errors that XLA makes; each made when it is first needed."""

    def __init__(self, shape: Shape, dtype: str):
        self.shape, self.dtype = shape, dtype
        self._xla: dict[str, dict] = {}

    @functools.cached_property
    def operands(self) -> Operands:
        return jax.block_until_ready(operands(self.shape, self.dtype))

    @functools.cached_property
    def exact(self) -> dict[str, jax.Array]:
        return exact(self.shape, self.operands)

    def errors(self, kind: str, ready: Ready) -> dict[str, list[float]]:
        return misses(kind, ready.arrays(ready.wait(ready.run())), self.exact)

    def errors_of_xla(self, kind: str) -> dict[str, list[float]]:
        if kind not in self._xla:
            self._xla[kind] = self.errors(kind, ours("xla", self.shape)[kind](self.operands))
        return self._xla[kind]


def measure(
    problem: Problem, peer: str, passes: dict[str, Callable[[Operands], Ready]], wanted: list[str], repeats: int,
    records: Records, here: dict[str, Any],
) -> Iterator[dict]:  # fmt: skip
    """A row for each wanted pass of a peer; a `reason` instead of numbers where it refuses."""
    for kind in wanted:
        if kind not in passes:
            continue
        row = name_row(problem, kind, peer, here)
        if kept := records.find(row):
            yield kept
            continue
        try:
            ready = passes[kind](problem.operands)
            errors = problem.errors(kind, ready)
            times = bench_clock.milliseconds(ready, repeats)
        except Exception as reason:  # a peer may refuse in its own way, and that must not end the run
            row["reason"] = f"{type(reason).__name__}: {next(iter(str(reason).splitlines()), '')[:120]}"
        else:
            ms = statistics.median(times)
            tflops = problem.shape.flops(kind) / ms / 1e9
            row |= {
                "ms": ms, "lowest ms": min(times), "repeats": repeats, "TFLOP/s": tflops,
                "share": tflops / here["roof TFLOP/s"], "errors": errors, "errors of xla": problem.errors_of_xla(kind),
                **ready.facts, **bench_clock.smi(),
            }  # fmt: skip
        records.add(row)
        yield row


def name_row(problem: Problem, kind: str, peer: str, here: dict[str, Any]) -> dict[str, Any]:
    return {"shape": problem.shape.name, "pass": kind, "peer": peer, "dtype": problem.dtype, **here}


def rows(
    names: list[str], wanted_peers: list[str], wanted: list[str], dtype: str, repeats: int, records: Records,
    here: dict[str, Any], rcm: Path | None = None,
) -> Iterator[dict]:  # fmt: skip
    """All rows, shape by shape; those that `records` has are taken from there."""
    makers = peers(rcm)
    for name in names:
        problem = Problem(SHAPES[name], dtype)
        for peer in wanted_peers:
            try:
                passes = makers[peer](problem.shape)
            except (ImportError, NotImplementedError) as reason:
                row = name_row(problem, "all", peer, here) | {"reason": str(reason)}
                records.add(row)
                yield row
                continue
            yield from measure(problem, peer, passes, wanted, repeats, records, here)


def facts_of_the_run(repeats: int) -> dict[str, Any]:
    """What every row says of the machine, its roof included, which is measured now."""
    return bench_clock.machine() | {"roof TFLOP/s": bench_clock.matrix_rate(repeats)}


def parser() -> argparse.ArgumentParser:
    p = command_parser("kernels.bench", __doc__)
    p.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    p.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    p.add_argument("--passes", nargs="+", choices=PRODUCTS, default=list(PRODUCTS), metavar="PASS")
    p.add_argument("--rcm", type=Path, metavar="PATH", help="a checkout of github.com/NVlabs/rcm")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--repeats", type=int, default=20)
    p.add_argument("--json", type=Path, metavar="FILE", help="lines of JSON, a row each; what it has is not run again")
    p.add_argument("--plot", type=Path, metavar="FILE")
    return p


def run(args: argparse.Namespace) -> list[dict]:
    if args.json:
        check_output(args.json, "json")
    if args.plot:
        check_output(args.plot, "plot", PICTURES)
    names = args.shapes or (DEFAULT_SHAPES if bench_clock.on_gpu() else TINY)
    if not bench_clock.on_gpu():
        print("No GPU here: kernels are interpreted, times mean nothing; this shows that it runs.", file=sys.stderr)
    here = facts_of_the_run(args.repeats)
    print(", ".join(f"{name} {value}" for name, value in here.items() if name != "roof TFLOP/s"))
    print(f"{args.dtype}; a bfloat16 matrix product runs at {here['roof TFLOP/s']:.0f} TFLOP/s")
    print(HEADER)
    done = []
    for row in rows(names, args.peers, args.passes, args.dtype, args.repeats, Records(args.json), here, args.rcm):
        print(line(row), flush=True)
        done.append(row)
    if args.plot:
        plot(done, args.plot)
    return done


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
