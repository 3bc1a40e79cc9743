"""What XLA makes of every kernel with the tiles that ship, compiled for GPUs that are not here.

    pip install -e '.[aot]' && python -m tests.benchmarks.kernel_tiles [--gpu h100 a100] [--kinds tangent …]

A line for each kernel, dtype, width and mask, at lengths of Wan's: registers; bytes that a thread spills, in the whole
kernel and in a turn of its main loop; shared memory; blocks that a multiprocessor holds; tensor-core products executed
for a useful one; cycles of a turn, of the tensor cores and of the busiest other unit; bytes of memory read a cycle of
the former; and the share of the peak by the model of docs/kernels.md, where nothing overlaps and where everything does.
Exit code 1 if a loop spills more than a few words.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Sequence

from rcm_jax.aot.compile import no_gpus

if __name__ == "__main__":
    no_gpus()

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax.aot import sass
from rcm_jax.aot.compile import Program, absent, compile_for
from rcm_jax.aot.gpus import find_gpu
from rcm_jax.kernels import pallas_triton
from rcm_jax.kernels.bench_shapes import FRAME, FRAMES, VIDEO, packed
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.tiles import KINDS, WIDTHS, Tiles, tiles_for

PRODUCTS = {"forward": 2, "tangent": 5, "fused": 6, "dq": 3, "dkv": 4}  # of a tile with as many keys as queries x width
FEW = 40  # bytes a thread moves in a turn: ten words beside hundreds of instructions
LENGTHS = {
    "none": (VIDEO, VIDEO),
    "77 frames": (20 * FRAME, 20 * FRAME),
    "81 frames at 720p": (75600, 75600),
    "runs": (2 * VIDEO, 2 * VIDEO),
    "kv_len": (3 * FRAME, VIDEO),
}


def compiled(kind: str, width: int, dtype: str, mask: str, gpu: str, tiles: Tiles | None) -> tuple[Program, Tiles]:
    """The kernel alone, for one sample of two heads."""
    queries, keys = LENGTHS[mask]
    mesh = jax.sharding.Mesh(np.array(absent(gpu, 1)), ("gpu",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    q, k = (jax.ShapeDtypeStruct((1, n, 2, width), dtype, sharding=here) for n in (queries, keys))
    row = jax.ShapeDtypeStruct((1, 2, queries), jnp.float32, sharding=here)
    kv_len = jax.ShapeDtypeStruct((), jnp.int32, sharding=here)
    arrays = {"q": q, "k": k, "v": k, "o": q, "do": q, "lse": row, "delta": row, "tq": q, "tk": k, "tv": k}
    kernel = getattr(pallas_triton, kind.upper())

    def call(arrays: dict, kv_len: jax.Array) -> tuple:
        runs = {"runs": packed("c1-1", FRAMES, FRAME), "kv_len": KeyRuns(kv_len=kv_len)}
        return kernel(arrays, runs.get(mask), width**-0.5, tiles)

    with jax.set_mesh(mesh):
        tiles = tiles or tiles_for(kind, q, k, k)
        return compile_for(call, {name: arrays[name] for name in kernel.operands}, kv_len), tiles


def line(kind: str, width: int, dtype: str, mask: str, gpu: str, tiles: Tiles | None) -> tuple[str, int]:
    """A row of the table, and the bytes that a loop spills."""
    program, tiles = compiled(kind, width, dtype, mask, gpu, tiles)
    name = f"attention_{kind}"
    kernel = sass.assemble(program.ptx[name], name)
    shared = int(re.search(rf"{name} .*shared_memory: (\d+)", program.launches)[1])
    loop = kernel.main_loop
    useful = PRODUCTS[kind] * 2 * tiles.block_q * tiles.block_k * width * (3 if dtype == "float32" else 1)  # of TF32
    low, high = loop.share(useful)
    size = f"{tiles.block_q}, {tiles.block_k}, {tiles.num_warps}, {tiles.num_stages}"
    cells = (
        kind, dtype, width, mask, gpu, size, kernel.registers, f"{kernel.spilled} / {loop.spilled}",
        shared, sass.blocks_on_core(find_gpu(gpu), kernel, shared), f"{loop.flops / useful:.2f}",
        f"{loop.tensor_cycles:.0f}; {loop.vector_cycles:.0f}", f"{loop.loaded / loop.tensor_cycles:.0f}",
        f"{100 * low:.0f}-{100 * high:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |", loop.spilled


def report(
    gpus: Sequence[str], kinds: Sequence[str] = KINDS, dtypes: Sequence[str] = pallas_triton.DTYPES,
    widths: Sequence[int] = WIDTHS, masks: Sequence[str] = tuple(LENGTHS), tiles: Tiles | None = None,
) -> int:  # fmt: skip
    """Prints the table; the number of rows whose loop spills more than a few words."""
    titles = (
        "kernel", "dtype", "width", "mask", "GPU", "tile (q, k, warps, stages)", "registers", "spilled / in loop",
        "shared", "blocks", "executed / useful", "cycles", "bytes a cycle", "% of peak",
    )  # fmt: skip
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    bad = 0
    for gpu, dtype, width, kind, mask in itertools.product(gpus, dtypes, widths, kinds, masks):
        row, spilled = line(kind, width, dtype, mask, gpu, tiles)
        bad += spilled > FEW
        print(row, flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", default=["h100"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=pallas_triton.DTYPES)
    parser.add_argument("--widths", type=int, nargs="+", default=[128], choices=WIDTHS)
    parser.add_argument("--masks", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--tiles", type=int, nargs=4, metavar=("Q", "K", "WARPS", "STAGES"), help="instead of ours")
    args = parser.parse_args()
    tiles = Tiles(*args.tiles) if args.tiles else None
    return 1 if report(args.gpu, args.kinds, args.dtypes, args.widths, args.masks, tiles) else 0


if __name__ == "__main__":
    sys.exit(main())
