"""Stage 2: the benchmark's four headline shapes, all peers. Rows are in bench.jsonl, the picture in bench.png."""

import functools
from collections.abc import Iterator

from rcm_jax.kernels import bench
from rcm_jax.kernels.bench_peers import PEERS
from rcm_jax.kernels.bench_records import HEADER, Records, line, plot
from rcm_jax.kernels.bench_shapes import HEADLINES, PRODUCTS, TINY
from tests.gpu.parts import Context, Part

REPEATS = 10


def parts(context: Context) -> Iterator[Part]:
    """The roof is measured once, when the first part that is missing begins."""
    facts = functools.cache(lambda: bench.facts_of_the_run(1 if context.tiny else REPEATS))
    for name in TINY[1:] if context.tiny else HEADLINES:
        yield Part(name, functools.partial(one_shape, name, context, facts))


def one_shape(name: str, context: Context, facts) -> dict:
    """Prints the rows; those that an earlier call measured are taken from the file."""
    here, out = facts(), context.out / "bench.jsonl"
    print(f"{HEADER}\n(a bfloat16 matrix product: {here['roof TFLOP/s']:.0f} TFLOP/s)")
    peers, repeats = (["pallas_triton", "naive"], 1) if context.tiny else (list(PEERS), REPEATS)
    measured, left_out = [], []
    for row in bench.rows([name], peers, list(PRODUCTS), "bfloat16", repeats, Records(out), here, context.rcm):
        print(line(row), flush=True)
        (measured if "ms" in row else left_out).append(row)
    plot(measured, context.out / f"bench-{name}.png")
    fastest = {}
    for kind in PRODUCTS:
        rows = [row for row in measured if row["pass"] == kind]
        if rows:
            best = min(rows, key=lambda row: row["ms"])
            fastest[kind] = f"{best['peer']} {best['ms']:.3g} ms"
    return {"rows": len(measured), "left out": len(left_out), "fastest": fastest}
