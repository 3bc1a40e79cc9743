"""How large the tiles of the Pallas kernels are."""

import dataclasses

from jaxtyping import Array

KINDS = ("forward", "tangent", "fused", "dq", "dkv")


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


def tiles_for(kind: str, q: Array, k: Array, v: Array) -> Tiles:
    return Tiles(64, 64)
