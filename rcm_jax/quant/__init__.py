"""Keys and values in few bytes: what a causal cache holds of a chunk, and what attention gets back.

`store` packs a chunk's keys or values, `restore` gives them back in bfloat16, `laid_by_token` puts what was packed in
the order in which kernels read it. Pure functions of fixed shapes, for jit:

    smoothing → rows of numbers → groups with a scale each → codes → bytes

`config` says what there is to choose, `smoothing` and `clusters` make numbers easier to code, `groups` and `codes` code
them, `stored` puts all in order.
"""

from rcm_jax.quant.config import CacheQuant, QuantConfig
from rcm_jax.quant.stored import Stored, bytes_a_token, laid_by_token, nbytes, restore, restore_float32, store

__all__ = [
    "CacheQuant",
    "QuantConfig",
    "Stored",
    "bytes_a_token",
    "laid_by_token",
    "nbytes",
    "restore",
    "restore_float32",
    "store",
]
