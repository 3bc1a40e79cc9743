"""Which tiles are worth a run: those whose kernel, compiled for the GPU, neither spills nor computes anything twice."""

import dataclasses
from collections.abc import Callable, Iterator

from rcm_jax.aot import sass
from rcm_jax.aot.compile import Program
from rcm_jax.kernels.target import target
from rcm_jax.kernels.tiles import Tiles

WGMMA_ROWS = 64  # that four warps of an sm_90 multiply together
HOPELESS = 64  # bytes spilled: fewer may be none with another number of stages


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a kernel takes of a GPU, before it has run."""

    registers: int  # a thread
    spilled: int  # bytes that a thread moves to and from its stack in a turn of the main loop

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spilled} bytes spilled"


def prune(
    candidates: list[Tiles], compile_one: Callable[[Tiles], Program], rows: Callable[[Tiles], int], most: int
) -> Iterator[Tiles]:
    """The first `most` of the candidates that are worth a run, each compiled as it is asked for; `rows` is how many
    rows of a tile stay. What does not compile is left out, and so are other stages of tiles that spill a lot."""
    kept, hopeless = 0, set()
    for tiles in candidates:
        shape = tiles.block_q, tiles.block_k, tiles.num_warps
        if kept == most:
            return
        if shape in hopeless or executed(rows(tiles), tiles.num_warps) > 1:
            continue
        try:
            cost = cost_of(compile_one(tiles))
        except Exception as error:  # too much shared memory, a compiler's refusal: not a candidate on this GPU
            print(f"  {tiles}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:90]}")
            continue
        spilled = 0 if cost is None else cost.spilled
        print(f"  {tiles}: {cost or 'compiles'}{', left out' if spilled else ''}", flush=True)
        if spilled > HOPELESS:
            hopeless.add(shape)
        if not spilled:
            kept += 1
            yield tiles


def executed(rows: int, warps: int) -> float:
    """Products that are executed for one that is needed, where so many rows of a tile stay."""
    return max(1.0, WGMMA_ROWS * warps / 4 / rows) if target().architecture == "sm_90" and warps > 4 else 1.0


def cost_of(program: Program) -> Cost | None:
    """Of the one kernel of ours in a program; None where this version of jax does not show what it compiled. Raises
    LookupError for a program that has other kernels, RuntimeError without an assembler."""
    if not program.ptx:
        return None
    ours = {name: text for name, text in program.ptx.items() if name.startswith("attention_")}
    if len(ours) != 1:
        raise LookupError(f"the program's kernels are {sorted(program.ptx)}, of which one must be attention_…")
    ((name, ptx),) = ours.items()
    code = sass.assemble(ptx, name)
    return Cost(code.registers, code.main_loop.spilled)
