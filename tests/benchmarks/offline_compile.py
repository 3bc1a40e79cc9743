"""Registers, spills and shared memory of every kernel with the tiles that ship, compiled for GPUs that are not here.

    pip install triton && python -m tests.benchmarks.offline_compile [--arch 90 80] [--kinds tangent …]

Lowers each kernel for CUDA, hands its Triton IR to the compiler of the triton package (JAX brings its own of about the
same age) and asks ptxas. Exit code 1 if anything spills or asks for more shared memory than the GPU has.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax._src.interpreters import mlir  # to read the IR that is inside the lowered call: there is no public way
from jax._src.lib import triton as jax_triton
from jax._src.lib.mlir import ir

from rcm_jax.kernels import pallas_triton
from rcm_jax.kernels.masks import KeyRuns
from rcm_jax.kernels.tiles import KINDS, WIDTHS, Tiles, tiles_for
from tests.benchmarks import abstract_gpu

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes a block may have, CUDA's programming guide
MASKS = {"dense": None, "runs": KeyRuns((500, 999), (((0, 500),), ((0, 5), (500, 999)))), "kv_len": KeyRuns(kv_len=900)}


def triton_ir(kind: str, width: int, dtype: str, mask: KeyRuns | None, tiles: Tiles) -> str:
    """The kernel's Triton IR, as text."""

    def call(q, k, v, tq, tk, tv, do, lse):
        if kind == "forward":
            return pallas_triton.forward(q, k, v, mask, 0.1, tiles=tiles)
        if kind == "tangent":
            return pallas_triton.tangent(q, k, v, do, lse, tq, tk, tv, mask, 0.1, tiles=tiles)
        if kind == "fused":
            return pallas_triton.fused(q, k, v, tq, tk, tv, mask, 0.1, tiles=tiles)
        dq, *dkv = pallas_triton.backward(q, k, v, do, lse, do, mask, 0.1, tiles=tiles)
        return dq if kind == "dq" else dkv

    x, lse = jax.ShapeDtypeStruct((1, 999, 2, width), dtype), jax.ShapeDtypeStruct((1, 2, 999), jnp.float32)
    with abstract_gpu():
        module = jax.jit(call).trace(*[x] * 7, lse).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    for op in _operations(module.operation):
        config = dict(op.attributes).get("mhlo.backend_config")
        if config is not None and ir.StringAttr(config["name"]).value == f"attention_{kind}":
            with mlir.make_ir_context() as context:
                jax_triton.dialect.register_dialect(context)
                return str(ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes))
    raise LookupError(f"the program has no kernel attention_{kind}")


def _operations(op) -> Iterator:
    yield op
    for region in op.regions:
        for block in region:
            for inner in block:
                yield from _operations(inner.operation)


def compile_offline(text: str, arch: int, tiles: Tiles) -> tuple[int, int, int]:
    """(registers a thread, bytes spilled a thread, bytes of shared memory a block)."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ttir"
        source.write_text(text)
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        kernel = triton.compile(str(source), target=GPUTarget("cuda", arch, 32), options=options)
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"])
        target = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
        binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        for ptxas in sorted(binaries.glob("ptxas*"), reverse=True):  # the newest knows every PTX version
            log = subprocess.run(
                [ptxas, "-v", f"-arch={target}", ptx, "-o", os.devnull], capture_output=True, text=True
            ).stderr
            if "registers" in log:
                registers = int(re.search(r"Used (\d+) registers", log)[1])
                return registers, int(re.search(r"(\d+) bytes spill stores", log)[1]), kernel.metadata.shared
    raise RuntimeError(log)


def report(
    archs: Sequence[int], kinds: Sequence[str] = KINDS, dtypes: Sequence[str] = pallas_triton.DTYPES,
    widths: Sequence[int] = WIDTHS, masks: Sequence[str] = tuple(MASKS), tiles: Tiles | None = None,
) -> int:  # fmt: skip
    """Prints a line for every combination; the number of those that spill or do not fit."""
    bad = 0
    print("kind     dtype     width  mask    arch  tiles (q, k, warps, stages)  registers  spilled  shared")
    for arch, kind, dtype, width in itertools.product(archs, kinds, dtypes, widths):
        shape = jax.ShapeDtypeStruct((1, 999, 2, width), dtype)
        t = tiles or tiles_for(kind, shape, shape, shape, gpu=(f"sm_{arch}",))
        for mask in masks:
            registers, spilled, shared = compile_offline(triton_ir(kind, width, dtype, MASKS[mask], t), arch, t)
            wrong = spilled > 0 or shared > SHARED_LIMIT[arch]
            bad += wrong
            size = f"{t.block_q}, {t.block_k}, {t.num_warps}, {t.num_stages}"
            print(
                f"{kind:8} {dtype:9} {width:5}  {mask:7} {arch:4}  {size:28} {registers:9} {spilled:8} {shared:7}"
                f"{'   BAD' if wrong else ''}",
                flush=True,
            )
    print(f"{bad} of these spill or do not fit" if bad else "none spills, all fit")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--dtypes", nargs="+", default=list(pallas_triton.DTYPES))
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--tiles", type=int, nargs=4, metavar=("Q", "K", "WARPS", "STAGES"), help="instead of ours")
    args = parser.parse_args()
    tiles = Tiles(*args.tiles) if args.tiles else None
    return 1 if report(args.arch, args.kinds, args.dtypes, args.widths, args.masks, tiles) else 0


if __name__ == "__main__":
    sys.exit(main())
