"""How large the tiles of the Pallas kernels are: a table for each GPU, shipped as data (`tile_table.json`).

An entry is [queries, keys, warps, stages] for a kernel, an operand size in bytes and a head width. `forward_of_past` is
the forward kernel on keys as they are stored. Entries of an
architecture ("sm_90") were chosen by what XLA compiles (`python -m tests.benchmarks.kernel_tiles`); entries of a GPU
by its name ("NVIDIA H200") were timed on it (`python -m rcm_jax.kernels.tune`) and come first.
"""

import dataclasses
import functools
import json
from pathlib import Path

from jaxtyping import Array

from rcm_jax.kernels.target import target

KINDS = ("forward", "tangent", "fused", "dq", "dkv")
WIDTHS = (64, 128, 256)  # head widths are rounded up to one of these
TABLE = Path(__file__).parent / "tile_table.json"
UNKNOWN_GPU = "sm_80"  # what runs on every GPU the kernels serve


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, and what the compiler is told. Raises ValueError for what no GPU can run."""

    block_q: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            n = getattr(self, name)
            if n not in (16, 32, 64, 128, 256):
                raise ValueError(f"{name}={n} must be 16, 32, 64, 128 or 256")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps={self.num_warps} must be 1, 2, 4, 8 or 16")
        if not 1 <= self.num_stages <= 6:
            raise ValueError(f"num_stages={self.num_stages} must be 1 to 6")


def tiles_for(kind: str, q: Array, k: Array, v: Array, *, gpu: tuple[str, ...] | None = None) -> Tiles:
    """The tiles for operands of these shapes on the first of the names in `gpu` (default: `this_gpu()`) with an entry.

    Where all queries (or keys) fit a smaller tile, the tile shrinks to them.
    """
    width = next(w for w in WIDTHS if max(q.shape[-1], v.shape[-1]) <= w)
    for name in (*(this_gpu() if gpu is None else gpu), UNKNOWN_GPU):
        entry = table().get(name, {}).get(kind, {}).get(f"{q.dtype.itemsize} bytes", {}).get(str(width))
        if entry:
            tiles = Tiles(*entry)
            return dataclasses.replace(
                tiles, block_q=_shrunk(tiles.block_q, q.shape[1]), block_k=_shrunk(tiles.block_k, k.shape[1])
            )
    raise LookupError(f"{TABLE} has no tiles for {kind}, {q.dtype} and width {width}")


def _shrunk(block: int, length: int) -> int:
    while block > 16 and block // 2 >= length:
        block //= 2
    return block


def this_gpu() -> tuple[str, ...]:
    """(name, architecture) of the GPU that is compiled for, as the table has them; sm_90 where it is none, for kernels
    that are interpreted or lowered for another platform than the mesh's."""
    device = target()
    return (device.kind, device.architecture) if device.is_gpu else ("sm_90",)


@functools.cache
def table() -> dict:
    return json.loads(TABLE.read_text())
