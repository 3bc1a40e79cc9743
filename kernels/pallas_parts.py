"""Few queries and many keys: the keys of each query tile are cut into parts, which `joining.join` puts together.

A chunk of a stream has so few tiles of queries that an H100 runs one wave of them and then most of a second one empty.
Programs that walk a part of the keys each fill it; what they write, o in float32 and lse, is little beside the keys.
"""

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array

from rcm_jax.aot.gpus import gpus
from rcm_jax.kernels.target import target
from rcm_jax.kernels.tiles import Tiles

MAX_PARTS = 8
WORTH = 0.9  # of the time with one part: what is expected of more has to be less than this
OVERHEAD = 4  # tiles of keys that take as long as one part's start, its float32 result and its share of joining them
WARPS = 8  # that run at a time on a multiprocessor: the kernels take most of its registers


def parts_for(q: Array, k: Array, tiles: Tiles, cores: int | None) -> int:
    """Into how many parts to cut the keys on so many multiprocessors. With none (no GPU): one."""
    B, S, N, _ = q.shape
    if not cores:
        return 1
    programs, walked = B * N * pl.cdiv(S, tiles.block_q), pl.cdiv(k.shape[1], tiles.block_k)
    at_once = cores * max(1, WARPS // tiles.num_warps)

    def turns(parts: int) -> int:
        """Of the loop over keys, until the last wave of programs is through."""
        return pl.cdiv(programs * parts, at_once) * (pl.cdiv(walked, parts) + (OVERHEAD if parts > 1 else 0))

    best = min(range(1, MAX_PARTS + 1), key=turns)
    return best if turns(best) < WORTH * turns(1) else 1


def multiprocessors() -> int | None:
    """Of the GPU that is compiled for; None where it is none, or one that is not known."""
    device, here = target(), jax.devices()[0]
    if not device.is_gpu:
        return None
    if here.device_kind == device.kind and hasattr(here, "core_count"):
        return here.core_count
    return next((gpu.cores for gpu in gpus().values() if gpu.device_kind == device.kind), None)
