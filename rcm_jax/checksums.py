"""Checksums of a training state's numbers: the same where they lie on a mesh, on any number of hosts, or in a file.

What is summed are the numbers' bits, each times an odd weight of its own, modulo 2^32. A flipped bit changes a term by
a power of two times an odd number, which no modulus of 2^32 hides; two flips hide each other once in billions. Sums of
integers do not depend on their order, so a state may be checked on another mesh than it was saved from, or in parts.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, UInt32

from rcm_jax.parallel import leaf_path

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def checksums(tree: PyTree, mesh: Mesh) -> dict[str, int]:
    """A checksum of each leaf, by its path. All processes of the mesh must call it."""
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return dict(zip(paths, _program(mesh)(jax.tree.leaves(tree)).tolist(), strict=True))


@functools.cache
def _program(mesh: Mesh) -> Callable[[list[Array]], UInt32[Array, " leaves"]]:
    """One for all saves of a run: a new function each time would be compiled each time."""
    whole = NamedSharding(mesh, P())
    return jax.jit(lambda leaves: jnp.stack([_on_devices(x) for x in leaves]), out_shardings=whole)


def _on_devices(x: Array) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize])
    return _weighed(jnp, bits, [jax.lax.broadcasted_iota(jnp.uint32, x.shape, i) for i in range(x.ndim)], 0)


def checksum_of_part(part: np.ndarray, start: int) -> int:
    """Of the entries of a leaf from its `start`-th number on, in C order; the parts' sum modulo 2^32 is the leaf's."""
    bits = np.ascontiguousarray(part).view(_BITS[part.dtype.itemsize])
    axes = [np.arange(n, dtype=np.uint32).reshape(-1, *[1] * (part.ndim - 1 - i)) for i, n in enumerate(part.shape)]
    return int(_weighed(np, bits, axes, start))


def _weighed(xp: ModuleType, bits: Any, axes: list, start: int) -> Any:
    position = xp.full(bits.shape, start % 2**32, xp.uint32)
    for axis, index in enumerate(axes):
        position = position + index * xp.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
    return (bits.astype(xp.uint32) * (xp.uint32(2) * position + xp.uint32(1))).sum(dtype=xp.uint32)
